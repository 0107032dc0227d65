"""Numbers and sorts routed ids for the groups of a mixed layer, and sums the outputs of experts.

With few tokens these layers are bound by the number of kernel launches, so each kernel here does several steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

__all__ = ["MOST_GROUPS", "Route", "add_up", "numbers_in_groups", "sort", "sum_rows"]


# Their block sizes are packed into one 64-bit argument, eight bits each.
MOST_GROUPS = 8
# Up to _FEW routed ids, all pairs are compared; up to _SOME, one program sorts the ids of a group.
_FEW, _SOME = 128, 4096
_CHUNK = 2048


@dataclass(frozen=True)
class Route:
    """The rows, of ``tokens * top_k``, that a group's kernels work on. All tensors are int32.

    Attributes:
        numbers: each row's expert, as the group numbers it, ``[tokens * top_k]``; -1 for experts of other groups.
        positions: the rows of this group, sorted by ``numbers``. Each expert's are padded with ``tokens * top_k`` to a
            multiple of ``block``.
        experts: the expert of each block.
        count: the length of ``positions`` with padding, ``[1]``; later elements are uninitialized.
        block: rows in a block.
        locks: zeros, with which kernels synchronize their programs.
    """

    numbers: torch.Tensor
    positions: torch.Tensor
    experts: torch.Tensor
    count: torch.Tensor
    block: int
    locks: torch.Tensor


def numbers_in_groups(ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Routed ids as each group numbers them, ``[groups, tokens, top_k]``, int32.

    Args:
        ids: routed ids of the layer, ``[tokens, top_k]``.
        numbers: each expert's number in each group, ``[groups, experts + 1]``, int32: -1 for experts of other groups,
            and in the last column, which the id -1 indexes.
    """
    return numbers[:, ids.long()]


