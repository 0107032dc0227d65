"""Several ranks on several GPUs, from the merged files and from each rank's own, beside one GPU.

    python -m pytest tests/gpu/test_parallel.py

All servers run at once, each in a process of its own. Where there are fewer GPUs than a server has ranks, the ranks
share them (``repeatable``), and two servers run at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang.srt")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from support.run import environment  # noqa: E402
from support.serving import QWEN3_MOE, Shape, write_sources  # noqa: E402

pytestmark = pytest.mark.gpu

HERE = Path(__file__).parent
VARIANTS = ["bf16", "fp8_block", "gptq_int4"]
SIZES = {"hidden": 1024, "layers": 4, "heads": 16, "kv_heads": 8, "head_dim": 128, "vocab": 1024, "experts": 32}
# 768 columns are 384 for each of two ranks, and 192 for each of four: one and a half blocks, which SGLang refuses.
SHAPE = QWEN3_MOE.of(**SIZES, top_k=8, expert_intermediate=768)
# The same for two.
NARROW = QWEN3_MOE.of(**SIZES, top_k=8, expert_intermediate=384)
LINES = {
    "model.layers.*.self_attn.*": "fp8_block",
    "model.layers.*.mlp.experts.*": "gptq_int4",
    "model.layers.*.mlp.experts.{0..7}.*": "fp8_block",
    "model.layers.*.mlp.experts.{9,30}.*": "bf16",
}
# Compiling FlashInfer's fused all-reduce takes minutes.
QUIET = {
    "enforce_disable_flashinfer_allreduce_fusion": True,
    "disable_custom_all_reduce": True,
    "mem_fraction_static": 0.8,
    "max_total_tokens": 16384,
    "disable_cuda_graph": True,
}
DEGREES = {"tp2": {"tp_size": 2}, "tp4": {"tp_size": 4}, "tp2-ep2": {"tp_size": 2, "ep_size": 2}}
DEGREES |= {"tp4-ep2": {"tp_size": 4, "ep_size": 2}, "dp2-tp2": {"dp_size": 2, "tp_size": 2}}
DEGREES |= {"attention dp2": {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}}
GRAPHS = {"disable_cuda_graph": False, "cuda_graph_max_bs_decode": 4, "cuda_graph_bs_decode": [1, 4]}
WITHOUT_FILES = {
    "cuda graph": GRAPHS,
    "tp2, cuda graph": {"tp_size": 2, **GRAPHS},
    "chunked prefill": {"chunked_prefill_size": 32},
    "recorder": {
        "expert_distribution_recorder_mode": "stat",
        "expert_distribution_recorder_buffer_size": -1,
        # Else a finished request runs one step more, whose token nobody gets.
        "disable_overlap_schedule": True,
    },
}


def gpus(options: Mapping[str, Any]) -> int:
    replicas = 1 if options.get("enable_dp_attention") else options.get("dp_size", 1)
    return int(options.get("tp_size", 1) * replicas)


class Servers:
    def __init__(self, folder: Path, shape: Shape, runs: Mapping[str, Mapping[str, Any]], padded: str, port: int):
        """``runs`` by name. Merged files are read by SGLang's own loader where there are others beside them, but for
        ``padded``, which it cannot cut."""
        # Ranks that share a GPU wait for their turns on it.
        at_once = 16 if max(map(gpus, runs.values())) <= torch.cuda.device_count() else 2
        self._folder, self._pool, self._port = folder, ThreadPoolExecutor(at_once), port
        sources = write_sources(folder / "sources", shape, VARIANTS)
        text = [f"model: {sources['bf16']}", "sources:", *(f"  {v}: {p}" for v, p in sources.items())]
        text += ["default: bf16", "weights:", *(f"  '{pattern}': {variant}" for pattern, variant in LINES.items())]
        recipe = folder / "mix.yaml"
        recipe.write_text("\n".join(text))
        self.merged, self.own = folder / "merged", folder / "own"
        self._mixprec("build", recipe, "-o", self.merged)
        self._mixprec("build", recipe, "-o", self.own)
        for tp, ep, dp in ((2, 1, 1), (4, 1, 1), (2, 2, 1), (4, 2, 1), (2, 1, 2)):
            self._mixprec("split", self.own, "--tp", tp, "--ep", ep, "--dp", dp)
        self._mixprec("split", self.own, "--layout", "presplit")
        self._answers: dict[tuple[Path, str], Future[dict[str, Any]]] = {}
        for name, options in runs.items():
            beside = name in DEGREES
            stock = {"load_format": "safetensors"} if beside and name != padded else {}
            self._ask(self.merged, name, {**options, **stock})
            if beside:
                self._ask(self.own, name, options)

    @staticmethod
    def _mixprec(*arguments: object) -> None:
        subprocess.run([sys.executable, "-m", "mixprec_build", *map(str, arguments)], check=True)

    def _ask(self, home: Path, name: str, options: Mapping[str, Any]) -> None:
        number, available = len(self._answers), torch.cuda.device_count()
        first = number % max(available - gpus(options) + 1, 1)
        # What SGLang chooses for replicas and ranks lies within a thousand from here.
        engine = {**QUIET, **options, "port": self._port + 1000 * number, "base_gpu_id": first}
        asked = {"dtype": "bfloat16", "logits": True, "prompts": 8, "new_tokens": 32, "record": name == "recorder"}
        command = [sys.executable, "-m", "support.sglang.ask", str(home), json.dumps({**asked, "engine": engine})]
        records = self._folder / f"records-{number}"
        records.mkdir()
        settings = {"SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR": str(records)}
        # What is free on a GPU differs from rank to rank while others start on it.
        settings["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] = "0"
        if gpus(options) > available:
            settings |= {"SHARED_GPUS": str(available), "NCCL_SOCKET_IFNAME": "lo"}

        def run() -> dict[str, Any]:
            variables = environment(HERE / "repeatable", **settings)
            done = subprocess.run(command, capture_output=True, text=True, timeout=520, env=variables)
            if done.returncode:
                raise AssertionError(f"{name}, {home.name}\n{done.stdout[-1000:]}\n{done.stderr[-5000:]}")
            answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return answer

        self._answers[home, name] = self._pool.submit(run)

    def end(self) -> None:
        """Nobody waits for what did not start."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def answer(self, name: str, home: Path | None = None) -> dict[str, Any]:
        return self._answers[home or self.merged, name].result()


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    runs = {"alone": {}, "tp2": DEGREES["tp2"]}
    servers = Servers(tmp_path_factory.mktemp("narrow"), NARROW, runs, "tp2", 10000)
    yield servers
    servers.end()


