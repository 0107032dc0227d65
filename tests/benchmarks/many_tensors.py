"""What commands take on sources with as many tensors as Kimi-K2 has: 140,000 in FP8, and twice 278,000 in GPTQ-Int4.

Their experts are tiny, so that what is measured is the work for each tensor, and their weights are holes. Prints CPU
seconds and peak memory of each command, in turns, and the same with half and a quarter of the layers, with the power of
the number of tensors that the seconds grow with from a quarter to all of them:

    PYTHONPATH=tests python tests/benchmarks/many_tensors.py [--rounds 3] [--folder .demo/bench] [--layers 60]
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mixprec_build.storage.header import build_header

LAYERS, EXPERTS = 60, 384
SOURCES: dict[str, tuple[str, dict[str, int]]] = {
    "fp8": ("fp8_block", {}),
    "int4": ("gptq_int4", {"group_size": 128}),
    "fine": ("gptq_int4", {"group_size": 64}),
}
RECIPE = """\
model: {0}/fp8
sources: {{fp8: {0}/fp8, int4: {0}/int4, fine: {0}/fine}}
default: fp8
weights:
  model.layers.*.mlp.experts.*: int4
  model.layers.*.mlp.experts.{{200..383}}.*: fine
  model.layers.*.mlp.experts.{{0..15}}.*: fp8
  model.layers.{{0..3}}.mlp.experts.{{16..63}}.*: fp8
"""


def make(folder: Path, layers: int) -> None:
    """The three sources and their recipe in ``folder``."""
    from support.write import QWEN3_MOE, Tiny, write_tiny

    # With four heads for keys and values, two ranks have complete blocks of FP8.
    model = Tiny(QWEN3_MOE.family, layers=1, intermediate=128, experts=1, kv_heads=4)
    for name, (variant, options) in SOURCES.items():

        def enlarge(tensors: dict[str, Any], config: dict[str, Any]) -> None:
            config |= {"num_hidden_layers": layers, "num_experts": EXPERTS}
            gate = tensors["model.layers.0.mlp.gate.weight"]
            tensors["model.layers.0.mlp.gate.weight"] = gate.repeat(EXPERTS, axis=0)

        write_tiny(folder / name, model, variant, edit=enlarge, **options)
        _repeat(folder / name, layers)
    (folder / "recipe.yaml").write_text(RECIPE.format(folder))


def _repeat(folder: Path, layers: int) -> None:
    """Makes a file for each layer of a checkpoint of one layer with one expert, and an index."""
    from safetensors import deserialize

    whole = folder / "model.safetensors"
    one = dict(deserialize(whole.read_bytes()))
    whole.unlink()
    weight_map: dict[str, str] = {}
    for layer in range(layers):
        file = f"model-{layer + 1:05}-of-{layers:05}.safetensors"
        tensors = sorted(_of_layer(one, layer), key=lambda tensor: (-len(tensor[1]["data"]) % 8, tensor[0]))
        with (folder / file).open("wb") as out:
            out.write(build_header((n, t["dtype"], tuple(t["shape"]), len(t["data"])) for n, t in tensors))
            for name, tensor in tensors:
                data = tensor["data"]
                # Without scales, Int4 is zero as well, and the sources are one model.
                empty = len(data) > 4096 or name.endswith(".scales")
                out.seek(len(data), os.SEEK_CUR) if empty else out.write(data)
            out.truncate(out.tell())
        weight_map |= dict.fromkeys((name for name, _ in tensors), file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _of_layer(one: dict[str, dict[str, Any]], layer: int) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, tensor in one.items():
        own = name.replace("layers.0.", f"layers.{layer}.")
        if "experts.0." in name:
            yield from ((own.replace("experts.0.", f"experts.{expert}."), tensor) for expert in range(EXPERTS))
        elif own != name or layer == 0:
            yield own, tensor


def measure(command: list[str]) -> tuple[float, float]:
    """CPU seconds and peak resident MiB of a command of mixprec. `doctor` may find that SGLang is not installed."""
    quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
    whole = [sys.executable, "-m", "mixprec_build", *command]
    pid = os.posix_spawn(whole[0], whole, os.environ, file_actions=quiet)
    _, status, usage = os.wait4(pid, 0)
    if os.waitstatus_to_exitcode(status) and command[0] != "doctor":
        raise SystemExit(f"{' '.join(whole)} failed")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def run(folder: Path, layers: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Median CPU seconds and greatest peak MiB of each command for sources of ``layers``, made in ``folder``."""
    shutil.rmtree(folder, ignore_errors=True)
    # In a child: a parent's peak memory would be counted as its children's.
    maker = multiprocessing.get_context("spawn").Process(target=make, args=(folder, layers))
    maker.start()
    maker.join()
    out = folder / "out"
    commands = {
        **{f"inspect {name}": ["inspect", str(folder / name)] for name in SOURCES},
        "plan": ["plan", str(folder / "recipe.yaml")],
        "build": ["build", str(folder / "recipe.yaml"), "-q", "-o", str(out)],
        "inspect the mix": ["inspect", str(out)],
        "verify": ["verify", str(out)],
        "doctor": ["doctor", str(out)],
        "split for two ranks": ["split", str(out), "--tp", "2", "--ep", "2", "-q"],
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        for name, command in commands.items():
            taken[name].append(measure(command))
    shutil.rmtree(folder)
    medians = {}
    for name, found in taken.items():
        seconds, peaks = zip(*found, strict=True)
        medians[name] = statistics.median(seconds), max(peaks)
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(".demo/bench"))
    parser.add_argument("--layers", type=int, default=LAYERS)
    args = parser.parse_args()
    shares = {share: run(args.folder.resolve() / "many", args.layers // share, args.rounds) for share in (1, 2, 4)}
    print(f"{'':22}{'seconds of CPU and peak MiB: all, half, a quarter':>49}   growth")
    for name in shares[1]:
        cells = [f"{seconds:8.1f} {peak:6.0f}" for seconds, peak in (found[name] for found in shares.values())]
        power = math.log(shares[1][name][0] / shares[4][name][0], 4)
        print(f"  {name:20}{''.join(cells):>49}   {power:6.2f}")


if __name__ == "__main__":
    main()
