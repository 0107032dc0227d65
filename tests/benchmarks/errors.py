"""How fast `mixprec suggest` measures quantization errors, by format, on one core.

Each format has an expert's up and down projection of DeepSeek-V3's shape (2048 x 7168), compared with BF16; files are
in the page cache. Printed are bytes read of both a second of processor time, and weights; with --beside, another
checkout of mixprec measures the same in turns, and ratios are printed; the errors of both are compared.

    PYTHONPATH=tests python tests/benchmarks/errors.py [--rounds 3] [--folder .demo/errors] [--beside CHECKOUT]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPES = {"up_proj": (2048, 7168), "down_proj": (7168, 2048)}
REFERENCE = "BF16"


def make(folder: Path) -> None:
    import torch
    from support.quantized import VARIANTS, write_linears

    random = torch.Generator().manual_seed(0)
    weights = {
        f"model.layers.0.mlp.{name}": torch.randn(shape, generator=random).bfloat16() * 0.05
        for name, shape in SHAPES.items()
    }
    for variant in VARIANTS:
        write_linears(folder / variant, variant, weights)


def measure(folder: Path) -> None:
    """Prints a line for each format: processor seconds, bytes read, and the errors."""
    from mixprec_build.checkpoint.typed import Source, open_source
    from mixprec_build.suggesting import distortion

    sources = {
        path.name: Source.of(path.name, open_source(str(path)).checkpoint)
        for path in sorted(folder.iterdir())
        if path.is_dir()
    }
    reference = sources.pop(REFERENCE)
    names = list(reference.checkpoint.modules)
    for _ in range(2):  # the first warms caches and tables
        for variant, source in sources.items():
            start = time.process_time()
            with distortion.DistortionCache(None) as cache:
                found = distortion.measure({name: (reference, [source]) for name in names}, cache, jobs=1)
            seconds = time.process_time() - start
            nbytes = sum(s.checkpoint.modules[name].nbytes for s in (reference, source) for name in names)
            errors = [found[name, variant].error / found[name, variant].power for name in names]
            print(json.dumps([variant, seconds, nbytes, errors]))


def measured(folder: Path, checkout: Path) -> dict[str, tuple[float, int, list[float]]]:
    """What :func:`measure` prints of a checkout's code."""
    environment = os.environ | {"PYTHONPATH": f"{checkout}{os.pathsep}{Path(__file__).parents[1]}"}
    command = [sys.executable, __file__, "--measure", str(folder)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    lines: list[Any] = [json.loads(line) for line in done.stdout.splitlines()]
    return {variant: (seconds, nbytes, errors) for variant, seconds, nbytes, errors in lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(".demo/errors"))
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        measure(args.measure)
        return
    folder = args.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    make(folder)
    contenders = [Path(__file__).parents[2]] + ([] if args.beside is None else [args.beside.resolve()])
    rounds = [[measured(folder, checkout) for checkout in contenders] for _ in range(args.rounds)]
    weights = sum(n * k for n, k in SHAPES.values())
    for variant, (_, nbytes, errors) in rounds[0][0].items():
        best = [min(turn[i][variant][0] for turn in rounds) for i in range(len(contenders))]
        line = f"{variant:36} {nbytes / best[0] / 1e6:5.0f} MB/s  {weights / best[0] / 1e6:5.0f} million weights/s"
        if args.beside is not None:
            theirs = rounds[0][1][variant][2]
            apart = max(abs(a / b - 1) if b else float(a != b) for a, b in zip(errors, theirs, strict=True))
            line += (
                f"  {nbytes / best[1] / 1e6:5.0f} MB/s beside: {best[1] / best[0]:.1f} times; errors {apart:.0e} apart"
            )
        print(line)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