def sort(ids: torch.Tensor, numbers: torch.Tensor, sizes: Sequence[int], blocks: Sequence[int]) -> list[Route]:
    """Numbers and sorts the routed ids of a layer for each of its groups, on a GPU.

    As SGLang's ``moe_align_block_size``, without blocks for the ids of other groups.

    Args:
        ids: routed ids of the layer, ``[tokens, top_k]``, -1 for experts of other ranks.
        numbers: as for :func:`numbers_in_groups`.
        sizes: the number of experts of each group; at most :data:`MOST_GROUPS` groups.
        blocks: rows in a block of each group's kernels, multiples of 8.
    """
    groups, columns = numbers.shape
    size = ids.numel()
    rooms = [
        triton.cdiv(min(size * block, size + min(experts, size) * (block - 1)), block) * block
        for experts, block in zip(sizes, blocks, strict=True)
    ]
    capacity = triton.cdiv(max(rooms), 64) * 64
    words = 4 * _processors(ids.device)
    widths = [capacity, capacity // 8, words, size, 1]
    made = torch.empty(groups * sum(widths), dtype=torch.int32, device=ids.device)
    parts = torch.split(made, [groups * width for width in widths])
    positions, experts, locks, out, counts = (part.view(groups, -1) for part in parts)
    packed = sum(block // 8 << 8 * group for group, block in enumerate(blocks))
    ids = ids.contiguous()
    to = positions, experts, counts, locks, size, capacity, words, packed
    bins = triton.next_power_of_2(max(sizes) + 1)
    if size <= _FEW:
        width = max(16, triton.next_power_of_2(size))
        _sort_few[(groups,)](ids, numbers, out, columns, *to, SIZE=width, num_warps=max(1, min(8, width // 16)))
    elif size <= _SOME:
        free = torch.empty((groups, bins), dtype=torch.int32, device=ids.device)
        width = triton.next_power_of_2(size)
        _sort_some[(groups,)](ids, numbers, out, columns, free, *to, SIZE=width, BINS=bins, num_warps=8)
    else:
        chunks = triton.cdiv(size, _CHUNK)
        found = torch.empty((groups, chunks + 1, bins), dtype=torch.int32, device=ids.device)
        _count[(chunks, groups)](ids, numbers, out, columns, found, size, CHUNK=_CHUNK, BINS=bins)
        _lay_out[(groups,)](found, chunks, *to, BINS=bins, num_warps=8)
        _scatter[(chunks, groups)](out, found, positions, size, capacity, CHUNK=_CHUNK, BINS=bins)
    return [
        Route(out[g], positions[g, : rooms[g]], experts[g, : rooms[g] // blocks[g]], counts[g], blocks[g], locks[g])
        for g in range(groups)
    ]


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit
def _block(packed, group):  # type: ignore[no-untyped-def]
    return ((packed.to(tl.int64) >> (group * 8)) & 255).to(tl.int32) * 8


@triton.jit  # type: ignore[untyped-decorator]
def _clear(words, count, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    for start in range(0, count, WIDTH):
        at = start + tl.arange(0, WIDTH)
        tl.store(words + at, tl.zeros([WIDTH], tl.int32), at < count)


@triton.jit
def _load_numbers(ids, numbers, out, columns, size, group, at):  # type: ignore[no-untyped-def]
    expert = tl.load(ids + at, at < size, other=-1).to(tl.int32)
    number = tl.load(numbers + group * columns + tl.where(expert < 0, columns - 1, expert), at < size, other=-1)
    tl.store(out + group * size + at, number, at < size)
    return number


@triton.jit(do_not_specialize=["packed"])  # type: ignore[untyped-decorator]
def _sort_few(  # type: ignore[no-untyped-def]
    ids, numbers, out, columns, positions, experts, counts, locks, size, capacity, words, packed, SIZE: tl.constexpr
):
    """Sorts by comparing all pairs of ids, in one launch; SGLang takes four."""
    group = tl.program_id(0)
    block = _block(packed, group)
    positions += group * capacity
    experts += group * (capacity // 8)
    at = tl.arange(0, SIZE)
    number = _load_numbers(ids, numbers, out, columns, size, group, at)
    # Loading ids again as a column is cheaper than transposing a vector.
    row = tl.arange(0, SIZE)[:, None]
    other = tl.load(ids + row, row < size, other=-1).to(tl.int32)
    other = tl.load(numbers + group * columns + tl.where(other < 0, columns - 1, other), row < size, other=-1)
    mine = number >= 0
    alike = (other == number[None, :]) & mine[None, :] & (row < size)
    rank = tl.sum((alike & (row < at[None, :])).to(tl.int32), 0)
    blocks = (tl.sum(alike.to(tl.int32), 0) + block - 1) // block
    first = (rank == 0) & mine
    # An expert's blocks come after those of all experts with lower numbers.
    lower = (number[:, None] < number[None, :]) & first[:, None]
    start = tl.sum(tl.where(lower, blocks[:, None], 0), 0)
    total = tl.sum(tl.where(first, blocks, 0), 0)
    tl.store(counts + group, total * block)
    _clear(locks + group * words, words, SIZE)
    for filled in range(0, total * block, SIZE):
        tl.store(positions + filled + at, tl.full([SIZE], 0, tl.int32) + size, filled + at < total * block)
    tl.debug_barrier()
    tl.store(positions + start * block + rank, at, mine)
    tl.store(experts + start + rank // block, number, mine & (rank % block == 0))


@triton.jit  # type: ignore[untyped-decorator]
def _histogram(number, BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Counts of each number, without -1, which goes to the last bin."""
    found = tl.histogram(tl.where(number < 0, BINS - 1, number), BINS)
    return tl.where(tl.arange(0, BINS) == BINS - 1, 0, found)


@triton.jit  # type: ignore[untyped-decorator]
def _fill(  # type: ignore[no-untyped-def]
    found, positions, experts, counts, locks, size, capacity, words, packed, group, BINS: tl.constexpr
):
    """Returns where the positions of each expert start, which has ``found`` rows; writes all else, padding included."""
    block = _block(packed, group)
    bins = tl.arange(0, BINS)
    blocks = (found + block - 1) // block
    start = tl.cumsum(blocks, 0) - blocks
    tl.store(counts + group, tl.sum(blocks, 0) * block)
    for nth in range(tl.max(blocks, 0)):
        tl.store(experts + group * (capacity // 8) + start + nth, bins, nth < blocks)
    left = (blocks * block - found)[:, None]
    first = positions + group * capacity + (start * block + found)[:, None]
    for step in range(0, block, 8):
        more = step + tl.arange(0, 8)[None, :]
        tl.store(first + more, tl.zeros([BINS, 8], tl.int32) + size, more < left)
    _clear(locks + group * words, words, BINS)
    return start * block


@triton.jit(do_not_specialize=["packed"])  # type: ignore[untyped-decorator]
def _sort_some(  # type: ignore[no-untyped-def]
    ids, numbers, out, columns, free, positions, experts, counts, locks, size, capacity, words, packed,
    SIZE: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    free += group * BINS
    at = tl.arange(0, SIZE)
    number = _load_numbers(ids, numbers, out, columns, size, group, at)
    found = _histogram(number, BINS)
    start = _fill(found, positions, experts, counts, locks, size, capacity, words, packed, group, BINS)
    tl.store(free + tl.arange(0, BINS), start)
    tl.debug_barrier()
    place = tl.atomic_add(free + number, 1, number >= 0, sem="relaxed")
    tl.store(positions + group * capacity + place, at, number >= 0)


@triton.jit  # type: ignore[untyped-decorator]
def _count(ids, numbers, out, columns, found, size, CHUNK: tl.constexpr, BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes the number of ids in a chunk that go to each expert of a group."""
    chunk, group = tl.program_id(0), tl.program_id(1)
    number = _load_numbers(ids, numbers, out, columns, size, group, chunk * CHUNK + tl.arange(0, CHUNK))
    row = group * (tl.num_programs(0) + 1) + chunk
    tl.store(found + row * BINS + tl.arange(0, BINS), _histogram(number, BINS))


@triton.jit(do_not_specialize=["packed"])  # type: ignore[untyped-decorator]
def _lay_out(  # type: ignore[no-untyped-def]
    found, chunks, positions, experts, counts, locks, size, capacity, words, packed, BINS: tl.constexpr
):
    """Sums the counts of chunks; the last row of ``found`` gets the start of each expert's positions."""
    group = tl.program_id(0)
    found += group * (chunks + 1) * BINS
    bins = tl.arange(0, BINS)
    row = tl.arange(0, 16)[:, None]
    total = tl.zeros([BINS], tl.int32)
    for chunk in range(0, chunks, 16):
        total += tl.sum(tl.load(found + (chunk + row) * BINS + bins[None, :], chunk + row < chunks, other=0), 0)
    start = _fill(total, positions, experts, counts, locks, size, capacity, words, packed, group, BINS)
    tl.store(found + chunks * BINS + bins, start)


@triton.jit  # type: ignore[untyped-decorator]
def _scatter(out, found, positions, size, capacity, CHUNK: tl.constexpr, BINS: tl.constexpr):  # type: ignore[no-untyped-def]
    chunks, group = tl.num_programs(0), tl.program_id(1)
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    number = tl.load(out + group * size + at, at < size, other=-1)
    free = found + (group * (chunks + 1) + chunks) * BINS
    place = tl.atomic_add(free + number, 1, number >= 0, sem="relaxed")
    tl.store(positions + group * capacity + place, at, number >= 0)


def sum_rows(rows: torch.Tensor, ids: torch.Tensor, factor: float) -> torch.Tensor:
    """``factor`` times the sum over each token's experts, ``[tokens, hidden]`` in the dtype of ``rows``.

    Sums are accumulated in float32.

    Args:
        rows: outputs of the experts, ``[tokens, top_k, hidden]``; uninitialized where the id is -1.
        ids: routed ids of the layer, ``[tokens, top_k]``.
    """
    tokens, top_k, hidden = rows.shape
    out = torch.empty((tokens, hidden), dtype=rows.dtype, device=rows.device)
    warps = 1 if tokens <= _FEW else 4
    _sum[(tokens, triton.cdiv(hidden, 256 * warps))](
        rows, ids.contiguous(), out, hidden, factor, TOP_K=top_k, BLOCK=256 * warps, num_warps=warps
    )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _sum(rows, ids, out, hidden, factor, TOP_K: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Skips rows whose id is -1."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP_K):
        mine = (tl.load(ids + token * TOP_K + k) >= 0) & (at < hidden)
        total += tl.load(rows + (token * TOP_K + k) * hidden + at, mine, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + at, (total * factor).to(out.dtype.element_ty), at < hidden)


def add_up(outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of ``outputs``, rounded once: more than two are accumulated in float32."""
    if len(outputs) <= 2:
        return outputs[0] + outputs[1] if len(outputs) == 2 else outputs[0]
    total = outputs[0].float()
    for output in outputs[1:]:
        total += output
    return total.to(outputs[0].dtype)
