"""Copying speed, side by side in one run: seconds until the command ends and until its data is on the disk, the ratio
of the latter to that of `cp`, peak memory.

Makes a BF16 checkpoint of Llama-3.2-1B's shape (2.5 GB, random values) and has each contender copy it, in turns:

- `cp`;
- `mixprec build` of a recipe that takes everything from it (checksums every tensor and waits for the disk);
- safetensors: `load_file`, then `save_file`;
- mergekit's passthrough merge, where --mergekit names its `mergekit-yaml`.

With --link, for a folder on XFS or Btrfs: `cp`, `cp --reflink=always`, and the build without and with `--link`.

    PYTHONPATH=tests python tests/benchmarks/copy_speed.py [--rounds 5] [--folder .demo/bench] [--mergekit PATH]
    PYTHONPATH=tests python tests/benchmarks/copy_speed.py --link --folder /xfs/bench
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

from support.hollow import hollow_config, hollow_tensors
from support.page_cache import forget

from mixprec_build.storage.header import build_header

MODEL = "Llama-3.2-1B"
LOAD_AND_SAVE = """
import os, sys
from safetensors.torch import load_file, save_file
os.mkdir(sys.argv[2])
save_file(load_file(sys.argv[1]), sys.argv[2] + "/model.safetensors", metadata={"format": "pt"})
"""


def make_source(folder: Path) -> None:
    """A checkpoint with random bytes."""
    import numpy as np

    if (folder / "model.safetensors").exists():
        return
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    tensors = list(hollow_tensors(MODEL, "bf16"))
    (folder / "config.json").write_text(json.dumps(hollow_config(MODEL, "bf16")))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(build_header((t.name, t.dtype, t.shape, t.nbytes) for t in tensors))
        for tensor in tensors:
            file.write(rng.bytes(tensor.nbytes))
        os.fsync(file.fileno())


def contenders(source: Path, out: Path, mergekit: str | None) -> dict[str, list[str]]:
    """Name -> the command that copies ``source`` to ``out``."""
    recipe, merge = source.with_name("copy.yaml"), source.with_name("merge.yaml")
    recipe.write_text(f"model: {source}\n")
    merge.write_text(f"merge_method: passthrough\nmodels: [{{model: {source}}}]\ndtype: bfloat16\n")
    file = source / "model.safetensors"
    commands = {
        "cp": ["cp", "-r", str(source), str(out)],
        "mixprec build": [sys.executable, "-m", "mixprec_build", "build", str(recipe), "-q", "-o", str(out)],
        "safetensors": [sys.executable, "-c", LOAD_AND_SAVE, str(file), str(out)],
    }
    if mergekit:
        commands["mergekit"] = [mergekit, str(merge), str(out), "--no-copy-tokenizer", "--out-shard-size", "5B"]
    return commands


def linking(source: Path, out: Path) -> dict[str, list[str]]:
    """As :func:`contenders`: those that share blocks with ``source``, beside those that copy it.

    `cp` would share them, too, if it was not told otherwise.
    """
    plain = contenders(source, out, None)
    cp, build = plain["cp"], plain["mixprec build"]
    return {
        "cp": [*cp, "--reflink=never"],
        "cp --reflink": [*cp, "--reflink=always"],
        "mixprec build": build,
        "build --link": [*build, "--link"],
    }


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident MiB of a child process."""
    quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
    started = time.monotonic()
    pid = os.posix_spawnp(command[0], command, os.environ, file_actions=quiet)
    _, status, usage = os.wait4(pid, 0)
    seconds = time.monotonic() - started
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)} failed")
    return seconds, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(".demo/bench"))
    parser.add_argument("--mergekit", default=os.environ.get("MERGEKIT"))
    parser.add_argument("--link", action="store_true")
    args = parser.parse_args()
    source, out = args.folder.resolve() / "source", args.folder.resolve() / "out"
    # In a child: a parent's peak memory would be counted as its children's.
    maker = multiprocessing.get_context("spawn").Process(target=make_source, args=(source,))
    maker.start()
    maker.join()
    file = source / "model.safetensors"
    nbytes = file.stat().st_size
    commands = linking(source, out) if args.link else contenders(source, out, args.mergekit)
    print(f"{nbytes / 1e9:.2f} GB, medians of {args.rounds} rounds")
    for cache in ("warm", "cold"):
        ended: dict[str, list[float]] = {name: [] for name in commands}
        synced: dict[str, list[float]] = {name: [] for name in commands}
        peaks: dict[str, float] = dict.fromkeys(commands, 0)
        for _ in range(args.rounds):
            for name, command in commands.items():
                shutil.rmtree(out, ignore_errors=True)
                os.sync()
                if cache == "cold":
                    forget(source)
                else:
                    shutil.copyfile(file, os.devnull)
                taken, peak = timed(command)
                started = time.monotonic()
                os.sync()
                ended[name].append(taken)
                synced[name].append(taken + time.monotonic() - started)
                peaks[name] = max(peak, peaks[name])
        base = statistics.median(synced["cp"])
        for name in commands:
            median = statistics.median(synced[name])
            print(
                f"  {cache}  {name:14} ended {statistics.median(ended[name]):6.2f} s  on the disk {median:6.2f} s  "
                f"{nbytes / median / 1e6:6.0f} MB/s  {median / base:5.2f} x cp  peak {peaks[name]:5.0f} MiB",
                flush=True,
            )
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
