"""Reads the merged tensors of a compiled checkpoint: from merged files or, if these were dropped, from files of ranks.

A checkpoint of the layout ``presplit`` has every byte of its merged files in the files of its ranks or in
``presplit/rest``: their headers, and tensors that no rank needs (a tied ``lm_head``, one of two scales of one input).
So the merged files can be restored as they were.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from ..checkpoint.checkpoint import REST, Checkpoint
from ..checkpoint.degree import Degree, parse_folder
from ..checkpoint.manifest import Manifest, RankEntry, checksum_of
from ..checkpoint.opening import open_checkpoint, open_storage
from ..checkpoint.typed import Source
from ..errors import SourceError, SplitError, VerifyError
from ..formats.base import Format
from ..storage.folder import LocalFolder
from ..storage.header import MAX_HEADER_BYTES, TensorInfo, header_length
from ..storage.reader import FileReader, TensorReader
from .assemble import as_parameter, contents, fill
from .files import damage, open_rank, read_index, read_rank
from .pieces import Parameter, Piece
from .splitter import Splitter

__all__ = [
    "CutFolder",
    "Rectangle",
    "header_tensor",
    "in_no_rank",
    "open_compiled",
    "smallest_complete_degree",
    "splitter_of",
]


def splitter_of(
    source: Source, degree: Degree, *, replicated_head: bool = False, places: Mapping[int, Sequence[int]] | None = None
) -> Splitter:
    """The splitter of a checkpoint for a degree, with the :attr:`.Splitter.places` of experts.

    Raises:
        SplitError: it cannot be cut.
    """
    modules: dict[str, tuple[Format, Any]] = {
        name: (source.format_of(name), module) for name, module in source.checkpoint.modules.items()
    }
    return Splitter(modules, source.facts, degree, replicated_head, places=places or {})


def open_compiled(folder: Path, manifest: Manifest, unread: dict[str, str] | None = None) -> Checkpoint:
    """Opens a compiled checkpoint by its headers, even if its merged files were dropped.

    ``unread`` is as in :func:`.open_checkpoint`.

    Raises:
        VerifyError: what was kept of the merged files differs from the manifest.
        SourceError: a file cannot be opened.
    """
    if manifest.rest is None:
        return open_checkpoint(str(folder), unread=unread)
    return CutFolder(folder, manifest, manifest.rest).checkpoint


def smallest_complete_degree(folder: Path, names: Iterable[str]) -> Degree:
    """The degree that merged files can be put together from: of those with all ranks, the one with the fewest.

    ``names`` are ranks' folders.

    Raises:
        SplitError: there is none.
    """
    ranks: dict[Degree, set[int]] = {}
    for degree, rank in filter(None, map(parse_folder, names)):
        ranks.setdefault(degree, set()).add(rank)
    found = [degree for degree, there in ranks.items() if len(there) == degree.tp]
    if found:
        return min(found, key=lambda degree: (degree.tp, degree.ep, degree.dp))
    lacking = "; ".join(
        f"of {degree} ranks {', '.join(str(rank) for rank in range(degree.tp) if rank not in there)} are missing or "
        "damaged"
        for degree, there in ranks.items()
    )
    raise SplitError(
        f"{folder}: the merged files can be left out only where the files of all ranks of one degree are there"
        + (f": {lacking}" if lacking else ", and there are none: give --tp")
    )


def header_tensor(file: str, nbytes: int) -> TensorInfo:
    """A merged file's header as a tensor; no other tensor's name has a space."""
    return TensorInfo(f"header {file}", "U8", (nbytes,), file, 0, nbytes)


Rectangle = tuple[tuple[int, int], tuple[int, int]]
"""Rows and columns, each ``(start, stop)``."""


def in_no_rank(tensors: Iterable[TensorInfo], in_ranks: Mapping[str, Collection[Rectangle]]) -> list[TensorInfo]:
    """The tensors that their rectangles in ``in_ranks`` do not cover."""
    return [tensor for tensor in tensors if tensor.nbytes and not _covered(tensor, in_ranks.get(tensor.name, ()))]


def _covered(tensor: TensorInfo, in_ranks: Collection[Rectangle]) -> bool:
    # Every cut is along rows or along columns.
    height, width = (tensor.shape[0] if tensor.shape else 1), prod(tensor.shape[1:])
    return _cover((rows for rows, columns in in_ranks if columns == (0, width)), height) or _cover(
        (columns for rows, columns in in_ranks if rows == (0, height)), width
    )


def _cover(ranges: Iterable[tuple[int, int]], end: int) -> bool:
    at = 0
    for start, stop in sorted(ranges):
        if start > at:
            return False
        at = max(at, stop)
    return at >= end


class CutFolder:
    """The storage of a checkpoint whose merged files were dropped.

    Their tensors are put together from the ranks of one degree and from ``presplit/rest``.
    """

    def __init__(self, folder: Path, manifest: Manifest, rest: RankEntry):
        self._folder, self._manifest = folder, manifest
        self._local = LocalFolder.open(folder)
        self._merged = {name: entry.nbytes for name, entry in manifest.shards.items()}
        self.files: Mapping[str, int | None] = {**self._local.files, **self._merged}
        try:
            stored = open_rank(read_index(folder, REST, rest))
        except SourceError as error:
            raise VerifyError(str(error)) from error
        self._kept = {name: _placed(REST, tensor) for name, tensor in stored.items()}
        """The tensors of ``presplit/rest`` by name."""
        self._lock = Lock()
        self._parts: dict[str, tuple[Piece, ...]] = {}
        """Tensor -> its rectangles in the files, and their places in the tensor."""
        self.checkpoint = open_storage(self, str(folder), self._headers())

    def read(self, name: str, offset: int, length: int) -> bytes:
        """As in :class:`.Files`, but not of merged files, whose tensors :meth:`reader` reads."""
        return self._local.read(name, offset, length)

    def cached(self, name: str) -> Path | None:
        return None if name in self._merged else self._local.cached(name)

    def fetch(self, names: Iterable[str]) -> dict[str, Path]:
        return self._local.fetch(names)

    def reader(self) -> TensorReader:
        """A reader of the merged tensors, and of the merged files' headers (:func:`header_tensor`)."""
        return _Rebuilt(self, FileReader(self._local.cached))

    def _headers(self) -> Iterator[tuple[str, bytes]]:
        """Yields the merged files with their headers."""
        with FileReader(self._local.cached) as reader:
            for file, size in self._merged.items():
                tensor = self._kept.get(header_tensor(file, 0).name)
                where = f"{self._folder / REST}: the header of {file}"
                if tensor is None or tensor.dtype != "U8" or tensor.nbytes > MAX_HEADER_BYTES:
                    raise VerifyError(f"{where} is missing; bring the folder again")
                data = reader.read(tensor, 0, tensor.nbytes)
                if checksum_of(data) != self._manifest.files[file].checksum:
                    raise VerifyError(f"{where} was changed; bring the folder again")
                if 8 + header_length(data[:8], path=where, file_size=size) != len(data):
                    raise VerifyError(f"{where} is damaged; build the checkpoint again")
                yield file, data

    def parameter(self, tensor: TensorInfo) -> Parameter:
        """A merged tensor, or a merged file's header, as pieces of the files."""
        self.prepare()
        return Parameter(tensor.name, tensor.dtype, tensor.shape, self._parts.get(tensor.name, ()))

    def prepare(self) -> None:
        """Finds the pieces of each tensor.

        Raises:
            SplitError: no degree has all its ranks, or a tensor is in no file.
            VerifyError: a rank's files are not those of this checkpoint.
        """
        with self._lock:
            if not self._parts:
                self._parts = self._find()

    def _find(self) -> dict[str, tuple[Piece, ...]]:
        degree = self._degree()
        splitter = splitter_of(Source.of("", self.checkpoint), degree)
        found: dict[str, dict[Rectangle, Piece]] = {}
        for rank in range(degree.tp):
            stored = self._open(degree, rank)
            for parameter in splitter.parameters(rank):
                tensor = stored.get(parameter.name)
                if tensor is None or (tensor.dtype, tensor.shape) != (parameter.dtype, parameter.shape):
                    raise VerifyError(
                        f"{self._folder / degree.folder(rank)}: {parameter.name} is not there as "
                        f"{parameter.dtype} {list(parameter.shape)}, which is how this checkpoint is cut; bring the "
                        "folder again"
                    )
                for piece, back in _backwards(parameter, tensor):
                    # Several ranks may have the same part: the first is used.
                    found.setdefault(piece.tensor.name, {}).setdefault((piece.rows, piece.columns), back)
        parts = {name: tuple(pieces.values()) for name, pieces in found.items()}
        headers = (header_tensor(file, shard.header_bytes) for file, shard in self.checkpoint.shards.items())
        for tensor in (*in_no_rank(self.checkpoint.tensors().values(), found), *headers):
            kept = self._kept.get(tensor.name)
            if kept is None or (kept.dtype, kept.shape) != (tensor.dtype, tensor.shape):
                raise SplitError(f"{tensor.name}: neither in the files of {degree} nor in {self._folder / REST}")
            parts[tensor.name] = as_parameter(kept).pieces
        return parts

    def _degree(self) -> Degree:
        listed = self._manifest.ranks
        reasons = {name: damage(self._folder, name, line) for name, line in listed.items()}
        try:
            return smallest_complete_degree(self._folder, (name for name, reason in reasons.items() if reason is None))
        except SplitError:
            for reason in filter(None, reasons.values()):
                raise VerifyError(
                    f"{reason}; here the merged files were dropped, and no degree has all its ranks: bring it again"
                ) from None
            raise

    def _open(self, degree: Degree, rank: int) -> dict[str, TensorInfo]:
        index = read_rank(self._folder, self._manifest, degree, rank)
        assert index is not None
        try:
            return {name: _placed(degree.folder(rank), tensor) for name, tensor in open_rank(index).items()}
        except SourceError as error:
            raise VerifyError(str(error)) from error


