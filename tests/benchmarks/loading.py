"""How fast weights reach the GPU: SGLang's loader on a native checkpoint and on a compiled one, and a rank's own
files. Needs a GPU and SGLang.

    python tests/benchmarks/loading.py FOLDER [LAYERS]

Makes a Qwen3-30B-A3B cut to LAYERS layers (14: 8.6 GB) in block FP8, in FOLDER; starts servers one after the other,
with the files in the page cache and, told by the kernel to forget them, without; prints the seconds that SGLang
says it loaded weights for, and what the process that loads read from disk or cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from serving import QWEN3_MOE, write_sources  # noqa: E402

ENGINE = {"disable_cuda_graph": True, "mem_fraction_static": 0.9, "max_total_tokens": 8192}


def forget(folder: Path) -> None:
    """Drops a folder's files from the page cache."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(path: Path, **engine: Any) -> float:
    """Seconds to load weights, as SGLang counts them."""
    options = {"dtype": "bfloat16", "prompts": 1, "new_tokens": 1, "engine": {**ENGINE, **engine}}
    command = [sys.executable, str(HERE.parent / "gpu" / "ask.py"), str(path), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{path}: {done.stderr[-3000:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["startup"]["load_weight"])


def main() -> None:
    folder, layers = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 14
    shape = QWEN3_MOE.of(
        layers=layers, hidden=2048, experts=128, expert_intermediate=768, top_k=8, heads=32, kv_heads=4,
        head_dim=128, vocab=8192,
    )  # fmt: skip
    native = write_sources(folder / "sources", shape, ["fp8_block"])["fp8_block"]
    recipe, merged = folder / "recipe.yaml", folder / "merged"
    recipe.write_text(f"model: {native}\n")
    own = folder / "own"
    for arguments in (
        ("build", recipe, "-o", merged, "--link"),
        ("build", recipe, "-o", own, "--link"),
        ("split", own, "--tp", "1"),
    ):
        subprocess.run([sys.executable, "-m", "mixprec_build", *map(str, arguments)], check=True)
    files = {"native": native, "compiled": merged, "cut for ranks": own}
    print(f"{sum(p.stat().st_size for p in native.glob('*.safetensors')) / 1e9:.1f} GB in {layers} layers", flush=True)
    for name, home in files.items():
        warm = load(home)
        forget(home)
        cold = load(home)
        print(f"{name:14s} warm {warm:6.2f} s  cold {cold:6.2f} s", flush=True)


if __name__ == "__main__":
    main()
