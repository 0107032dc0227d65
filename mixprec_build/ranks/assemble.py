"""A parameter's bytes, put together from rectangles of stored tensors as they are read."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import xxhash

from ..errors import SourceError
from ..storage.disk import open_regular, pread_into, pwrite_all
from ..storage.dtypes import numpy_dtype
from ..storage.header import TensorInfo
from ..storage.threads import Progress
from .pieces import Band, Parameter, Piece

__all__ = ["BUFFER", "FileReader", "Reader", "contents", "fill", "whole", "write_parameters"]

BUFFER = 4 << 20
_MOST_OPEN = 64  # of the files that a process may have open, 1,024 as a rule

Array = np.ndarray[Any, Any]


def write_parameters(
    fd: int, header: bytes, parameters: Sequence[Parameter], reader: Reader, progress: Progress | None
) -> Iterator[tuple[Parameter, str]]:
    """Writes a new file and closes it; yields each parameter with its checksum as it is written. Synced at the end."""
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


# What is written, in pieces


def _new(nbytes: int) -> Array:
    return np.empty(nbytes, np.uint8)


def whole(tensor: TensorInfo) -> Parameter:
    """A parameter that is one tensor as it is stored."""
    rows, width = (tensor.shape[0] if tensor.shape else 1), prod(tensor.shape[1:])
    pieces = (Piece(tensor, (0, rows), (0, width), (0, 0, 0)),) if tensor.nbytes else ()
    return Parameter(tensor.name, tensor.dtype, tensor.shape, pieces)


def contents(
    parameter: Parameter, reader: Reader, *, most: int = BUFFER, allocate: Callable[[int], Array] = _new
) -> Iterator[memoryview]:
    """A parameter's bytes in order, ``most`` at a time, or what one row takes where that is more.

    ``allocate`` gives so many bytes of memory, once for each chunk, and after the chunk before has been dealt with.
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


def fill(chunk: Array, start: int, bands: Iterable[Band], reader: Reader) -> None:
    """Writes into ``chunk``, the rows of a parameter from ``start`` on, what ``bands`` have there."""
    for piece, top, column, down, across in bands:
        # The rows of this chunk that the piece has, counted where it comes from.
        first = max(down[0], down[0] + start - top)
        last = min(down[1], down[0] + start + len(chunk) - top)
        if first < last:
            to = top + first - down[0] - start
            into = chunk[to : to + last - first, column : column + across[1] - across[0]]
            if piece.transposed or across != (0, piece.width) or not into.flags.c_contiguous:
                into[...] = reader.read(piece, first, last)
            else:
                reader.rows(piece, first, into)


def _rows_at_once(width: int, element: np.dtype[Any], most: int = BUFFER) -> int:
    return max(1, most // (max(1, width) * element.itemsize))


class Reader(ABC):
    """Rectangles of tensors. May be shared by threads."""

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def rows(self, piece: Piece, first: int, into: Array) -> None:
        """Fills ``into``, which lies in memory row after row, with whole rows of the piece's tensor from ``first`` on.

        Raises:
            SourceError: they cannot be read.
        """

    def read(self, piece: Piece, first: int, last: int) -> Array:
        """Rows ``first`` to ``last`` of the piece, or columns where it is transposed, as unsigned integers."""
        element = np.dtype(f"u{numpy_dtype(piece.tensor.dtype).itemsize}")
        if not piece.transposed:
            data = np.empty((last - first, piece.width), element)
            self.rows(piece, first, data)
            return data[:, slice(*piece.columns)]
        top, bottom = piece.rows
        out = np.empty((last - first, bottom - top), element)
        step = _rows_at_once(piece.width, element)
        for at in range(top, bottom, step):
            data = np.empty((min(step, bottom - at), piece.width), element)
            self.rows(piece, at, data)
            out[:, at - top : at - top + len(data)] = data[:, first:last].T
        return out


@dataclass(slots=True)
class _OpenFile:
    fd: int
    readers: int = 0
    """Threads that read from it now."""


class FileReader(Reader):
    """From safetensors files; ``path_of`` says where a tensor's ``file`` is. Those that were read last stay open."""

    def __init__(self, path_of: Callable[[str], Path | None]):
        self._path_of = path_of
        self._open: dict[str, _OpenFile] = {}
        """The one that was asked for last is the last."""
        self._lock = Lock()

    def close(self) -> None:
        for opened in self._open.values():
            os.close(opened.fd)
        self._open.clear()

    def rows(self, piece: Piece, first: int, into: Array) -> None:
        tensor, window = piece.tensor, into.view(np.uint8).data.cast("B")
        with self._reading(tensor.file) as fd:
            try:
                got = pread_into(fd, window, tensor.start + first * piece.width * into.itemsize)
            except OSError as error:
                raise SourceError(
                    f"cannot read {tensor.name}: {error.strerror}", path=self._path_of(tensor.file)
                ) from error
        if got < len(window):
            raise SourceError(f"ends inside {tensor.name}", path=self._path_of(tensor.file))

    @contextmanager
    def _reading(self, file: str) -> Iterator[int]:
        """A file's descriptor, which is not closed meanwhile."""
        with self._lock:
            opened = self._open.pop(file, None)
            if opened is None:
                self._make_room()
                path = self._path_of(file)
                if path is None:
                    raise SourceError(f"{file} is not on this machine")
                opened = _OpenFile(open_regular(path))
            self._open[file] = opened
            opened.readers += 1
        try:
            yield opened.fd
        finally:
            with self._lock:
                opened.readers -= 1

    def _make_room(self) -> None:
        idle = [file for file, opened in self._open.items() if not opened.readers]
        for file in idle[: max(0, len(self._open) - _MOST_OPEN + 1)]:
            os.close(self._open.pop(file).fd)
