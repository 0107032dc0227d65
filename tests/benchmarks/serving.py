"""What serving a compiled checkpoint costs, beside the same weights served natively. Needs a GPU and SGLang.

    python tests/benchmarks/serving.py FOLDER

Makes a Qwen3-30B-A3B cut to 8 layers in FOLDER, in block FP8 and GPTQ-Int4; serves both natively and compiled, a mix of
them (16 FP8 and 112 Int4 experts in each layer) beside its parts, and, 16 layers deep, one with expert activity
counted beside one without. `mix` or `counted` after FOLDER asks for one of the last two alone. Prints tokens a second
with CUDA graphs, their ratio to those of the first line (the median of the ratios of each turn, and the smallest and
the largest), seconds to load, and the bytes of the weights on the GPU.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from serving import QWEN3_MOE, write_sources  # noqa: E402

SHAPE = QWEN3_MOE.of(
    layers=8, hidden=2048, experts=128, expert_intermediate=768, top_k=8, heads=32, kv_heads=4, head_dim=128, vocab=8192
)
ENGINE = {
    "cuda_graph_max_bs_decode": 128,
    "cuda_graph_bs_decode": [1, 16, 128],
    "mem_fraction_static": 0.9,
    "max_total_tokens": 81920,
    "sleep_on_idle": True,
}
RECIPES = {
    "fp8": ["*: fp8_block"],
    "int4": ["*: gptq_int4"],
    "mix": ["*: fp8_block", "model.layers.*.mlp.experts.{16..127}.*: gptq_int4"],
}


def build(folder: Path, sources: dict[str, Path], name: str) -> Path:
    lines = [f"model: {sources['fp8_block']}", "sources:", *(f"  {v}: {p}" for v, p in sources.items())]
    lines += ["weights:", *(f"  '{a}': {b}" for a, b in (line.split(": ") for line in RECIPES[name]))]
    recipe = folder / f"{name}.yaml"
    recipe.write_text("\n".join(lines))
    out = folder / name
    subprocess.run([sys.executable, "-m", "mixprec_build", "build", recipe, "-o", out, "--link", "--force"], check=True)
    return out


class Served:
    """One engine in a process of its own, which measures when it is told to."""

    def __init__(self, path: Path, dtype: str, port: int, environment: dict[str, str]):
        options = {"dtype": dtype, "answer": False, "speed": True, "engine": {**ENGINE, "nccl_port": port}}
        command = [sys.executable, str(HERE.parent / "gpu" / "ask.py"), str(path), json.dumps(options)]
        own = {**os.environ, **environment}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own)
        self._path = path

    def _line(self, wanted: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(wanted):
                return line
        sys.exit(f"{self._path}: the engine ended; its log is above")

    def wait(self) -> None:
        self._line("ready")

    def turn(self) -> dict[str, float]:
        """Tokens a second."""
        assert self._process.stdin is not None
        self._process.stdin.write("again\n")
        self._process.stdin.flush()
        rates: dict[str, float] = json.loads(self._line("measured").partition(" ")[2])
        return rates

    def end(self) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.close()
        answer: dict[str, Any] = json.loads(self._line("{"))
        self._process.wait()
        return answer


def compare(engines: Sequence[tuple[str, Path, dict[str, str]]], dtype: str, turns: int = 6) -> None:
    """Engines (name, checkpoint, environment) side by side on one GPU, each measured in turn, so that what disturbs
    one disturbs all."""
    served = [
        Served(path, dtype, 22000 + 20 * number, environment) for number, (_, path, environment) in enumerate(engines)
    ]
    for one in served:
        one.wait()
    measured: list[list[dict[str, float]]] = [[] for _ in served]
    for number in range(turns):
        order = range(len(served))
        for each in order[:: -1 if number % 2 else 1]:
            measured[each].append(served[each].turn())
        for (name, _, _), rates in zip(engines, measured, strict=True):
            print(f"turn {number}: {name:14s} {_shown(rates[-1:], measured[0][-1:])}", flush=True)
    for (name, path, _), rates, one in zip(engines, measured, served, strict=True):
        result = one.end()
        loaded = f"load {result['startup']['load_weight']:.2f} s"
        print(f"{name:14s} {dtype:9s} {_shown(rates, measured[0])}  {loaded}", flush=True)
        if result["memory"]:
            modules = json.loads((path / "mixprec_manifest.json").read_text())["modules"].values()
            stored: Counter[str] = Counter()
            for module in modules:
                for name, tensor in module["tensors"].items():
                    stored[name.rpartition(".")[2]] += tensor["bytes"]
            held = result["memory"]["weight_mb"] * 2**20
            # Symmetric GPTQ has neither zero points nor an order of inputs to look at: SGLang frees them.
            freed = stored["qzeros"] + stored["g_idx"]
            print(
                f"{'':24s} weights on the GPU {held / 2**20:.1f} MB, {held / stored.total():.4f} of the manifest's, "
                f"{held / (stored.total() - freed):.4f} without GPTQ's zero points and g_idx"
            )


def _shown(rates: Sequence[dict[str, float]], first: Sequence[dict[str, float]]) -> str:
    """Medians, and of the ratios to the same turns of the ``first`` engine the median, the least and the greatest."""
    shown = []
    for what in rates[0]:
        ratios = sorted(a[what] / b[what] for a, b in zip(rates, first, strict=True))
        spread = f", {ratios[0]:.3f} to {ratios[-1]:.3f}" if len(ratios) > 1 else ""
        middle = statistics.median(rate[what] for rate in rates)
        shown.append(f"{what} {middle:7.0f} ({statistics.median(ratios):.3f}{spread})")
    return "  ".join(shown)


def main() -> None:
    folder, only = Path(sys.argv[1]), sys.argv[2:]
    none: dict[str, str] = {}
    if only != ["counted"]:
        sources = write_sources(folder / "sources", SHAPE, ["fp8_block", "gptq_int4"])
        out = {name: build(folder, sources, name) for name in RECIPES}
        if only != ["mix"]:
            compare([("native fp8", sources["fp8_block"], none), ("compiled fp8", out["fp8"], none)], "bfloat16")
            # Stock GPTQ experts run in FP16 only; the mix and its parts are compared in BF16.
            compare([("native int4", sources["gptq_int4"], none), ("compiled int4", out["int4"], none)], "half")
        compare([(name, out[name], none) for name in RECIPES], "bfloat16")
    if only != ["mix"]:
        # Deep enough that the GPU, and not the host, is what decoding waits for.
        deep = folder / "deep"
        mix = build(deep, write_sources(deep / "sources", SHAPE.of(layers=16), ["fp8_block", "gptq_int4"]), "mix")
        counted = {"MIXPREC_EXPERT_ACTIVITY": "1"}
        compare([("mix", mix, none), ("mix, counted", mix, counted)], "bfloat16", turns=12)


if __name__ == "__main__":
    main()
