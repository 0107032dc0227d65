"""What a layer with experts in several formats costs, beside native layers of one format.

    PYTHONPATH=tests python tests/benchmarks/mixed_experts.py [30b] [235b] [--with nvfp4]

Microseconds of one layer in CUDA-graph replay, median of 15, and for each mix the ratio to the mean of the native
layers weighted by how many experts the mix has of each. ``--with KIND`` measures only the mixes with experts of that
kind, and the native layers of their parts.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from support.sglang import layers

SHAPES = {"30b": (2048, 768), "235b": (4096, 1536)}
MIXES = [
    [("fp8_block", 16), ("gptq_int4", 112)],
    [("fp8_block", 64), ("gptq_int4", 64)],
    [("bf16", 4), ("fp8_block", 28), ("gptq_int4", 96)],
    # Gate and up in the one format, down in the other.
    [("fp8_block/gptq_int4", 128)],
    [("gptq_int4/fp8_block", 112), ("fp8_block", 16)],
    [("fp8_block", 16), ("nvfp4", 112)],
    [("bf16", 4), ("fp8_block", 28), ("nvfp4", 96)],
    # Groups that share no buffers
    [("fp8_block", 16), ("w4afp8", 112)],
]
TOKENS = (1, 8, 32, 128, 512, 4096)
EXPERTS, TOP_K, REPEAT = 128, 8, 4


def measure(function: Callable[[], object]) -> float:
    """Microseconds of one call."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEAT):
            function()
    graph.replay()
    times = []
    for _ in range(15):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / REPEAT * 1e3)
    return statistics.median(times)


def kinds_in(mixes: Sequence[Sequence[tuple[str, int]]]) -> list[str]:
    """The formats of the mixes' parts, each once."""
    return list(dict.fromkeys(kind for mix in mixes for name, _ in mix for kind in name.split("/")))


def row(groups: list[tuple[str, int]], hidden: int, intermediate: int) -> list[float]:
    layer, _ = layers.make_layer(groups, hidden=hidden, intermediate=intermediate)
    generator = torch.Generator("cuda").manual_seed(1)
    times = []
    for tokens in TOKENS:
        x = torch.randn(tokens, hidden, generator=generator, device="cuda").bfloat16()
        scores = torch.randn(tokens, EXPERTS, generator=generator, device="cuda").softmax(-1)
        weights, ids = scores.topk(TOP_K)
        weights, ids = weights / weights.sum(-1, keepdim=True), ids.int()
        times.append(measure(lambda x=x, ids=ids, weights=weights: layers.run(layer, x, ids, weights)))
    return times


def parts(native: Mapping[str, Sequence[float]], kind: str, at: int) -> float:
    """What a native layer takes; gate and up are two thirds of an expert."""
    up, _, down = kind.partition("/")
    return (2 * native[up][at] + native[down or up][at]) / 3


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("shapes", nargs="*", choices=[*SHAPES, []], metavar="30b|235b")
    parser.add_argument("--with", dest="kind", choices=kinds_in(MIXES))
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    args = arguments()
    mixes = [mix for mix in MIXES if args.kind is None or args.kind in kinds_in([mix])]
    layers.start_sglang()
    for shape in args.shapes or SHAPES:
        hidden, intermediate = SHAPES[shape]
        print(f"\n{shape}: hidden {hidden}, intermediate {intermediate}, {EXPERTS} experts, top-{TOP_K}")
        print(f"{'tokens':40s}" + "".join(f"{tokens:9d}" for tokens in TOKENS))
        native = {}
        for kind in kinds_in([[("bf16", EXPERTS)], *mixes]):
            native[kind] = row([(kind, EXPERTS)], hidden, intermediate)
            print(f"{kind:40s}" + "".join(f"{time:9.1f}" for time in native[kind]), flush=True)
        for mix in mixes:
            times = row(mix, hidden, intermediate)
            due = [sum(parts(native, kind, i) * count for kind, count in mix) / EXPERTS for i in range(len(TOKENS))]
            name = " + ".join(f"{kind} {count}" for kind, count in mix)
            print(f"{name:40s}" + "".join(f"{time:9.1f}" for time in times))
            ratios = "".join(f"{time / each:9.2f}" for time, each in zip(times, due, strict=True))
            print(f"{'  ratio to its parts':40s}" + ratios, flush=True)


if __name__ == "__main__":
    main()
