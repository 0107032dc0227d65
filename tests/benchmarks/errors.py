"""How fast `mixprec suggest` measures quantization errors, by format: on one core, or on a GPU beside all cores.

    PYTHONPATH=tests python tests/benchmarks/errors.py [--rounds 3] [--folder .demo/errors] [--beside CHECKOUT]
    PYTHONPATH=tests python tests/benchmarks/errors.py --device cuda --folder /dev/shm/errors [--gigabytes 2]

Each format has an expert's up and down projection of DeepSeek-V3's shape (2048 x 7168), compared with BF16; files are
in the page cache. Printed are bytes read of both a second of processor time, and weights; with --beside, another
checkout of mixprec measures the same in turns, and ratios are printed; the errors of both are compared.

With --device there are as many layers as the gigabytes of the BF16 reference take. Numpy, with a thread a core, and
torch on the device measure each format in turns. Printed are bytes read of both a second of time, the best round of
each; the errors of both may differ by a millionth of themselves, or the benchmark fails.
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

REFERENCE = "BF16"
HIDDEN, INTERMEDIATE = 7168, 2048


def shapes(hidden: int, intermediate: int) -> dict[str, tuple[int, int]]:
    return {"up_proj": (intermediate, hidden), "down_proj": (hidden, intermediate)}


def make(folder: Path, variant: str, layers: int = 1, hidden: int = HIDDEN, intermediate: int = INTERMEDIATE) -> None:
    """Writes a source whose layers all have the weights of the first, which a GPU packs if there is one."""
    import torch
    from support.quantized import write_linears

    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = torch.Generator(device).manual_seed(0)
    weights = {
        f"model.layers.0.mlp.{name}": torch.randn(shape, generator=random, device=device).bfloat16() * 0.05
        for name, shape in shapes(hidden, intermediate).items()
    }
    write_linears(folder, variant, weights)
    path = folder / "model.safetensors"
    stored = path.read_bytes()
    begin = 8 + int.from_bytes(stored[:8], "little")
    header, data = json.loads(stored[8:begin]), memoryview(stored)[begin:]
    header.pop("__metadata__", None)
    every = json.dumps(
        {
            name.replace("layers.0.", f"layers.{layer}."): {
                **tensor, "data_offsets": [at + layer * len(data) for at in tensor["data_offsets"]]
            }
            for layer in range(layers)
            for name, tensor in header.items()
        }
    ).encode()  # fmt: skip
    every += b" " * (-len(every) % 8)
    with path.open("wb") as file:
        file.write(len(every).to_bytes(8, "little") + every)
        for _ in range(layers):
            file.write(data)


def opened(folder: Path) -> Any:
    from mixprec_build.checkpoint.typed import Source, open_source

    return Source.of(folder.name, open_source(str(folder)).checkpoint)


def measure(folder: Path) -> None:
    """Prints a line for each format: processor seconds, bytes read, and the errors."""
    from mixprec_build.suggesting import distortion

    sources = {path.name: opened(path) for path in sorted(folder.iterdir()) if path.is_dir()}
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


def apart(ours: list[float], theirs: list[float]) -> float:
    """The largest difference, relative to ``theirs``."""
    return max(abs(a / b - 1) if b else float(a != b) for a, b in zip(ours, theirs, strict=True))


def on_one_core(folder: Path, variants: list[str], rounds: int, beside: Path | None) -> None:
    for variant in (REFERENCE, *variants):
        make(folder / variant, variant)
    contenders = [Path(__file__).parents[2]] + ([] if beside is None else [beside.resolve()])
    turns = [[measured(folder, checkout) for checkout in contenders] for _ in range(rounds)]
    weights = 2 * HIDDEN * INTERMEDIATE
    for variant, (_, nbytes, errors) in turns[0][0].items():
        best = [min(turn[i][variant][0] for turn in turns) for i in range(len(contenders))]
        line = f"{variant:36} {nbytes / best[0] / 1e6:5.0f} MB/s  {weights / best[0] / 1e6:5.0f} million weights/s"
        if beside is not None:
            line += (
                f"  {nbytes / best[1] / 1e6:5.0f} MB/s beside: {best[1] / best[0]:.1f} times; errors "
                f"{apart(errors, turns[0][1][variant][2]):.0e} apart"
            )
        print(line)


def on_a_device(folder: Path, variants: list[str], args: argparse.Namespace) -> bool:
    """Returns whether all errors agree."""
    import torch
    from support.page_cache import seconds_to_read

    from mixprec_build.suggesting.comparing import Comparer
    from mixprec_build.suggesting.device import TorchComparer
    from mixprec_build.suggesting.distortion import DistortionCache
    from mixprec_build.suggesting.distortion import measure as run

    size = args.hidden, args.intermediate
    layers = max(1, round(args.gigabytes * 1e9 / (4 * args.hidden * args.intermediate)))
    make(folder / REFERENCE, REFERENCE, layers, *size)
    reference = opened(folder / REFERENCE)
    names = list(reference.checkpoint.modules)
    contenders = {"numpy": Comparer(), "torch": TorchComparer(args.device)}
    name_of = torch.cuda.get_device_name() if args.device == "cuda" else "torch's CPU"
    print(
        f"{name_of}, {os.cpu_count()} cores, torch {torch.__version__}; {2 * layers} modules of {size[1]} x {size[0]}"
    )
    nbytes = (folder / REFERENCE / "model.safetensors").stat().st_size
    alone = min(seconds_to_read(folder / REFERENCE, args.jobs or TorchComparer.jobs) for _ in range(2))
    print(f"reading alone: {nbytes / alone / 1e9:.1f} GB/s")
    agree = True
    for variant in variants:
        make(folder / variant, variant, layers, *size)
        source = opened(folder / variant)
        nbytes = sum(s.checkpoint.modules[name].nbytes for s in (reference, source) for name in names)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        errors: dict[str, list[float]] = {}
        for _ in range(args.rounds):
            for name, comparer in contenders.items():
                start = time.perf_counter()
                with DistortionCache(None) as cache:
                    found = run(
                        {module: (reference, [source]) for module in names},
                        cache,
                        jobs=args.jobs,
                        comparer=lambda comparer=comparer: comparer,
                    )
                seconds[name].append(time.perf_counter() - start)
                errors[name] = [
                    getattr(found[module, variant], value) for module in names for value in ("error", "power")
                ]
        shutil.rmtree(folder / variant)
        best = {name: min(times) for name, times in seconds.items()}
        difference = apart(errors["torch"], errors["numpy"])
        agree &= difference < 1e-6
        print(
            f"{variant:36}"
            + "".join(f" {nbytes / best[name] / 1e9:6.2f} GB/s {name}" for name in contenders)
            + f"  {best['numpy'] / best['torch']:5.1f} times; errors {difference:.0e} apart",
            flush=True,
        )
    if args.device == "cuda":
        print(f"most GPU memory: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    return agree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(".demo/errors"))
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--formats", nargs="+", help="only these, of tests/support/quantized.py")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="torch on a GPU, or on the CPU to try this out")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the reference, with --device")
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="inputs of up_proj, with --device")
    parser.add_argument("--intermediate", type=int, default=INTERMEDIATE)
    parser.add_argument("--jobs", type=int, help="threads, with --device")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        measure(args.measure)
        return
    from support.quantized import VARIANTS

    variants = args.formats or [variant for variant in VARIANTS if variant != REFERENCE]
    folder = args.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        if args.device is None:
            on_one_core(folder, variants, args.rounds, args.beside)
        elif not on_a_device(folder, variants, args):
            raise SystemExit("errors differ by more than a millionth")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
