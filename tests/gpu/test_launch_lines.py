"""Flags of public launch lines: a mixed checkpoint answers with them as without.

All servers that a run asks for run at once, each in a process of its own, as in ``test_parallel.py``.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang.srt")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from support.adapters import ATTENTION, write_adapter  # noqa: E402
from support.run import environment  # noqa: E402
from support.serving import QWEN3_MOE, write_sources  # noqa: E402

pytestmark = pytest.mark.gpu

HERE = Path(__file__).parent
SHAPE = QWEN3_MOE.of(
    hidden=1024, layers=2, heads=16, kv_heads=8, head_dim=128, vocab=1024, experts=16, top_k=4, expert_intermediate=384
)
MIXED = "mixed"
BY_LAYER = "by layer"
"""Each layer's experts in one format."""
WEIGHTS = {
    MIXED: {
        "model.layers.*.self_attn.*": "fp8_block",
        "model.layers.*.mlp.experts.*": "gptq_int4",
        "model.layers.*.mlp.experts.{0..3}.*": "fp8_block",
    },
    BY_LAYER: {
        "model.layers.*.self_attn.*": "fp8_block",
        "model.layers.0.mlp.experts.*": "gptq_int4",
        "model.layers.1.mlp.experts.*": "fp8_block",
    },
}
RADIX = {"disable_radix_cache": False}
# Compiling FlashInfer's fused all-reduce takes minutes.
SEVERAL = {"enforce_disable_flashinfer_allreduce_fusion": True, "disable_custom_all_reduce": True}
FLAGS: dict[str, dict[str, Any]] = {
    "radix cache": RADIX,
    "hierarchical cache": {**RADIX, "enable_hierarchical_cache": True, "hicache_ratio": 2.0, "page_size": 16},
    "mixed chunks": {"chunked_prefill_size": 16, "enable_mixed_chunk": True},
    "pages of an FP8 cache": {"page_size": 16, "kv_cache_dtype": "fp8_e4m3"},
    "hidden states": {"enable_return_hidden_states": True},
    "memory saver": {"enable_memory_saver": True, "enable_weights_cpu_backup": True},
    # The base model's answers, through SGLang's layers around those of attention.
    "adapters": {"enable_lora": True, "lora_target_modules": ATTENTION, "max_lora_rank": 8},
    "pipeline stages": {"pp_size": 2, **SEVERAL},
    "deep_gemm": {"moe_runner_backend": "deep_gemm"},
    # Experts move between two ranks after each eighth step.
    "EPLB": {
        "tp_size": 2, "ep_size": 2, **SEVERAL, "enable_eplb": True, "ep_num_redundant_experts": 2,
        "eplb_rebalance_num_iterations": 8, "expert_distribution_recorder_buffer_size": 8, "log_level": "info",
    },
}  # fmt: skip
OF_ITS_OWN = {"deep_gemm": BY_LAYER, "EPLB": BY_LAYER}
"""Flags of other mixes than :data:`MIXED`."""
SAID = {"EPLB": "[EPLBManager] rebalance end"}
"""What a server logs when it did what it is asked for."""
SETTINGS = {
    "pipeline stages": {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0"},
    # SGLang compares places of experts with numbers that it sends along with their weights.
    "EPLB": {"SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0", "SGLANG_EXPERT_LOCATION_UPDATER_CANARY": "1"},
    # Only the kernels that the prompts need: those for all numbers of tokens take minutes.
    "deep_gemm": {"SGLANG_ENABLE_JIT_DEEPGEMM": "1", "SGLANG_JIT_DEEPGEMM_PRECOMPILE": "0"},
}


class Servers:
    """Starts a server for each name of :data:`FLAGS`, and one without flags for each mix that they are of."""

    def __init__(self, folder: Path, names: Sequence[str]):
        self._folder = folder
        self._sources = write_sources(folder / "sources", SHAPE, ["bf16", "fp8_block", "gptq_int4"])
        self._adapter = folder / "adapter"
        write_adapter(self._adapter, SHAPE)
        mixes = {mix: self._build(mix) for mix in sorted({OF_ITS_OWN.get(name, MIXED) for name in names})}
        asked = [*((mix, mix) for mix in mixes), *((name, OF_ITS_OWN.get(name, MIXED)) for name in names)]
        self._pool = ThreadPoolExecutor(len(asked))
        self._answers = {name: self._ask(number, name, mixes[mix]) for number, (name, mix) in enumerate(asked)}

    def _build(self, mix: str) -> Path:
        text = [f"model: {self._sources['bf16']}", "sources:", *(f"  {v}: {p}" for v, p in self._sources.items())]
        text += ["default: bf16", "weights:", *(f"  '{of}': {variant}" for of, variant in WEIGHTS[mix].items())]
        out = self._folder / mix.replace(" ", "-")
        recipe = out.with_suffix(".yaml")
        recipe.write_text("\n".join(text))
        subprocess.run([sys.executable, "-m", "mixprec_build", "build", recipe, "-o", out], check=True)
        return out

    def _ask(self, number: int, name: str, home: Path) -> Future[dict[str, Any]]:
        flags = FLAGS.get(name, {})
        engine = {
            "disable_cuda_graph": True, "mem_fraction_static": 0.8, "max_total_tokens": 8192,
            "port": 34000 + 1000 * number, **flags,
        }  # fmt: skip
        if name == "adapters":
            engine["lora_paths"] = [f"one={self._adapter}"]
        asked = {"dtype": "bfloat16", "logits": True, "prompts": 8, "new_tokens": 32, "sleep": name == "memory saver"}
        command = [sys.executable, "-m", "support.sglang.ask", str(home), json.dumps({**asked, "engine": engine})]
        settings = dict(SETTINGS.get(name, {}))
        if flags.get("pp_size", 1) * flags.get("tp_size", 1) > torch.cuda.device_count():
            settings |= {"SHARED_GPUS": str(torch.cuda.device_count()), "NCCL_SOCKET_IFNAME": "lo"}

        def run() -> dict[str, Any]:
            variables = environment(HERE / "repeatable", **settings)
            done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=variables)
            assert not done.returncode, f"{name}\n{done.stdout[-1000:]}\n{done.stderr[-5000:]}"
            assert SAID.get(name, "") in done.stdout + done.stderr
            answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return answer

        return self._pool.submit(run)

    def answer(self, name: str) -> dict[str, Any]:
        return self._answers[name].result()


@pytest.fixture(scope="module")
def servers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    chosen = [item.callspec.params["name"] for item in request.session.items if item.path == request.path]
    servers = Servers(tmp_path_factory.mktemp("launch"), chosen)
    yield servers
    servers._pool.shutdown(wait=False, cancel_futures=True)


@pytest.mark.parametrize("name", FLAGS)
def test_a_server_answers_with_flags_as_without(servers: Servers, name: str) -> None:
    """Up to a cache in FP8, and sums in another order."""
    plain, flagged = servers.answer(OF_ITS_OWN.get(name, MIXED)), servers.answer(name)
    p, q = (torch.tensor(a["distributions"], dtype=torch.float64) for a in (plain, flagged))
    distance = float((p.exp() * (p - q)).sum(-1).mean())
    print(f"\n{name}: KL to the plain server {distance:.2e}")
    assert distance < 2e-3
    for after_sleep in filter(None, [flagged.get("awake")]):
        assert after_sleep == {key: flagged[key] for key in ("tokens", "logprobs")}
