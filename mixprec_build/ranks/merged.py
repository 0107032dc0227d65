"""The merged files of a compiled checkpoint, or what stands for them where they were dropped: its ranks' files.

A checkpoint of the layout ``presplit`` has no merged files. Every byte of theirs is in the files of its ranks, or in
``presplit/rest``: their headers, and tensors that no rank holds (``lm_head`` where it is tied, one of two scales of one
input). So each can be written again as it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

from ..checkpoint.checkpoint import REST, Checkpoint
from ..checkpoint.degree import Degree, parse_folder
from ..checkpoint.manifest import Manifest, RankEntry, checksum_of
from ..checkpoint.opening import open_checkpoint, open_storage
from ..checkpoint.typed import Source
from ..errors import SourceError, SplitError, VerifyError
from ..formats.base import Format
from ..storage.disk import inside
from ..storage.folder import LocalFolder
from ..storage.header import MAX_HEADER_BYTES, TensorInfo, header_length
from .assemble import Array, FileReader, Reader, contents, fill, whole
from .files import damage, open_rank, read_index, read_rank
from .pieces import Parameter, Piece
from .splitter import Splitter

__all__ = [
    "CutFolder",
    "Rebuilt",
    "Rectangle",
    "header_tensor",
    "in_no_rank",
    "open_compiled",
    "reader_of",
    "smallest_complete_degree",
    "splitter_of",
]


def splitter_of(source: Source, degree: Degree, *, replicated_head: bool = False) -> Splitter:
    """The cut of a checkpoint on disk. Raises :class:`SplitError` where there is none."""
    modules: dict[str, tuple[Format, Any]] = {
        name: (source.format_of(name), module) for name, module in source.checkpoint.modules.items()
    }
    return Splitter(modules, source.facts, degree, replicated_head)


def open_compiled(folder: Path, manifest: Manifest, unread: dict[str, str] | None = None) -> Checkpoint:
    """A compiled checkpoint by its headers, also where its merged files were dropped. For ``unread`` see
    :func:`.open_checkpoint`.

    Raises:
        VerifyError: what was kept of the merged files is not what was listed.
        SourceError: from opening files.
    """
    if manifest.rest is None:
        return open_checkpoint(str(folder), unread=unread)
    return CutFolder(folder, manifest, manifest.rest).checkpoint


def reader_of(checkpoint: Checkpoint) -> Reader:
    """Reads the merged tensors of a compiled checkpoint."""
    storage = checkpoint.storage
    return storage.reader if isinstance(storage, CutFolder) else FileReader(storage.cached)


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
"""Rows and columns."""


def in_no_rank(tensors: Iterable[TensorInfo], held: Mapping[str, Collection[Rectangle]]) -> list[TensorInfo]:
    """The tensors that their rectangles in ``held`` do not cover."""
    return [tensor for tensor in tensors if tensor.nbytes and not _covered(tensor, held.get(tensor.name, ()))]


def _covered(tensor: TensorInfo, held: Collection[Rectangle]) -> bool:
    # Every cut is along rows or along columns.
    height, width = (tensor.shape[0] if tensor.shape else 1), prod(tensor.shape[1:])
    return _cover((rows for rows, columns in held if columns == (0, width)), height) or _cover(
        (columns for rows, columns in held if rows == (0, height)), width
    )


def _cover(ranges: Iterable[tuple[int, int]], end: int) -> bool:
    at = 0
    for start, stop in sorted(ranges):
        if start > at:
            return False
        at = max(at, stop)
    return at >= end


class CutFolder:
    """The storage of a checkpoint whose merged files were dropped: tensors come from the files of its ranks."""

    def __init__(self, folder: Path, manifest: Manifest, rest: RankEntry):
        self._local = LocalFolder.open(folder)
        self._merged = {name: entry.nbytes for name, entry in manifest.shards.items()}
        self.files: Mapping[str, int | None] = {**self._local.files, **self._merged}
        try:
            stored = open_rank(read_index(folder, REST, rest))
        except SourceError as error:
            raise VerifyError(str(error)) from error
        kept = {name: _placed(REST, tensor) for name, tensor in stored.items()}
        self.checkpoint = open_storage(self, str(folder), self._headers(folder, manifest, kept))
        self.reader = Rebuilt(folder, manifest, self.checkpoint, kept)
        self._tensors = {(t.file, t.start, t.nbytes): t for t in self.checkpoint.tensors.values()}

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Of the merged files, whole tensors only."""
        if name not in self._merged:
            return self._local.read(name, offset, length)
        tensor = self._tensors[name, offset, length]
        return b"".join(contents(self.reader.parameter(tensor), self.reader.files))

    def cached(self, name: str) -> Path | None:
        return None if name in self._merged else self._local.cached(name)

    def fetch(self, names: Iterable[str]) -> dict[str, Path]:
        return self._local.fetch(names)

    def _headers(self, folder: Path, manifest: Manifest, kept: Mapping[str, TensorInfo]) -> Iterator[tuple[str, bytes]]:
        """The merged files' headers, as they were."""
        with FileReader(lambda file: inside(folder, file)) as reader:
            for file, size in self._merged.items():
                tensor = kept.get(header_tensor(file, 0).name)
                where = f"{folder / REST}: the header of {file}"
                if tensor is None or tensor.dtype != "U8" or tensor.nbytes > MAX_HEADER_BYTES:
                    raise VerifyError(f"{where} is missing; bring the folder again")
                data = b"".join(contents(whole(tensor), reader))
                if checksum_of(data) != manifest.files[file].checksum:
                    raise VerifyError(f"{where} was changed; bring the folder again")
                if 8 + header_length(data[:8], path=where, file_size=size) != len(data):
                    raise VerifyError(f"{where} is damaged; build the checkpoint again")
                yield file, data


