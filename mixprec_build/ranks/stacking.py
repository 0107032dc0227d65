"""Stacks the tensors of modules that SGLang runs as one in one parameter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from ..formats.base import Axes
from ..storage.header import TensorInfo
from .pieces import Parameter, Piece

__all__ = ["Cut", "StackedTensors", "stack", "stack_experts"]


@dataclass(frozen=True, slots=True)
class Cut:
    """One module's part on a rank: outputs and inputs ``(start, stop, size with padding)``, None for all of them."""

    name: str
    n: tuple[int, int, int] | None = None
    k: tuple[int, int, int] | None = None


@dataclass(frozen=True, slots=True)
class StackedTensors:
    """One of SGLang's tensors of a layer, and those of the checkpoint that it is made of."""

    name: str
    dtype: str
    axes: Axes
    filler: int
    transposed: bool
    tensors: list[TensorInfo]


def stack(name: str, parts: Sequence[tuple[TensorInfo, Cut]], stacked: StackedTensors) -> Parameter:
    """Stacks parts along their outputs."""
    tensors = [tensor for tensor, _ in parts]
    places, shape = _places([tensor.shape for tensor in tensors], [cut for _, cut in parts], stacked.axes)
    pieces = [Piece(tensors[i], rows, columns, (0, *at)) for i, rows, columns, at in places]
    return Parameter(name, stacked.dtype, shape, tuple(pieces), stacked.filler)


def stack_experts(name: str, experts: Sequence[Sequence[TensorInfo]], cut: Cut, stacked: StackedTensors) -> Parameter:
    """Stacks ``w13`` (gate and up, or up alone) or ``w2`` (down) of all experts in a group, each cut by ``cut``."""
    first = experts[0]
    if stacked.axes == Axes() and prod(first[0].shape) == 1:
        # SGLang's experts have a scale for each weight, but only the last of two scales of one input.
        apart = len(first) if stacked.name != "input_scale" else 1
        values = tuple(
            Piece(tensor, (0, 1), (0, 1), (expert, i, 0))
            for expert, tensors in enumerate(experts)
            for i, tensor in enumerate(tensors[-apart:])
        )
        sizes = (len(experts), 2) if apart == 2 else (len(experts),)
        return Parameter(name, stacked.dtype, sizes, values, experts=True)
    count = 1 if stacked.axes.n is None else len(first)
    pieces: list[Piece] = []
    places: list[_Place] = []
    shapes: list[tuple[int, ...]] = []
    shape: tuple[int, ...] = ()
    for expert, tensors in enumerate(experts):
        tensors = tensors[-count:]
        if shapes != [tensor.shape for tensor in tensors]:  # those of all experts are the same, as a rule
            shapes = [tensor.shape for tensor in tensors]
            places, shape = _places(shapes, [cut] * count, stacked.axes)
        for i, down, across, place in places:
            row, column = place[::-1] if stacked.transposed else place
            pieces.append(Piece(tensors[i], down, across, (expert, row, column), stacked.transposed))
    if stacked.transposed:
        shape = shape[::-1]
    return Parameter(name, stacked.dtype, (len(experts), *shape), tuple(pieces), stacked.filler, experts=True)


class _Place(NamedTuple):
    """The rows and columns that are taken of a part (its index), and where they begin in the stacked tensor."""

    part: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    at: tuple[int, int]


def _places(shapes: Sequence[tuple[int, ...]], cuts: Sequence[Cut], axes: Axes) -> tuple[list[_Place], tuple[int, ...]]:
    """The places of tensors of these ``shapes`` when stacked along their outputs, and the shape of the result."""
    shape = list(shapes[0])
    places, at = [], 0
    for part, (stored, cut) in enumerate(zip(shapes, cuts, strict=True)):
        ranges, room = _ranges(stored, axes, cut)
        place = [0] * len(shape)
        if axes.n is not None and shape:
            place[axes.n.dim] = at
            at += room[axes.n.dim]
        for dim, size in enumerate(room):
            shape[dim] = size
        if all(stop > start for start, stop in ranges):
            rows, row = (ranges[0], place[0]) if ranges else ((0, 1), 0)
            columns, column = (ranges[1], place[1]) if len(ranges) > 1 else ((0, 1), 0)
            inner = prod(stored[2:])
            places.append(_Place(part, rows, (columns[0] * inner, columns[1] * inner), (row, column * inner)))
    if axes.n is not None and shape:
        shape[axes.n.dim] = at
    return places, tuple(shape)


def _ranges(shape: Sequence[int], axes: Axes, cut: Cut) -> tuple[list[tuple[int, int]], list[int]]:
    """For each dimension of a tensor the range that is taken, and the size that it gets."""
    ranges, stored = [(0, size) for size in shape], list(shape)
    for axis, part in ((axes.n, cut.n), (axes.k, cut.k)):
        if axis is not None and part is not None:
            start, stop, room = part
            ranges[axis.dim] = (start // axis.per, min(-(-stop // axis.per), shape[axis.dim]))
            stored[axis.dim] = -(-room // axis.per)
    return ranges, stored
