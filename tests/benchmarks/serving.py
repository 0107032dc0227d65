"""What serving a compiled checkpoint costs, beside the same weights served natively. Needs a GPU and SGLang.

    python tests/benchmarks/serving.py FOLDER

Makes a Qwen3-30B-A3B cut to 6 layers in FOLDER, in block FP8 and GPTQ-Int4; serves both natively and compiled, and
a mix of them; prints tokens a second with CUDA graphs, seconds to load, and the bytes of the weights on the GPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from serving import QWEN3_MOE, write_sources  # noqa: E402

SHAPE = QWEN3_MOE.of(
    layers=6, hidden=2048, experts=128, expert_intermediate=768, top_k=8, heads=32, kv_heads=4, head_dim=128, vocab=8192
)
ENGINE = {"cuda_graph_max_bs_decode": 128, "cuda_graph_bs_decode": [1, 16, 128], "mem_fraction_static": 0.6}
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
    subprocess.run([sys.executable, "-m", "mixprec_build", "build", recipe, "-o", out, "--force"], check=True)
    return out


def ask(path: Path, dtype: str) -> dict[str, Any]:
    options = {"dtype": dtype, "answer": False, "speed": 3, "engine": ENGINE}
    command = [sys.executable, str(HERE.parent / "gpu" / "ask.py"), str(path), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{path}: {done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    folder = Path(sys.argv[1])
    sources = write_sources(folder / "sources", SHAPE, ["fp8_block", "gptq_int4"])
    compiled = {name: build(folder, sources, name) for name in RECIPES}
    # Stock GPTQ experts run in FP16 only; the mix is compared with both parts in BF16.
    runs = [
        ("native fp8", sources["fp8_block"], "bfloat16"),
        ("compiled fp8", compiled["fp8"], "bfloat16"),
        ("native int4, half", sources["gptq_int4"], "half"),
        ("compiled int4, half", compiled["int4"], "half"),
        ("compiled int4", compiled["int4"], "bfloat16"),
        ("mix fp8 16 + int4 112", compiled["mix"], "bfloat16"),
    ]
    for name, path, dtype in runs:
        result = ask(path, dtype)
        rates = "  ".join(f"{what} {rate:9.0f}" for what, rate in result["speed"].items())
        manifest = path / "mixprec_manifest.json"
        stored = 0
        if manifest.exists():
            modules = json.loads(manifest.read_text())["modules"].values()
            stored = sum(tensor["bytes"] for module in modules for tensor in module["tensors"].values())
        held = (result["memory"] or {}).get("weight_mb", 0)
        print(
            f"{name:24s} {rates}  load {result['startup']['load_weight']:5.2f} s  SGLang: {result['weight_gb']} GB  "
            f"parameters {held:6.0f} MB  manifest {stored / 2**20:6.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
