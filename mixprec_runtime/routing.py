"""Routed ids as the groups of a mixed layer number their experts, and the sum of what the groups return.

Small kernels of few launches: at few tokens these layers are bound by launches, not by what is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl

__all__ = ["Unsummed", "add_up", "align", "aligning", "are_few", "can_sum", "numbers_in_groups", "sum_rows"]

_FEW = 128
_MOST = 4


def numbers_in_groups(ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Routed ids ``[tokens, top_k]`` as each group numbers them, ``[groups, tokens, top_k]``, int32.

    ``numbers [groups, experts + 1]``, int32, has -1 for experts of other groups, and in its last column.
    """
    if not ids.is_cuda:
        return numbers[:, ids.long()]
    groups, columns = numbers.shape
    out = torch.empty((groups, *ids.shape), dtype=torch.int32, device=ids.device)
    grid = (triton.cdiv(ids.numel(), 1024),)
    _number[grid](ids.contiguous(), numbers, out, ids.numel(), columns, GROUPS=groups, BLOCK=1024)
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _number(ids, numbers, out, size, columns, GROUPS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One launch where indexing takes two."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    expert = tl.load(ids + at, there, other=-1)
    column = tl.where(expert < 0, columns - 1, expert)
    for group in tl.static_range(GROUPS):
        tl.store(out + group * size + at, tl.load(numbers + group * columns + column, there), there)


def are_few(ids: torch.Tensor) -> bool:
    """Whether :func:`align` is for these routed ids: up to 128 of them (tokens times top-k), on a GPU."""
    return ids.is_cuda and ids.numel() <= _FEW and not torch.compiler.is_compiling()


def align(
    ids: torch.Tensor, numbers: torch.Tensor, out: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What SGLang's ``moe_align_block_size`` returns for the ids of one group, from those of the layer.

    Args:
        ids: routed ids of the layer, ``[tokens, top_k]``, few.
        numbers: the group's row of ``group_numbers``, ``[experts + 1]``, int32.
        out: filled with the group's ids, ``[tokens, top_k]``, int32.
        block_size: rows of a block of the kernel to come.

    Returns:
        Positions of ``ids``, sorted by expert, each expert's padded to whole blocks with ``ids.numel()``; the expert
        of each block, -1 first; and how many positions there are. All int32.
    """
    size = ids.numel()
    positions = torch.empty(size * block_size, dtype=torch.int32, device=ids.device)
    experts = torch.empty(size, dtype=torch.int32, device=ids.device)
    count = torch.empty(1, dtype=torch.int32, device=ids.device)
    width = max(16, triton.next_power_of_2(size))
    _align[(1,)](
        ids.contiguous(), numbers, out, positions, experts, count, size, numbers.numel(), block_size,
        SIZE=width, num_warps=max(1, min(8, width // 16)),
    )  # fmt: skip
    return positions, experts, count


@triton.jit  # type: ignore[untyped-decorator]
def _align(ids, numbers, out, positions, experts, count, size, columns, block, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compares all pairs of ids, which so few of them allow, where SGLang counts, sums and sorts in four launches."""
    at = tl.arange(0, SIZE)
    there = at < size
    expert = tl.load(ids + at, there, other=-1)
    number = tl.load(numbers + tl.where(expert < 0, columns - 1, expert), there, other=-1)
    tl.store(out + at, number, there)
    # Reading again, one id a row and one a column, is cheaper than to turn a vector around.
    row = tl.arange(0, SIZE)[:, None]
    other = tl.load(ids + row, row < size, other=-1)
    other = tl.load(numbers + tl.where(other < 0, columns - 1, other), row < size, other=-1)
    alike = (other == number[None, :]) & (row < size)
    rank = tl.sum((alike & (row < at[None, :])).to(tl.int32), 0)
    blocks = (tl.sum(alike.to(tl.int32), 0) + block - 1) // block
    first = (rank == 0) & there
    # An expert's first block comes after those of all experts of lower numbers.
    lower = (number[:, None] < number[None, :]) & first[:, None]
    start = tl.sum(tl.where(lower, blocks[:, None], 0), 0)
    total = tl.sum(tl.where(first, blocks, 0), 0)
    tl.store(count, total * block)
    for filled in range(0, total * block, SIZE):
        tl.store(positions + filled + at, tl.full([SIZE], 0, tl.int32) + size, filled + at < total * block)
    tl.debug_barrier()
    tl.store(positions + start * block + rank, at, there)
    tl.store(experts + start + rank // block, number, there & (rank % block == 0))


@contextmanager
def aligning(ids: torch.Tensor, numbers: torch.Tensor, out: torch.Tensor) -> Iterator[None]:
    """While a group runs: SGLang's runners get :func:`align` of the layer's ids, instead of sorting the group's.

    Both look the function up when they run (fused_marlin_moe.py:193, triton_utils/fused_moe.py:418 in 0.5.17).
    """
    from sglang.srt.layers.moe import fused_moe_triton
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    original, sorted_once = fused_moe_triton.moe_align_block_size, False

    def instead(topk_ids: torch.Tensor, block_size: int, num_experts: int, *args: Any, **kwargs: Any) -> Any:
        nonlocal sorted_once
        sorted_once = True
        if topk_ids is out and not any(args) and not any(kwargs.values()):
            return align(ids, numbers, out, block_size)
        out.copy_(numbers_in_groups(ids, numbers[None])[0])
        return original(topk_ids, block_size, num_experts, *args, **kwargs)

    with ExitStack() as stack:
        for module in (fused_moe_triton, fused_moe):
            stack.enter_context(patch.object(module, "moe_align_block_size", instead))
        yield
    if not sorted_once:
        raise RuntimeError("SGLang's experts ran without sorting routed ids: this version of it is not supported")


class Unsummed:
    """While a group runs, what it computed for each routed id is kept instead of summed for each token.

    SGLang's runners look the functions that sum up when they run (fused_marlin_moe.py:396 and
    triton_utils/fused_moe.py:812 in 0.5.17). ``rows`` ``[tokens, top_k, hidden]`` holds whatever memory held where an
    id is not the group's; it stays None where a runner sums in another way.
    """

    def __init__(self) -> None:
        self.rows: torch.Tensor | None = None
        self.factor = 1.0

    def _keep(self, rows: torch.Tensor, out: torch.Tensor, factor: float) -> None:
        self.rows, self.factor = rows, factor

    def __enter__(self) -> Unsummed:
        from sglang.srt.layers.moe.fused_moe_triton import fused_marlin_moe
        from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

        with ExitStack() as stack:
            for module in (fused_marlin_moe, fused_moe):
                for name in ("moe_sum_reduce", "moe_sum_reduce_triton", "moe_sum_reduce_torch_compile"):
                    if hasattr(module, name):
                        stack.enter_context(patch.object(module, name, self._keep))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def sum_rows(groups: Sequence[Unsummed], ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The sums ``[tokens, hidden]`` over each token's experts, in float32, each row read from the group it is of.

    Args:
        groups: one to four of them, with rows.
        ids: routed ids of the layer, ``[tokens, top_k]``.
        numbers: the rows of ``group_numbers`` of these groups, ``[groups, experts + 1]``, int32.
    """
    if len({group.factor for group in groups}) > 1:
        return add_up([sum_rows([group], ids, numbers[n : n + 1]) for n, group in enumerate(groups)])
    rows = [group.rows for group in groups if group.rows is not None]
    tokens, top_k, hidden = rows[0].shape
    out = torch.empty((tokens, hidden), dtype=rows[0].dtype, device=rows[0].device)
    block = 256 if tokens <= _FEW else 512
    _sum[(tokens, triton.cdiv(hidden, block))](
        *rows, *rows[:1] * (_MOST - len(rows)), ids.contiguous(), numbers, out, top_k, hidden, numbers.shape[1],
        groups[0].factor, GROUPS=len(rows), TOP_K=triton.next_power_of_2(top_k), BLOCK=block,
    )  # fmt: skip
    return out


def can_sum(groups: int, ids: torch.Tensor) -> bool:
    """Whether :func:`sum_rows` is for so many groups."""
    return 1 < groups <= _MOST and ids.is_cuda and not torch.compiler.is_compiling()


@triton.jit  # type: ignore[untyped-decorator]
def _sum(  # type: ignore[no-untyped-def]
    a, b, c, d, ids, numbers, out, top_k, hidden, columns, factor,
    GROUPS: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One launch where each group's own sum and the sum of groups take one more than there are groups, and read all
    rows of all groups, most of them for nothing."""
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, TOP_K)
    expert = tl.load(ids + token * top_k + k, k < top_k, other=-1).to(tl.int32)
    column = tl.where(expert < 0, columns - 1, expert)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = (k < top_k)[:, None] & (at < hidden)[None, :]
    row = (token * top_k + k)[:, None] * hidden + at[None, :]
    total = _rows(a, row, there, numbers + column)
    if GROUPS > 1:
        total += _rows(b, row, there, numbers + columns + column)
    if GROUPS > 2:
        total += _rows(c, row, there, numbers + 2 * columns + column)
    if GROUPS > 3:
        total += _rows(d, row, there, numbers + 3 * columns + column)
    tl.store(out + token * hidden + at, (tl.sum(total, 0) * factor).to(out.dtype.element_ty), at < hidden)


@triton.jit
def _rows(rows, at, there, number):  # type: ignore[no-untyped-def]
    mine = there & (tl.load(number) >= 0)[:, None]
    return tl.load(rows + at, mine, other=0.0).to(tl.float32)


def add_up(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum, rounded once: where there are more than two, in float32."""
    if len(outputs) <= 2:
        return outputs[0] + outputs[1] if len(outputs) == 2 else outputs[0]
    if len(outputs) == 3 and outputs[0].is_cuda:
        total = torch.empty_like(outputs[0])
        _add_three[(triton.cdiv(total.numel(), 1024),)](*outputs, total, total.numel(), BLOCK=1024)
        return total
    total = outputs[0].float()
    for output in outputs[1:]:
        total += output
    return total.to(outputs[0].dtype)


@triton.jit  # type: ignore[untyped-decorator]
def _add_three(a, b, c, total, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One launch where torch takes four."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < size
    value = tl.load(a + at, there).to(tl.float32) + tl.load(b + at, there).to(tl.float32)
    value += tl.load(c + at, there).to(tl.float32)
    tl.store(total + at, value.to(total.dtype.element_ty), there)
