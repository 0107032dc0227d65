"""Marlin's GEMM of experts with zero points: answers that differ on one input, and time, by the length of groups.

Groups of 128 inputs are stock SGLang's; groups of 64, with the same scales and zero points twice, are what a mixprec
checkpoint runs with (``zero_points_by_tiles`` of ``mixprec_runtime/formats/marlin.py`` says why). Sorted ids are the
same in each launch, and nothing is added atomically, so that each answer should be the first one.

``python tests/benchmarks/zero_points.py`` on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from sgl_kernel.scalar_type import scalar_types
from sglang.kernels.ops.moe.moe_wna16_marlin import moe_wna16_marlin_gemm
from sglang.srt.layers.moe.fused_moe_triton import moe_align_block_size

SHAPES = {"small": (32, 1024, 512), "30b": (128, 2048, 768), "235b": (128, 4096, 1536)}
"""Experts, hidden size, intermediate size."""
TOKENS = (1, 8, 24, 64, 256, 1024)
TOP_K, LAUNCHES, GROUP = 8, 400, 128


Launch = Callable[[], torch.Tensor]


def product(shape: tuple[int, int, int], tokens: int, dtype: torch.dtype) -> Callable[[int], Launch]:
    """Makes random experts; returns a function of how often each group is repeated, whose result launches the GEMM."""
    experts, hidden, intermediate = shape
    rows, words = 2 * intermediate, torch.iinfo(torch.int32)

    def random_words(*size: int) -> torch.Tensor:
        return torch.randint(words.min, words.max, size, dtype=torch.int32, device="cuda")

    x = torch.randn(tokens, hidden, device="cuda").to(dtype)
    weight = random_words(experts, hidden // 16, rows * 2)
    scales = (torch.rand(experts, hidden // GROUP, rows, device="cuda") * 0.01 + 0.001).to(dtype)
    zero_points = random_words(experts, hidden // GROUP, rows // 8)
    routed, ids = torch.randn(tokens, experts, device="cuda").softmax(-1).topk(TOP_K)
    block = next((size for size in (8, 16, 32, 48) if tokens * TOP_K / experts / size < 0.9), 64)
    sorted_ids, block_experts, count = moe_align_block_size(ids.int(), block, experts)
    locks = torch.zeros(4 * torch.cuda.get_device_properties(0).multi_processor_count, dtype=torch.int, device="cuda")

    def with_groups(times: int) -> Launch:
        out = torch.empty(tokens * TOP_K, rows, device="cuda", dtype=dtype)
        repeated = [tensor.repeat_interleave(times, dim=1) for tensor in (scales, zero_points)]

        def launch() -> torch.Tensor:
            answer: torch.Tensor = moe_wna16_marlin_gemm(
                x, out, weight, None, repeated[0], None, repeated[1], None, None,
                locks, sorted_ids, block_experts, count, routed,
                moe_block_size=block, top_k=TOP_K, mul_topk_weights=False, is_ep=False, b_q_type=scalar_types.uint4,
                size_m=tokens, size_n=rows, size_k=hidden, is_k_full=True, use_atomic_add=False,
                use_fp32_reduce=True, is_zp_float=False,
            )  # fmt: skip
            return answer

        return launch

    return with_groups


def differing(launch: Launch) -> tuple[int, float]:
    """How many launches differ from the most common answer of three, and by how much of its norm at most."""
    first = [launch().clone() for _ in range(3)]
    due = first[0] if torch.equal(first[0], first[1]) else first[2]
    count = torch.zeros((), dtype=torch.int64, device="cuda")
    worst = torch.zeros((), dtype=torch.float64, device="cuda")
    for _ in range(LAUNCHES):
        answer = launch()
        count += (answer != due).any()
        worst = torch.maximum(worst, (answer.double() - due.double()).norm() / due.double().norm())
    return int(count), float(worst)


def microseconds(launch: Launch) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(10):
        launch()
    start.record()
    for _ in range(100):
        launch()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 10


def main() -> None:
    torch.manual_seed(0)
    print(f"of {LAUNCHES} launches; worst difference as a share of the output's norm; time of one launch")
    for name, shape in SHAPES.items():
        for tokens in TOKENS:
            for dtype in (torch.bfloat16, torch.float16):
                with_groups = product(shape, tokens, dtype)
                print(f"{name:6s}{tokens:5d} tokens {str(dtype)[6:]:9s}", end="")
                for times in (1, 2):
                    launch = with_groups(times)
                    count, worst = differing(launch)
                    took = microseconds(launch)
                    print(f" | groups of {GROUP // times}: {count:3d} differ, {worst:.1e}, {took:6.1f} us", end="")
                print(flush=True)


if __name__ == "__main__":
    main()
