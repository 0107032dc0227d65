"""Speculative decoding with compiled checkpoints, on models whose every draft is accepted (``support/speculative.py``).

    python -m pytest -s tests/gpu/test_speculative.py

All servers run at once, each in a process of its own.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang.srt")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from safetensors.torch import load_file, save_file  # noqa: E402
from support.families import TinyModel  # noqa: E402
from support.run import ENGINES_AT_ONCE, environment  # noqa: E402
from support.sglang.ask import prompts  # noqa: E402
from support.sglang.families import write_family, write_recipe  # noqa: E402
from support.speculative import (  # noqa: E402
    DEEPSEEK,
    GLM4_MOE,
    QWEN3_5_MOE,
    QWEN3_MOE,
    answer_to,
    predictable,
    write_eagle3,
)

pytestmark = pytest.mark.gpu

PROMPTS, NEW = 6, 65
STEPS = 3
FULL = NEW / ((NEW - 1) // (STEPS + 1))
"""Tokens a step where every draft is accepted: after the prefill's token, all drafts and one more."""
CHAIN = {
    "speculative_num_steps": STEPS, "speculative_eagle_topk": 1, "speculative_num_draft_tokens": STEPS + 1,
}  # fmt: skip
EXPLICIT = {"quantization": "mixprec"}
GRAPHS = {"disable_cuda_graph": False, "cuda_graph_max_bs_decode": 1, "cuda_graph_bs_decode": [1]}
MODELS: Mapping[str, TinyModel] = {
    "qwen3_moe": QWEN3_MOE, "deepseek": DEEPSEEK, "glm4_moe": GLM4_MOE, "qwen3_5_moe": QWEN3_5_MOE,
}  # fmt: skip
ENGINES: Mapping[str, Mapping[str, Any]] = {
    "glm4_moe": {"disable_shared_experts_fusion": True},
    "qwen3_5_moe": {
        **QWEN3_5_MOE.options, "enable_multimodal": False, "max_mamba_cache_size": 32, "max_running_requests": 4,
    },
}  # fmt: skip
"""Arguments that a model needs in any case."""


class Folder:
    """Checkpoints, each written once below a folder."""

    def __init__(self, path: Path):
        self._path = path
        self._written: dict[str, Path] = {}

    def source(self, model: str, variant: str = "bf16") -> Path:
        home = self._path / model
        if not home.exists():
            write_family(home, MODELS[model], values_of=predictable, drafts=True)
        return home / variant

    def mix(self, model: str) -> Path:
        out = self._path / f"{model}-mix"
        if not out.exists():
            variants = {variant: self.source(model, variant) for variant in ("bf16", "fp8", "int4")}
            recipe = write_recipe(out.with_suffix(".yaml"), variants, MODELS[model].lines)
            subprocess.run([sys.executable, "-m", "mixprec_build", "build", recipe, "-o", out], check=True)
        return out

    def eagle3(self) -> Path:
        out = self._path / "eagle3"
        return out if out.exists() else write_eagle3(out)

    def lost_draft(self) -> Path:
        """DeepSeek's release with zeros in the projection of its draft layer."""
        out = self._path / "lost"
        if not out.exists():
            shutil.copytree(self.source("deepseek"), out)
            tensors = load_file(out / "model.safetensors")
            (name,) = [name for name in tensors if name.endswith("eh_proj.weight")]
            tensors[name] = torch.zeros_like(tensors[name])
            save_file(tensors, out / "model.safetensors", {"format": "pt"})
        return out


Run = tuple[Path, dict[str, Any]]
"""A checkpoint, and the arguments of its engine."""


def _eagle3(folder: Folder, model: Path, **engine: Any) -> Run:
    return model, {
        **CHAIN, "speculative_algorithm": "EAGLE3", "speculative_draft_model_path": str(folder.eagle3()), **engine,
    }  # fmt: skip


def _nextn(model: Path, draft: Path | None = None, **engine: Any) -> Run:
    path = {} if draft is None else {"speculative_draft_model_path": str(draft)}
    return model, {**CHAIN, "speculative_algorithm": "EAGLE", **path, **engine}


DRAFTING = [model for model in MODELS if model != "qwen3_moe"]
"""Models with draft layers of their own."""
NATIVE: Mapping[str, Callable[[Folder], Run]] = {
    "eagle3": lambda f: _eagle3(f, f.source("qwen3_moe")),
    **{model: partial(lambda model, f: _nextn(f.source(model), **ENGINES.get(model, {})), model) for model in DRAFTING},
}
WITHOUT: Mapping[str, Callable[[Folder], Run]] = {
    model: partial(lambda model, f: (f.mix(model), dict(ENGINES.get(model, {}))), model) for model in MODELS
}
LOST: Callable[[Folder], Run] = lambda f: _nextn(f.lost_draft())  # noqa: E731
# name -> the native server that it is compared with, its model, and its own
ELSEWHERE: Mapping[str, tuple[str, str, Callable[[Folder], Run]]] = {
    "eagle3 head": ("eagle3", "qwen3_moe", lambda f: _eagle3(f, f.mix("qwen3_moe"))),
    "eagle3 head, explicit, graphs": (
        "eagle3", "qwen3_moe", lambda f: _eagle3(f, f.mix("qwen3_moe"), **EXPLICIT, **GRAPHS),
    ),
    "the release in bf16, explicit": (
        "deepseek", "deepseek", lambda f: _nextn(f.mix("deepseek"), f.source("deepseek"), **EXPLICIT),
    ),
    "the release in fp8": (
        "deepseek", "deepseek", lambda f: _nextn(f.mix("deepseek"), f.source("deepseek", "fp8")),
    ),
    "the release in fp8, explicit": (
        "deepseek", "deepseek", lambda f: _nextn(f.mix("deepseek"), f.source("deepseek", "fp8"), **EXPLICIT),
    ),
}  # fmt: skip
# As above, for layers of the compiled checkpoint itself
OWN: Mapping[str, tuple[str, str, Callable[[Folder], Run]]] = {
    **{
        f"its own, {model}": (
            model, model, partial(lambda model, f: _nextn(f.mix(model), **ENGINES.get(model, {})), model),
        )
        for model in DRAFTING
    },
    "its own, deepseek, explicit, graphs": (
        "deepseek", "deepseek", lambda f: _nextn(f.mix("deepseek"), **EXPLICIT, **GRAPHS),
    ),
}  # fmt: skip