@pytest.fixture(scope="module")
def servers(narrow: Servers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """All start at once."""
    runs = {"alone": {}, **DEGREES, **WITHOUT_FILES}
    servers = Servers(tmp_path_factory.mktemp("parallel"), SHAPE, runs, "tp4", 13000)
    yield servers
    servers.end()


def divergence(answer: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Mean Kullback-Leibler divergence over the positions of prompts."""
    p, q = (torch.tensor(a["distributions"], dtype=torch.float64) for a in (answer, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", DEGREES)
def test_own_files_serve_what_the_merged_ones_do(servers: Servers, name: str) -> None:
    own, merged = servers.answer(name, servers.own), servers.answer(name)
    assert own["tokens"] == merged["tokens"]
    assert own["logprobs"] == merged["logprobs"]


@pytest.mark.parametrize("name", [*DEGREES, *WITHOUT_FILES])
def test_ranks_answer_as_one_gpu(servers: Servers, name: str) -> None:
    """Up to what another order of sums does: a token more or less for an expert, now and then."""
    compare(name, servers.answer(name), servers.answer("alone"))


def test_ranks_that_were_filled_up_answer_as_one_gpu(narrow: Servers) -> None:
    own, merged = narrow.answer("tp2", narrow.own), narrow.answer("tp2")
    assert own["tokens"] == merged["tokens"]
    assert own["logprobs"] == merged["logprobs"]
    compare("tp2, filled up", own, narrow.answer("alone"))


def compare(name: str, answer: Mapping[str, Any], alone: Mapping[str, Any]) -> None:
    distance = divergence(alone, answer)
    print(f"\n{name}: KL to one GPU {distance:.2e}")
    assert distance < 2e-3
    memory = answer["memory"]["weight_mb"] / alone["memory"]["weight_mb"]
    seconds = answer["startup"]["load_weight"]
    print(f"{name}: a rank holds {memory:.3f} of the weights, loaded in {seconds:.2f} s")


def test_the_recorder_counts_every_token_of_every_layer(servers: Servers) -> None:
    counts = servers.answer("recorder")["recorded"]
    assert len(counts) == SHAPE.layers
    assert [sum(layer) for layer in counts] == [8 * 24 * SHAPE.top_k] * SHAPE.layers
