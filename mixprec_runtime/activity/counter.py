"""Counts the tokens of each expert on the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl

__all__ = ["ExpertCounter"]


_ALL_ROWS = 2**31 - 1
_Key = tuple[int, int]


class ExpertCounter:
    """Counts tokens by layer and expert.

    Attributes:
        counts: ``[layers, experts + 1]``, int64: the tokens routed to each expert; in the last column those of a layer.
        rows: ``[1]``, int32: the number of rows of a batch that are tokens; 0 pauses. Kernels read it when they run, so
            it may change between replays of a graph.
    """

    def __init__(self, layers: dict[int, int], device: torch.device, *, gathered: bool = False):
        """Makes a counter of zeros.

        Args:
            layers: number of each MoE layer -> the number of its routed experts.
            device: the device of routed ids.
            gathered: whether batches are joined from several ranks (data-parallel attention). Padding then lies between
                their tokens, and is counted.
        """
        self.layers = dict(sorted(layers.items()))
        self._row_of = {layer: row for row, layer in enumerate(self.layers)}
        self._columns = max(layers.values()) + 1
        self.counts = torch.zeros(len(layers), self._columns, dtype=torch.int64, device=device)
        self.experts = torch.tensor(list(self.layers.values()), dtype=torch.int32, device=device)
        self.rows = torch.full((1,), _ALL_ROWS, dtype=torch.int32, device=device)
        self._rows = _ALL_ROWS
        self._delayed: list[tuple[int, torch.Tensor]] | None = None
        self.recording, self._gathered = True, gathered

    def add(self, layer: int, ids: torch.Tensor) -> None:
        """Counts the routed ids of a layer, ``[rows, k]``; ids of no routed expert are ignored."""
        if self._delayed is not None:
            self._delayed.append((self._row_of[layer], ids))
        else:
            self._add(self._row_of[layer], ids[None])

    @contextmanager
    def together(self) -> Iterator[None]:
        """Delays counting to the end of the context: in one launch, if each layer came once, in order and alike."""
        self._delayed = []
        try:
            yield
            alike = len({ids.shape for _, ids in self._delayed}) == 1
            if alike and [row for row, _ in self._delayed] == list(range(len(self.layers))):
                self._add(0, torch.stack([ids for _, ids in self._delayed]))
            else:
                for row, ids in self._delayed:
                    self._add(row, ids[None])
        finally:
            self._delayed = None

    def _add(self, first: int, ids: torch.Tensor) -> None:
        """Counts ``ids [layers, rows, k]`` in the rows of ``counts`` from ``first`` on."""
        if ids.is_cuda:
            self._launch(first, ids)
            return
        there = torch.arange(ids.shape[1], device=ids.device)[:, None] < self.rows
        for row, chosen in enumerate(ids.long(), start=first):
            valid = there & (chosen >= 0) & (chosen < self.experts[row])
            self.counts[row].index_add_(0, chosen.clamp(0, self._columns - 1).flatten(), valid.flatten().long())
            # Counts each token once, by its first id.
            self.counts[row, -1] += valid[:, 0].sum()

    def _launch(self, first: int, ids: torch.Tensor) -> None:
        layers, rows, k = ids.shape
        if rows:
            _count[(triton.cdiv(rows * k, 256), layers)](
                ids, self.counts, self.experts, self.rows, first, self._columns, rows * k, k, *ids.stride(), BLOCK=256
            )

    def begin(self, rows: int) -> None:
        """Sets the number of tokens of the next batch. Asynchronous."""
        wanted = (_ALL_ROWS if self._gathered else rows) if self.recording else 0
        if wanted != self._rows:
            self.rows.fill_(wanted)
            self._rows = wanted

    def read(self) -> dict[int, tuple[list[int], int]]:
        """Layer -> the counts of its experts, and its tokens. Waits for the device."""
        self._wait()
        found = self.counts.cpu().tolist()
        return {layer: (found[row][: self.layers[layer]], found[row][-1]) for layer, row in self._row_of.items()}

    def reset(self) -> None:
        """Sets all counts to 0. Waits for the device."""
        self._wait()
        self.counts.zero_()

    def _wait(self) -> None:
        if self.counts.is_cuda:
            torch.cuda.synchronize()  # a batch may be under way on another stream


@triton.jit  # type: ignore[untyped-decorator]
def _count(  # type: ignore[no-untyped-def]
    ids, counts, experts, rows, first, columns, size, k, layer_stride, row_stride, column_stride, BLOCK: tl.constexpr
):
    """Grid: ``(blocks of a layer's ids, layers)``."""
    layer = tl.program_id(1)
    number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row, column = number // k, number % k
    there = (number < size) & (row < tl.load(rows))
    at = ids + layer.to(tl.int64) * layer_stride + row.to(tl.int64) * row_stride + column * column_stride
    expert = tl.load(at, there, -1).to(tl.int32)
    chosen = there & (expert >= 0) & (expert < tl.load(experts + first + layer))
    mine = counts + (first + layer) * columns
    tl.atomic_add(mine + expert, tl.full((BLOCK,), 1, tl.int64), chosen, sem="relaxed")
    tokens = tl.sum((chosen & (column == 0)).to(tl.int64), 0)
    tl.atomic_add(mine + columns - 1, tokens, sem="relaxed")