class _Rebuilt(TensorReader):
    """Reads merged tensors from the files of ranks."""

    def __init__(self, storage: CutFolder, files: FileReader):
        self._storage, self._files = storage, files

    def close(self) -> None:
        self._files.close()

    def read_into(self, tensor: TensorInfo, window: memoryview, at: int = 0) -> None:
        parameter = self._storage.parameter(tensor)
        rows = np.frombuffer(window, f"u{parameter.itemsize}").reshape(-1, parameter.blocks[2])
        fill(rows, at // rows.strides[0], parameter.bands(), self._files)

    def chunks(self, tensor: TensorInfo) -> Iterator[bytes]:
        # As bytes: memory views are compared byte by byte, which takes ten times as long.
        return map(bytes, contents(self._storage.parameter(tensor), self._files))


def _placed(folder: str, tensor: TensorInfo) -> TensorInfo:
    return tensor._replace(file=f"{folder}/{tensor.file}")


def _backwards(parameter: Parameter, stored: TensorInfo) -> Iterable[tuple[Piece, Piece]]:
    """Yields each piece, and its inverse: a rectangle of the parameter, and its place in the tensor."""
    blocks, rows, columns = parameter.blocks
    flat = stored._replace(shape=(blocks * rows, columns))
    for piece, top, column, down, across in parameter.bands():
        yield (
            piece,
            Piece(
                flat,
                (top, top + down[1] - down[0]),
                (column, column + across[1] - across[0]),
                (0, piece.rows[0], piece.columns[0]),
                piece.transposed,
            ),
        )