class Servers:
    """Serves each checkpoint once, several side by side."""

    def __init__(self, folder: Folder):
        self._folder, self._pool = folder, ThreadPoolExecutor(ENGINES_AT_ONCE)
        self._running: dict[str, Future[dict[str, Any]]] = {}

    def ask(self, name: str, run: Callable[[Folder], Run]) -> Future[dict[str, Any]]:
        if name not in self._running:
            path, engine = run(self._folder)  # written before others that need the same files
            port = 24000 + 20 * len(self._running)
            self._running[name] = self._pool.submit(_ask, name, path, {"nccl_port": port, **engine})
        return self._running[name]

    def end(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _ask(name: str, path: Path, engine: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {"mem_fraction_static": 0.6, "max_total_tokens": 8192, "disable_cuda_graph": True}
    options = {
        "dtype": "bfloat16", "prompts": PROMPTS, "new_tokens": NEW, "engine": {**sizes, **engine},
    }  # fmt: skip
    command = [sys.executable, "-m", "support.sglang.ask", str(path), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, env=environment())
    if done.returncode:
        raise AssertionError(f"{name}: {' '.join(command)}\n{done.stdout[-1500:]}\n{done.stderr[-6000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.fixture(scope="module")
def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(Folder(tmp_path_factory.mktemp("speculative")))
    # All at once, so that engines start side by side; the tests then wait for theirs.
    for item in request.session.items:
        name = getattr(getattr(item, "callspec", None), "params", {}).get("name")
        if item.path == request.path and name in (*ELSEWHERE, *OWN):
            native, model, run = {**ELSEWHERE, **OWN}[name]
            servers.ask(f"native {native}", NATIVE[native])
            servers.ask(f"without {model}", WITHOUT[model])
            servers.ask(name, run)
    yield servers
    servers.end()


def _due(model: str) -> list[list[int]]:
    config = MODELS[model].config
    size = config.get("text_config", config)["vocab_size"]
    return [answer_to(prompt, NEW, size) for prompt in prompts(size, PROMPTS, 24)]


def _accepted(name: str, answer: Mapping[str, Any]) -> list[float]:
    lengths: list[float] = answer["accepted"]
    print(
        f"\n{name}: tokens a step {', '.join('none' if n is None else f'{n:.3f}' for n in lengths)}; {FULL:.3f} is all"
    )
    assert None not in lengths, "it ran without drafts"
    return lengths


@pytest.mark.parametrize("name", ELSEWHERE)
def test_drafts_from_elsewhere_are_accepted_as_natively(servers: Servers, name: str) -> None:
    _compare(servers, name, *ELSEWHERE[name])


@pytest.mark.parametrize("name", OWN)
def test_own_draft_layers_are_accepted_as_natively(servers: Servers, name: str) -> None:
    ours = _compare(servers, name, *OWN[name])
    memory = ours["memory"]["bytes_by_layer"]
    print(f"{name}: the draft takes {memory['draft'] / 2**20:.2f} MB of {sum(memory.values()) / 2**20:.2f}")
    assert 0 < memory["draft"] < sum(memory.values()) / 2


def _compare(servers: Servers, name: str, native: str, model: str, run: Callable[[Folder], Run]) -> Mapping[str, Any]:
    ours, theirs = servers.ask(name, run).result(), servers.ask(f"native {native}", NATIVE[native]).result()
    without = servers.ask(f"without {model}", WITHOUT[model]).result()
    assert without["tokens"] == _due(model), "the model itself"
    assert without["accepted"] == [None] * PROMPTS
    # With overlapping schedules, a finished request may run one step more.
    for which, answer in ((f"native {native}", theirs), (name, ours)):
        assert _accepted(which, answer) == pytest.approx([FULL] * PROMPTS, abs=0.5)
    assert ours["tokens"] == without["tokens"]
    return ours


def test_a_lost_draft_layer_is_never_accepted(servers: Servers) -> None:
    """The measure of these tests, on stock SGLang."""
    answer = servers.ask("lost", LOST).result()
    assert max(_accepted("a draft layer without its projection", answer)) < 1.2
    assert answer["tokens"] == _due("deepseek")
