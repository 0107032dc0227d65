"""What serving a compiled checkpoint costs, beside the same weights served natively. Needs a GPU and SGLang.

    PYTHONPATH=tests python tests/benchmarks/serving.py FOLDER

Makes a Qwen3-30B-A3B cut to 8 layers in FOLDER, in block FP8 and GPTQ-Int4, and serves both natively and compiled;
then, cut to 10, a mix of them (16 FP8 and 112 Int4 experts in each layer) beside its parts, and beside itself with
expert activity counted. `mix` after FOLDER asks for the second alone. Prints tokens a second with CUDA graphs, their
ratio to those of the line that is named (the median of the ratios of each turn, and the smallest and the largest),
seconds to load, and the bytes of the weights on the GPU.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from support.engine import Served
from support.serving import QWEN3_MOE, write_sources

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


def start(path: Path, dtype: str, port: int, environment: Mapping[str, str]) -> Served:
    engine = {**ENGINE, "nccl_port": port}
    return Served(path, {"dtype": dtype, "answer": False, "speed": True, "engine": engine}, environment)


class Line(NamedTuple):
    name: str
    checkpoint: Path
    beside: str
    """The line that it is compared with."""
    environment: Mapping[str, str] = MappingProxyType({})


def compare(lines: Sequence[Line], dtype: str, turns: int = 6) -> None:
    """Engines side by side on one GPU, each measured in turn, so that what disturbs one disturbs all."""
    served = {
        line.name: start(line.checkpoint, dtype, 22000 + 20 * number, line.environment)
        for number, line in enumerate(lines)
    }
    for one in served.values():
        one.wait()
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in served}
    for number in range(turns):
        for name in list(served)[:: -1 if number % 2 else 1]:
            measured[name].append(served[name].turn())
        for line in lines:
            shown = _shown(measured[line.name][-1:], measured[line.beside][-1:])
            print(f"turn {number}: {line.name:14s} {shown}", flush=True)
    for name, path, beside, _ in lines:
        result = served[name].end()
        loaded = f"load {result['startup']['load_weight']:.2f} s"
        shown = _shown(measured[name], measured[beside])
        print(f"{name:14s} {dtype:9s} {shown} to {beside}, {loaded}", flush=True)
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


def _shown(rates: Sequence[dict[str, float]], beside: Sequence[dict[str, float]]) -> str:
    """Medians, and of the ratios to the same turns of the engine ``beside`` the median, the least and the greatest."""
    shown = []
    for what in rates[0]:
        ratios = sorted(a[what] / b[what] for a, b in zip(rates, beside, strict=True))
        spread = f", {ratios[0]:.3f} to {ratios[-1]:.3f}" if len(ratios) > 1 else ""
        middle = statistics.median(rate[what] for rate in rates)
        shown.append(f"{what} {middle:7.0f} ({statistics.median(ratios):.3f}{spread})")
    return "  ".join(shown)


def main() -> None:
    folder, only = Path(sys.argv[1]), sys.argv[2:]
    formats = ["fp8_block", "gptq_int4"]
    if only != ["mix"]:
        sources = write_sources(folder / "sources", SHAPE, formats)
        # Stock GPTQ experts run in FP16 only.
        for name, source, dtype in (("fp8", "fp8_block", "bfloat16"), ("int4", "gptq_int4", "half")):
            native = Line(f"native {name}", sources[source], f"native {name}")
            compare([native, Line(f"compiled {name}", build(folder, sources, name), native.name)], dtype)
    # Deep enough that decoding waits for the GPU, and not for the host, but at batch 1.
    folder = folder / "deep"
    sources = write_sources(folder / "sources", SHAPE.of(layers=10), formats)
    lines = [Line(name, build(folder, sources, name), "fp8") for name in RECIPES]
    counted = Line("mix, counted", lines[-1].checkpoint, "mix", {"MIXPREC_EXPERT_ACTIVITY": "1"})
    compare([*lines, counted], "bfloat16", turns=8)


if __name__ == "__main__":
    main()
