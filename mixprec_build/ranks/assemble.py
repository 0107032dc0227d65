"""Assembles a parameter's bytes from rectangles of stored tensors."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
import xxhash

from ..storage.disk import pwrite_all
from ..storage.dtypes import numpy_dtype
from ..storage.header import TensorInfo
from ..storage.reader import BUFFER, TensorReader
from ..storage.threads import Progress
from .pieces import Band, Parameter, Piece

__all__ = ["as_parameter", "contents", "fill", "write_parameters"]

Array = np.ndarray[Any, Any]


def write_parameters(
    fd: int, header: bytes, parameters: Sequence[Parameter], reader: TensorReader, progress: Progress | None
) -> Iterator[tuple[Parameter, str]]:
    """Writes, syncs and closes a new file; yields each parameter with its checksum after it is written."""
    try:
        os.posix_fallocate(fd, 0, len(header) + sum(p.nbytes for p in parameters))
        pwrite_all(fd, memoryview(header), 0)
        at = len(header)
        for parameter in parameters:
            digest = xxhash.xxh3_128()
            for chunk in contents(parameter, reader):
                digest.update(chunk)
                pwrite_all(fd, chunk, at)
                at += len(chunk)
                if progress is not None:
                    progress(len(chunk))
            yield parameter, digest.hexdigest()
        os.fsync(fd)
    finally:
        os.close(fd)


def _new(nbytes: int) -> Array:
    return np.empty(nbytes, np.uint8)


def as_parameter(tensor: TensorInfo) -> Parameter:
    """A parameter that is one tensor as it is stored."""
    rows, width = (tensor.shape[0] if tensor.shape else 1), prod(tensor.shape[1:])
    pieces = (Piece(tensor, (0, rows), (0, width), (0, 0, 0)),) if tensor.nbytes else ()
    return Parameter(tensor.name, tensor.dtype, tensor.shape, pieces)


def contents(
    parameter: Parameter, reader: TensorReader, *, most: int = BUFFER, allocate: Callable[[int], Array] = _new
) -> Iterator[memoryview]:
    """Yields a parameter's bytes in order, at most ``most`` at a time, or one row where that is larger.

    ``allocate`` returns so many bytes of memory for a chunk; it is called after the chunk before has been used.
    """
    blocks, rows, columns = parameter.blocks
    if not columns:
        return
    element = np.dtype(f"u{parameter.itemsize}")
    bands = parameter.bands()
    tops = [band.top for band in bands]
    tallest = max((band.height for band in bands), default=0)
    covered = sum(band.height * band.width for band in bands) == blocks * rows * columns
    filler = np.array(parameter.filler).astype(numpy_dtype(parameter.dtype)).view(element)
    widest = max([columns, *(band.piece.width for band in bands if not band.piece.transposed)])
    step = _rows_at_once(widest, element, most)
    for start in range(0, blocks * rows, step):
        end = min(start + step, blocks * rows)
        chunk = allocate((end - start) * columns * element.itemsize).view(element).reshape(end - start, columns)
        if not covered:
            chunk[...] = filler
        fill(chunk, start, bands[bisect_right(tops, start - tallest) : bisect_left(tops, end)], reader)
        yield chunk.view(np.uint8).data.cast("B")


def fill(chunk: Array, start: int, bands: Iterable[Band], reader: TensorReader) -> None:
    """Fills ``chunk``, the rows of a parameter from ``start`` on, with the parts of ``bands`` in them."""
    for piece, top, column, down, across in bands:
        # The piece's rows in this chunk, counted in the stored tensor.
        first = max(down[0], down[0] + start - top)
        last = min(down[1], down[0] + start + len(chunk) - top)
        if first < last:
            to = top + first - down[0] - start
            into = chunk[to : to + last - first, column : column + across[1] - across[0]]
            if piece.transposed or across != (0, piece.width) or not into.flags.c_contiguous:
                into[...] = _rectangle(piece, first, last, reader)
            else:
                _read_rows(piece, first, into, reader)


def _rows_at_once(width: int, element: np.dtype[Any], most: int = BUFFER) -> int:
    return max(1, most // (max(1, width) * element.itemsize))


def _rectangle(piece: Piece, first: int, last: int, reader: TensorReader) -> Array:
    """Rows ``first`` to ``last`` of a piece, or columns where it is transposed, as unsigned integers."""
    element = np.dtype(f"u{numpy_dtype(piece.tensor.dtype).itemsize}")
    if not piece.transposed:
        data = np.empty((last - first, piece.width), element)
        _read_rows(piece, first, data, reader)
        return data[:, slice(*piece.columns)]
    top, bottom = piece.rows
    out = np.empty((last - first, bottom - top), element)
    step = _rows_at_once(piece.width, element)
    for at in range(top, bottom, step):
        data = np.empty((min(step, bottom - at), piece.width), element)
        _read_rows(piece, at, data, reader)
        out[:, at - top : at - top + len(data)] = data[:, first:last].T
    return out


def _read_rows(piece: Piece, first: int, into: Array, reader: TensorReader) -> None:
    """Fills ``into``, which is contiguous, with complete rows of a piece's tensor from ``first`` on."""
    reader.read_into(piece.tensor, into.view(np.uint8).data.cast("B"), first * piece.width * into.itemsize)
