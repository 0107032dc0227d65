"""A mix of each model family on a real GPU, beside SGLang's own BF16 class with the mix's dequantized weights.

    python -m pytest tests/gpu/test_families.py -k "family and glm4_moe"

The tiny models are those that ``tests/sglang/test_families.py`` loads. Two servers of a family start together, and
several families at a time, on all GPUs that are visible; a family that fails leaves the others alone.

DeepSeek-V4 is missing: its attention needs FlashMLA's and DeepGEMM's kernels, and heads of 512.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang.srt")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from support.families import TINY, TinyModel  # noqa: E402
from support.image_families import KIMI_K3_WIDE  # noqa: E402
from support.run import ENGINES_AT_ONCE, answer_of  # noqa: E402
from support.sglang.families import dequantized, family_mix  # noqa: E402

pytestmark = pytest.mark.gpu

HERE = Path(__file__).parent
AT_ONCE = ENGINES_AT_ONCE // 2
PORT = 25000
# For a few short prompts, one at a time.
ENGINE: Mapping[str, Any] = {
    "mem_fraction_static": 0.6,
    "max_total_tokens": 8192,
    "cuda_graph_max_bs_decode": 1, "cuda_graph_bs_decode": [1],
    "cuda_graph_max_bs_prefill": 64, "cuda_graph_bs_prefill": [64],
}  # fmt: skip
NO_GRAPHS = {"disable_cuda_graph": True}
EAGER_PREFILL = {"disable_prefill_cuda_graph": True}
# The tiny models have no files of an image processor.
TEXT = {"enable_multimodal": False}
# With images, SGLang captures no prefill of these.
IMAGES = {**TEXT, **EAGER_PREFILL}
DELTA_NET = {"max_mamba_cache_size": 32, "max_running_requests": 4}
# Prompts are shorter than what the indexer selects, so that attention to all tokens is the same. It needs kernels of
# DeepGEMM and FlashMLA; the Triton backend leaves it out.
NO_INDEXER = NO_GRAPHS
# SGLang refuses Triton by that name for it, since the first layer may be no attention; here it is.
NEMOTRON = {
    **DELTA_NET, "attention_backend": None, "prefill_attention_backend": "triton",
    "decode_attention_backend": "triton",
}  # fmt: skip
# SGLang keeps window and other layers in pools of their own. It has none for a Llama 4 of less than four layers, whose
# Triton attention has no windows, and no sizes of windows where Gemma-4 comes without images.
ONE_POOL = {"disable_hybrid_swa_memory": True}
# Its class gives q a row for each head, of which a captured prefill attends to as many as there are tokens.
HUNYUAN = EAGER_PREFILL
MINIMAX_M3 = {**EAGER_PREFILL, "disable_shared_experts_fusion": True}

# Family -> arguments of its engine, beside those of the tiny model.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "qwen3_5": {**TEXT, **DELTA_NET},
    "qwen3_5_moe": {**TEXT, **DELTA_NET},
    "qwen3_5_moe_auto_round": {**TEXT, **DELTA_NET},
    "qwen3_next": {**DELTA_NET, "disable_shared_experts_fusion": True},
    "qwen3_vl": TEXT,
    "qwen3_vl_moe": TEXT,
    "glm4_moe": {"disable_shared_experts_fusion": True},
    "deepseek_v32": NO_INDEXER,
    "glm_moe_dsa": NO_INDEXER,
    "kimi_k2": {},
    "kimi_k25": TEXT,
    "kimi_k25_packed": TEXT,
    "kimi_k3": {**TEXT, **DELTA_NET},
    "minimax_m2": {},
    "minimax_m3": MINIMAX_M3,
    "minimax_m3_images": {**TEXT, **MINIMAX_M3},
    "mistral3": TEXT,
    "mistral_large_3": {},
    "mistral_large_3_images": TEXT,
    "llama4": {**IMAGES, **ONE_POOL},
    "nemotron_h": NEMOTRON,
    "nemotron_h_latent": NEMOTRON,
    "mimo_v2": {},
    "bailing_moe": {},
    "step3p5": {},
    "step3p7": IMAGES,
    "longcat": {},
    "hunyuan": HUNYUAN,
    "hunyuan_dense": HUNYUAN,
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "olmoe": {},
    "gemma3": {},
    "gemma3_images": IMAGES,
    "gemma4": ONE_POOL,
    "gemma4_moe": ONE_POOL,
    "gemma4_images": IMAGES,
    "phi3": {},
    "phimoe": {},
    "granite": {},
    "granitemoe": {},
    "apertus": {},
    "internlm2": {},
    "cohere": EAGER_PREFILL,
    "cohere2": EAGER_PREFILL,
}
# Of the server in BF16 alone: SGLang's own choice for it there is CUTLASS, which compiles for many minutes.
BESIDE: Mapping[str, Mapping[str, Any]] = {
    "nemotron_h": {"moe_runner_backend": "triton"},
    "nemotron_h_latent": {"moe_runner_backend": "triton"},
}
# Lines beside those of the tiny model's recipe, for experts of a layer in several formats.
LINES: Mapping[str, Mapping[str, str]] = {
    "llama4": {"*.layers.1.feed_forward.experts.{0..2}.*": "bf16"},
}
MODELS: Mapping[str, TinyModel] = {**TINY, "kimi_k3": KIMI_K3_WIDE}

# The largest distances allowed: of means and medians in prefill, and of steps in decoding.
EXPERTS = 0.2, 0.06, 0.3
DENSE = 0.05, 0.04, 0.25


class Answers(NamedTuple):
    mix: Mapping[str, Any]
    dense: Mapping[str, Any]
    without_graphs: str
    """Why both were served without CUDA graphs, if they were."""


class Servers:
    """Starts both servers of each family that is asked for, at most :data:`AT_ONCE` families at a time."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._running: dict[str, Future[Answers]] = {}
        self._started = count()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        self._devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]

    def of(self, name: str) -> Future[Answers]:
        if name not in self._running:
            self._running[name] = self._pool.submit(self._serve, name)
        return self._running[name]

    def end(self) -> None:
        """Cancels what has not started."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _serve(self, name: str) -> Answers:
        mix = family_mix(self._folder, name, lines=LINES.get(name), model=MODELS[name])
        dense = dequantized(mix, mix.parent / "dense")
        ours, theirs = self._ask_both(name, mix, dense, {})
        failed = theirs.exception()
        if failed is not None and not FAMILIES[name].get("disable_cuda_graph"):
            # What stock SGLang cannot capture is no fault of the mix.
            ours, theirs = self._ask_both(name, mix, dense, NO_GRAPHS)
        return Answers(ours.result(), theirs.result(), str(failed or ""))

    def _ask_both(self, name: str, mix: Path, dense: Path, more: Mapping[str, Any]) -> list[Future[dict[str, Any]]]:
        with ThreadPoolExecutor(2) as pool:
            return [
                pool.submit(self._ask, name, mix, more),
                pool.submit(self._ask, name, dense, {**BESIDE.get(name, {}), **more}),
            ]

    def _ask(self, name: str, path: Path, more: Mapping[str, Any]) -> dict[str, Any]:
        # Engines that start together must not find the same port free.
        number = next(self._started)
        engine = {**ENGINE, **MODELS[name].options, **FAMILIES[name], **more, "nccl_port": PORT + 20 * number}
        options = {"dtype": "bfloat16", "logits": True, "prompts": 16, "new_tokens": 16, "engine": engine}
        device = self._devices[number % len(self._devices)]
        return answer_of(path, options, HERE / "repeatable", timeout=400, variables={"CUDA_VISIBLE_DEVICES": device})


@pytest.fixture(scope="module")
def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    servers = Servers(tmp_path_factory.mktemp("families"))
    # All of this run at once; the tests then wait for theirs.
    for item in request.session.items:
        chosen = getattr(item, "callspec", None)
        if chosen is not None and item.name.startswith("test_a_family"):
            servers.of(chosen.params["name"])
    yield servers
    servers.end()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_answers_as_its_dequantized_weights(servers: Servers, name: str) -> None:
    """Prefill and decoding differ from the BF16 class by what rounding activations to FP8 does, and no more.

    Distances are relative, since some tiny models tell tokens apart much less than others: in prefill, to the
    distance between neighbouring positions; in decoding, to the spread of logprobs over the vocabulary. In
    transformers, rounded activations move the mean in prefill by 0.06 at most and the median by 0.02 where a token
    goes to another of eight experts now and then, and both by 0.02 in dense models; one ``o_proj`` with its rows in
    reverse moves both by 0.3 to 1.
    """
    answers = servers.of(name).result()
    if answers.without_graphs:
        print(f"\n{name}: without CUDA graphs, with which SGLang's own class fails: {answers.without_graphs[-300:]}")
    p, q = (torch.tensor(answer["distributions"], dtype=torch.float64) for answer in (answers.dense, answers.mix))
    apart = _divergence(p, q).flatten()
    between = _divergence(p[:, 1:], p[:, :-1]).mean()
    steps = _decoded_apart(answers) / p.std(-1).mean()
    print(
        f"\n{name}: KL mean {apart.mean():.1e} median {apart.median():.1e} max {apart.max():.1e}, between positions "
        f"{between:.1e}; {len(steps)} tokens decoded alike, logprobs apart by {steps.median():.1e} of their spread"
    )
    mean, median, step = EXPERTS if any(".experts." in pattern for pattern in MODELS[name].lines) else DENSE
    assert apart.mean() < mean * between
    assert apart.median() < median * between
    # How soon the two decode another token is chance: two of Qwen3.5's experts are near for many tokens.
    assert len(steps) >= 2 and steps.median() < step


def _divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(-1)


def _decoded_apart(answers: Answers) -> torch.Tensor:
    """Differences of the logprobs of all tokens up to the first that the servers do not agree on, but the first of
    each prompt, which is of its prefill."""
    differences: list[float] = []
    for number, tokens in enumerate(answers.mix["tokens"]):
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(tokens, answers.dense["tokens"][number], strict=True))
        count = len(list(alike))
        ours, theirs = answers.mix["logprobs"][number], answers.dense["logprobs"][number]
        differences += [abs(a - b) for a, b in zip(ours[1:count], theirs[1:count], strict=True)]
    return torch.tensor(differences, dtype=torch.float64)
