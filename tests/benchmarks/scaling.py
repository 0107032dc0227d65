"""How `mixprec build` grows: with bytes (x1, x4, x16) and with tensors (x1, x10, x100), and the exponents; and what
reading the largest checkpoint takes that is read at all (1,500,000 tensors in 100 files).

Each checkpoint is BF16 and taken over whole. An exponent of 1 is linear; the fit is over the time that the
smallest checkpoint does not explain (start-up).

    PYTHONPATH=tests python tests/benchmarks/scaling.py [--rounds 3] [--folder .demo/bench]
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shutil
import statistics
import sys
from pathlib import Path

from benchmarks.copy_speed import timed

from mixprec_build.storage.header import build_header

MIB = 1 << 20
BY_BYTES = [(100, 1 * MIB), (400, 1 * MIB), (1600, 1 * MIB)]
LARGEST = 1_500_000
SHARDS = 100
BY_TENSORS = [(1_440, 128), (14_400, 128), (144_000, 128)]


def make(folder: Path, count: int, nbytes: int) -> None:
    """``count`` BF16 tensors of ``nbytes`` bytes each, named as the experts of a MoE are."""
    import numpy as np

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_hidden_layers": 94}))
    names = [
        f"model.layers.{i // 384}.mlp.experts.{i // 3 % 128}.{('gate', 'up', 'down')[i % 3]}_proj.weight"
        for i in range(count)
    ]
    block = np.random.default_rng(0).bytes(nbytes)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(build_header((name, "BF16", (8, nbytes // 16), nbytes) for name in names))
        for _ in names:
            file.write(block)
    (folder / "recipe.yaml").write_text(f"model: {folder}\n")


def measure(folder: Path, count: int, nbytes: int, rounds: int) -> float:
    """Median seconds of a build, printed with its peak memory."""
    # In a child: a parent's peak memory would be counted as its children's.
    maker = multiprocessing.get_context("spawn").Process(target=make, args=(folder / "in", count, nbytes))
    maker.start()
    maker.join()
    command = [sys.executable, "-m", "mixprec_build", "build", str(folder / "in" / "recipe.yaml"), "-q", "-o"]
    seconds, peaks = [], []
    for _ in range(rounds):
        shutil.rmtree(folder / "out", ignore_errors=True)
        taken, peak = timed([*command, str(folder / "out")])
        seconds.append(taken)
        peaks.append(peak)
    median = statistics.median(seconds)
    print(f"  {count:7,} tensors  {count * nbytes / 1e6:8.1f} MB  {median:6.2f} s  peak {max(peaks):4.0f} MiB")
    shutil.rmtree(folder)
    return median


def make_largest(folder: Path) -> None:
    """A checkpoint of headers and an index: its data sections are holes. Experts in GPTQ, four tensors each."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "num_hidden_layers": 140}))
    leaves, each = ("qweight", "qzeros", "scales", "g_idx"), LARGEST // SHARDS
    # As long as it takes for an index of 250 MB, which is about as large as one may be.
    inner = "conditional_generation_model.language_model.text_decoder_of_the_backbone.model"
    names = [
        f"{inner}.layers.{i // 10752}.block_sparse_moe.experts.{i // 12 % 896}"
        f".{('w1', 'w2', 'w3')[i // 4 % 3]}.{leaves[i % 4]}"
        for i in range(LARGEST)
    ]
    weight_map: dict[str, str] = {}
    for shard in range(SHARDS):
        file, own = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors", names[shard * each : (shard + 1) * each]
        header = build_header((name, "I32", (2, 4), 32) for name in own)
        with (folder / file).open("wb") as shard_file:
            shard_file.write(header)
            shard_file.truncate(len(header) + 32 * each)
        weight_map |= dict.fromkeys(own, file)
    index = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2)
    (folder / "model.safetensors.index.json").write_text(index)


def measure_reading(folder: Path) -> None:
    """Prints what reading the largest checkpoint takes."""
    shutil.rmtree(folder, ignore_errors=True)
    maker = multiprocessing.get_context("spawn").Process(target=make_largest, args=(folder,))
    maker.start()
    maker.join()
    index = (folder / "model.safetensors.index.json").stat().st_size
    code = (
        "import sys; from mixprec_build.output.build import no_garbage_collection\n"
        "from mixprec_build.checkpoint.opening import open_checkpoint\n"
        "with no_garbage_collection(): open_checkpoint(sys.argv[1])"
    )
    taken, peak = timed([sys.executable, "-c", code, str(folder)])
    print(f"reading {LARGEST:,} tensors, an index of {index / 1e6:.0f} MB: {taken:.1f} s  peak {peak:.0f} MiB")
    shutil.rmtree(folder)


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Of the growth between the last two, start-up taken off: that of the first, scaled down to nothing."""
    start = seconds[0] - (seconds[1] - seconds[0]) / (sizes[1] / sizes[0] - 1)
    return math.log((seconds[2] - start) / (seconds[1] - start)) / math.log(sizes[2] / sizes[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(".demo/bench"))
    args = parser.parse_args()
    for what, cases in (("bytes", BY_BYTES), ("tensors", BY_TENSORS)):
        print(f"growing {what}")
        seconds = [measure(args.folder.resolve() / "scaling", *case, args.rounds) for case in cases]
        print(f"  exponent {exponent([count for count, _ in cases], seconds):.2f}")
    measure_reading(args.folder.resolve() / "largest")


if __name__ == "__main__":
    main()
