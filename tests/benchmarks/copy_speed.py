"""`mixprec build` against `cp` of the same bytes, side by side: seconds, ratio, peak memory.

Makes a BF16 and an FP8 checkpoint of Llama-3.2-1B's shape with random values, builds a mix of both (2.2 GB) and
copies the files of that mix with `cp`, in turns. `cp` leaves its data in the page cache; `cp + fsync` waits
for the disk, as `mixprec build` always does.

    python tests/benchmarks/copy_speed.py [--rounds 5] [--folder .demo/bench]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from hollow import hollow_config, hollow_tensors

from mixprec_build.header import build_header

MODEL = "Llama-3.2-1B"
RECIPE = """\
model: bf16
sources: {bf16: bf16, fp8: fp8_channel}
weights:
  model.layers.*.self_attn.*: fp8
"""


def make_sources(folder: Path) -> None:
    """Two checkpoints with random bytes, and norms of ones, which must agree."""
    rng = np.random.default_rng(0)
    for variant in ("bf16", "fp8_channel"):
        target = folder / variant
        if target.exists():
            continue
        target.mkdir(parents=True)
        tensors = list(hollow_tensors(MODEL, variant))
        (target / "config.json").write_text(json.dumps(hollow_config(MODEL, variant)))
        with (target / "model.safetensors").open("wb") as file:
            file.write(build_header((t.name, t.dtype, t.shape, t.nbytes) for t in tensors))
            for tensor in tensors:
                one = b"\x80\x3f" * (tensor.nbytes // 2) if "norm" in tensor.name else rng.bytes(tensor.nbytes)
                file.write(one)
            os.fsync(file.fileno())
    (folder / "recipe.yaml").write_text(RECIPE)


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident MiB of a child process."""
    started = time.monotonic()
    pid = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.monotonic() - started
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} failed")
    return seconds, usage.ru_maxrss / 1024


def evict(files: Iterable[Path]) -> None:
    """Drops files from the page cache."""
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(".demo/bench"))
    args = parser.parse_args()
    folder = args.folder.resolve()
    make_sources(folder)
    out, copy, reference = folder / "out", folder / "copy", folder / "reference"
    build = [sys.executable, "-m", "mixprec_build.cli", "build", str(folder / "recipe.yaml"), "--quiet", "-o"]
    shutil.rmtree(reference, ignore_errors=True)
    timed([*build, str(reference)])
    sources = [p for name in ("bf16", "fp8_channel") for p in (folder / name).glob("*.safetensors")]
    written = list(reference.glob("*.safetensors"))
    nbytes = sum(p.stat().st_size for p in written)

    def copied(sync: str) -> Callable[[], tuple[float, float]]:
        files = " ".join(str(p) for p in written)
        return lambda: timed(["sh", "-c", f"mkdir {copy} && cp {files} {copy} {sync}"])

    contenders = {
        "cp": (written, copied("")),
        "cp + fsync": (written, copied(f"&& sync {copy}/* {copy}")),
        "mixprec build": (sources, lambda: timed([*build, str(out)])),
    }
    print(f"{nbytes / 2**30:.2f} GiB, {args.rounds} rounds, medians")
    for cache in ("warm", "cold"):
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        peaks: dict[str, float] = {}
        for _ in range(args.rounds):
            for name, (inputs, run) in contenders.items():
                for leftover in (out, copy):
                    shutil.rmtree(leftover, ignore_errors=True)
                os.sync()
                if cache == "cold":
                    evict(inputs)
                taken, peak = run()
                seconds[name].append(taken)
                peaks[name] = max(peak, peaks.get(name, 0))
        base = statistics.median(seconds["cp"])
        for name, values in seconds.items():
            median = statistics.median(values)
            print(
                f"  {cache}  {name:14} {median:6.2f} s  {nbytes / median / 1e6:7.0f} MB/s  "
                f"{median / base:5.2f} x cp  peak {peaks[name]:4.0f} MiB"
            )
    for leftover in (out, copy, reference):
        shutil.rmtree(leftover, ignore_errors=True)


if __name__ == "__main__":
    main()