class Rebuilt(Reader):
    """The merged tensors, put together as they are read: from the ranks of one degree, and from the rest.

    ``kept`` is the rest, by name.
    """

    def __init__(self, folder: Path, manifest: Manifest, checkpoint: Checkpoint, kept: Mapping[str, TensorInfo]):
        self._folder, self._manifest, self._checkpoint, self._kept = folder, manifest, checkpoint, kept
        self.files = FileReader(lambda file: inside(folder, file))
        """What :meth:`parameter` is read from."""
        self._lock = Lock()
        self._parts: dict[str, tuple[Piece, ...]] = {}
        """Tensor -> where its rectangles lie in the files, and in the tensor."""

    def close(self) -> None:
        self.files.close()

    def rows(self, piece: Piece, first: int, into: Array) -> None:
        fill(into, first, self.parameter(piece.tensor).bands(), self.files)

    def parameter(self, tensor: TensorInfo) -> Parameter:
        """A merged tensor, or a merged file's header, as pieces of the files."""
        self.prepare()
        return Parameter(tensor.name, tensor.dtype, tensor.shape, self._parts.get(tensor.name, ()))

    def prepare(self) -> None:
        """Finds where each tensor lies.

        Raises:
            SplitError: not all ranks are there, or a tensor is nowhere.
            VerifyError: a rank's files are not those of this checkpoint.
        """
        with self._lock:
            if not self._parts:
                self._parts = self._find()

    def _find(self) -> dict[str, tuple[Piece, ...]]:
        degree = self._degree()
        splitter = splitter_of(Source.of("", self._checkpoint), degree)
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
                    # Of ranks that hold the same the first.
                    found.setdefault(piece.tensor.name, {}).setdefault((piece.rows, piece.columns), back)
        parts = {name: tuple(pieces.values()) for name, pieces in found.items()}
        headers = (header_tensor(file, shard.header_bytes) for file, shard in self._checkpoint.shards.items())
        for tensor in (*in_no_rank(self._checkpoint.tensors.values(), found), *headers):
            kept = self._kept.get(tensor.name)
            if kept is None or (kept.dtype, kept.shape) != (tensor.dtype, tensor.shape):
                raise SplitError(f"{tensor.name}: neither in the files of {degree} nor in {self._folder / REST}")
            parts[tensor.name] = whole(kept).pieces
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


def _placed(folder: str, tensor: TensorInfo) -> TensorInfo:
    return tensor._replace(file=f"{folder}/{tensor.file}")


def _backwards(parameter: Parameter, stored: TensorInfo) -> Iterable[tuple[Piece, Piece]]:
    """Each piece, and the one that puts it back: a rectangle of the parameter, and where it lies in the tensor."""
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
