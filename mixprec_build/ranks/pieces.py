"""A parameter of SGLang's on one rank, as rectangles of stored tensors."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from ..storage.dtypes import DTYPE_BITS
from ..storage.header import TensorInfo

__all__ = ["Band", "Parameter", "Piece"]


class Piece(NamedTuple):
    """A rectangle of a stored tensor, as rows and columns, and where it lies in a parameter.

    A vector is one column. ``at`` is ``(expert, row, column)``, the expert 0 in parameters of no experts. A piece that
    is ``transposed`` lies there with its columns as rows.
    """

    tensor: TensorInfo
    rows: tuple[int, int]
    columns: tuple[int, int]
    at: tuple[int, int, int]
    transposed: bool = False

    @property
    def rectangle(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Its extent down and across the parameter, counted in the stored tensor."""
        return (self.columns, self.rows) if self.transposed else (self.rows, self.columns)

    @property
    def width(self) -> int:
        """Columns of the stored tensor."""
        shape = self.tensor.shape
        return prod(shape[1:]) if len(shape) > 1 else 1


class Band(NamedTuple):
    """The place of a piece in a parameter, whose experts' rows are counted one below the other."""

    piece: Piece
    top: int
    column: int
    down: tuple[int, int]
    """The piece's rows, its columns where it is transposed."""
    across: tuple[int, int]

    @property
    def height(self) -> int:
        return self.down[1] - self.down[0]

    @property
    def width(self) -> int:
        return self.across[1] - self.across[0]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One of SGLang's parameters on one rank; elements that no piece covers are ``filler``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    filler: int = 0
    experts: bool = False
    """Whether the first dimension is the rank's experts."""

    @property
    def blocks(self) -> tuple[int, int, int]:
        """``shape`` as ``(experts, rows, columns)``."""
        experts, rest = (self.shape[0], self.shape[1:]) if self.experts else (1, self.shape)
        return experts, rest[0] if rest else 1, prod(rest[1:])

    def bands(self) -> list[Band]:
        """The pieces from top to bottom."""
        rows = self.blocks[1]
        bands = [Band(piece, piece.at[0] * rows + piece.at[1], piece.at[2], *piece.rectangle) for piece in self.pieces]
        return sorted(bands, key=lambda band: (band.top, band.column))

    @property
    def itemsize(self) -> int:
        return DTYPE_BITS[self.dtype] // 8

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.itemsize
