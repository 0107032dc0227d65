"""The files of one rank: written from the merged tensors, and read back.

    presplit/tp4-ep1/rank-0-of-4/index.json            what the rank holds, with checksums
    presplit/tp4-ep1/rank-0-of-4/model-00001-of-00002.safetensors

A rank's folder is written under another name, synced and renamed, and only then listed in the manifest: what the
manifest lists is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import xxhash

from .checkpoint import REST
from .copier import Progress, pwrite_all, write_errors
from .errors import SourceError, VerifyError
from .formats.base import numpy_dtype
from .header import (
    DTYPE_BITS,
    MOST_TENSORS,
    TensorInfo,
    build_header,
    inside,
    load_json,
    open_regular,
    parse_header,
    pread_into,
    read_header,
    read_regular,
)
from .manifest import CHECKSUM, checksum_of
from .presplit import Band, Degree, Parameter, Piece
from .stage import sync_folder

__all__ = [
    "INDEX",
    "FileReader",
    "RankIndex",
    "Reader",
    "changed_headers",
    "check_headers",
    "checksum_on_disk",
    "contents",
    "damage",
    "fill",
    "finished",
    "is_degree",
    "open_rank",
    "parse_folder",
    "read_index",
    "read_rank",
    "whole",
    "write_parameters",
    "write_rank",
]

INDEX = "index.json"
VERSION = 1
_BUFFER = 4 << 20
_MAX_INDEX_BYTES = 64 << 20
_MAX_INDEX_VALUES = 4_000_000
_MOST_OPEN = 64  # of the files that a process may have open, 1,024 as a rule

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class RankIndex:
    """``index.json`` of a rank, read back."""

    folder: Path
    parameters: Mapping[str, Mapping[str, Any]]
    """Name -> dtype, shape, file, checksum."""
    files: Mapping[str, Mapping[str, Any]]
    """Name -> bytes, checksum of its header."""
    padded: Mapping[str, tuple[int, int]]
    """MLP or ``...experts`` -> the columns that SGLang gives a rank, and those that its files have."""

    @property
    def remedy(self) -> str:
        """What helps where its files are damaged."""
        return _remedy(self.folder)


def _remedy(folder: Path) -> str:
    bring = "bring the folder again"
    if folder.name == Path(REST).name:
        return bring
    return f"{bring}, or cut it again with `mixprec split`, from the merged files or all ranks of another degree"


def is_degree(name: str) -> bool:
    """Whether a folder's name is that of a degree, as ``"tp4-ep1"``."""
    try:
        Degree.parse(name)
    except ValueError:
        return False
    return True


def parse_folder(name: str) -> tuple[Degree, int] | None:
    """``"presplit/tp4-ep1/rank-0-of-4"`` -> its degree and rank; None for any other name."""
    try:
        _, degree, rank = name.split("/")
        found = Degree.parse(degree)
        number = int(rank.split("-")[1])
    except (ValueError, IndexError):
        return None
    return (found, number) if number < found.tp and found.folder(number) == name else None


# Writing


def write_rank(
    root: Path,
    name: str,
    head: Mapping[str, Any],
    reader: Reader,
    parameters: Sequence[Parameter],
    shard_size: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Writes one rank's folder; returns its line in the manifest. Raises :class:`WriteError`."""
    final = root / name
    part = final.with_name(f".{final.name}.part")
    with write_errors(final), ExitStack() as stack:
        for leftover in (part, final):
            if leftover.exists():  # of a split that was stopped before the manifest listed it
                shutil.rmtree(leftover)
        part.mkdir(parents=True)
        stack.callback(shutil.rmtree, part, ignore_errors=True)  # what was not renamed
        shards = _shards(parameters, shard_size)
        entries: dict[str, Any] = {}
        files: dict[str, Any] = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            header = build_header((p.name, p.dtype, p.shape, p.nbytes) for p in shard)
            files[file] = {"bytes": len(header) + sum(p.nbytes for p in shard), "header": checksum_of(header)}
            for parameter, checksum in write_parameters(part / file, header, shard, reader, progress):
                entries[parameter.name] = {
                    "dtype": parameter.dtype, "shape": parameter.shape, "file": file, CHECKSUM: checksum,
                }  # fmt: skip
        index = (
            json.dumps({"version": VERSION, **head, "files": files, "parameters": entries}, indent=1) + "\n"
        ).encode()
        with (part / INDEX).open("wb") as out:
            out.write(index)
            out.flush()
            os.fsync(out.fileno())
        sync_folder(part)
        part.rename(final)
        for folder in (final.parent, final.parent.parent, root):
            sync_folder(folder)
    return _line(files, index)


def finished(folder: Path, head: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest's line of a rank that a stopped split had finished, and that would be written the same; or None."""
    try:
        data = read_regular(folder / INDEX, _MAX_INDEX_BYTES)
        index = load_json(data, _MAX_INDEX_VALUES)
        there = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != INDEX}
        due = {name: entry["bytes"] for name, entry in index["files"].items()}
        if {**index, "version": VERSION, **head} != index or there != due:
            return None
        if any(checksum_of(read_header(folder / name)[0]) != index["files"][name]["header"] for name in there):
            return None
    except (SourceError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return _line(index["files"], data)


def _line(files: Mapping[str, Any], index: bytes) -> dict[str, Any]:
    """A rank's line in the manifest."""
    return {"bytes": sum(entry["bytes"] for entry in files.values()), CHECKSUM: checksum_of(index)}


def _shards(parameters: Sequence[Parameter], most: int) -> list[list[Parameter]]:
    shards: list[list[Parameter]] = [[]]
    size = 0
    for parameter in parameters:
        if shards[-1] and (size + parameter.nbytes > most or len(shards[-1]) == MOST_TENSORS):
            shards.append([])
            size = 0
        shards[-1].append(parameter)
        size += parameter.nbytes
    return shards


def write_parameters(
    path: Path, header: bytes, parameters: Sequence[Parameter], reader: Reader, progress: Progress | None
) -> Iterator[tuple[Parameter, str]]:
    """Writes a new file, giving each parameter with its checksum as it is written; synced when it is exhausted."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
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
    parameter: Parameter, reader: Reader, *, most: int = _BUFFER, allocate: Callable[[int], Array] = _new
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
    widest = max([columns, *(band.piece.width for band in bands if not band.piece.turned)])
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
            if piece.turned or across != (0, piece.width) or not into.flags.c_contiguous:
                into[...] = reader.read(piece, first, last)
            else:
                reader.rows(piece, first, into)


def _rows_at_once(width: int, element: np.dtype[Any], most: int = _BUFFER) -> int:
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
        """Rows ``first`` to ``last`` of the piece, or columns where it is turned, as whole numbers of their size."""
        element = np.dtype(f"u{numpy_dtype(piece.tensor.dtype).itemsize}")
        if not piece.turned:
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


# Reading back


def read_rank(folder: Path, manifest: Mapping[str, Any], degree: Degree, rank: int) -> RankIndex | None:
    """What a rank's files hold; None where the manifest lists no such rank.

    Raises:
        VerifyError: the index is not the one that was listed.
    """
    name = degree.folder(rank)
    listed = manifest.get("presplit", {}).get(name)
    return None if listed is None else read_index(folder, name, listed)


def read_index(folder: Path, name: str, listed: Mapping[str, Any]) -> RankIndex:
    """``index.json`` in ``name``, which the manifest lists. Raises :class:`VerifyError`."""
    path = folder / name / INDEX
    try:
        data = read_regular(inside(folder, f"{name}/{INDEX}"), _MAX_INDEX_BYTES)
        if checksum_of(data) != listed[CHECKSUM]:
            raise VerifyError(f"{path}: was changed after it was written; {_remedy(folder / name)}")
        index = load_json(data, _MAX_INDEX_VALUES)
        for key, entry in index["parameters"].items():
            sizes = entry["shape"]
            is_shape = isinstance(sizes, list) and all(type(n) is int and n >= 0 for n in sizes)
            texts = all(isinstance(entry[field], str) for field in ("dtype", "file", CHECKSUM))
            if not is_shape or not texts or entry["dtype"] not in DTYPE_BITS:
                raise ValueError(f"the entry of {key:.200}")
        padded = {key: (native, held) for key, (native, held) in index["padded"].items()}
        if not all(type(n) is int and 0 < n < 1 << 31 for columns in padded.values() for n in columns):
            raise ValueError("columns that are no numbers")
        if not all(isinstance(entry["header"], str) for entry in index["files"].values()):
            raise ValueError("files without checksums of their headers")
        return RankIndex(folder / name, index["parameters"], index["files"], padded)
    except SourceError as error:
        raise VerifyError(str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise VerifyError(f"{path}: damaged: {error!r:.300}; {_remedy(folder / name)}") from error


def open_rank(index: RankIndex) -> dict[str, TensorInfo]:
    """The tensors in a rank's files, by their headers. Raises :class:`SourceError` for damaged or missing files."""
    tensors: dict[str, TensorInfo] = {}
    for file in sorted({str(entry["file"]) for entry in index.parameters.values()}):
        if Path(file).name != file:
            raise SourceError(f"its index names the file {file!r:.200}", path=index.folder)
        path = inside(index.folder, file)
        data, size = read_header(path)
        tensors |= parse_header(data, path=path, file=file, file_size=size)[0]
    for name, entry in index.parameters.items():
        tensor = tensors.get(name)
        if tensor is None or (tensor.dtype, list(tensor.shape), tensor.file) != (
            entry["dtype"], list(entry["shape"]), entry["file"],
        ):  # fmt: skip
            raise SourceError(f"{name} is not there as its index says; {index.remedy}", path=index.folder)
    if extra := tensors.keys() - index.parameters.keys():
        raise SourceError(f"{min(extra)} is not in its index; {index.remedy}", path=index.folder)
    return tensors


def changed_headers(index: RankIndex) -> list[Path]:
    """The files that tell of other tensors than were written. Raises :class:`SourceError` where one has no header."""
    changed = []
    for file in sorted({str(entry["file"]) for entry in index.parameters.values()}):
        data, _ = read_header(inside(index.folder, file))
        if checksum_of(data) != index.files.get(file, {}).get("header"):
            changed.append(index.folder / file)
    return changed


def check_headers(index: RankIndex) -> None:
    """Raises :class:`VerifyError` for the first of :func:`changed_headers`."""
    for path in changed_headers(index):
        raise VerifyError(f"{path}: its header was changed after it was written; {index.remedy}")


def damage(folder: Path, name: str, listed: Mapping[str, Any]) -> str | None:
    """Why the files in ``name`` are not those that the manifest lists, as far as the index, headers and sizes tell."""
    try:
        index = read_index(folder, name, listed)
        open_rank(index)
        check_headers(index)
    except (SourceError, VerifyError) as error:
        return str(error)
    return None


def checksum_on_disk(path: Path, tensor: TensorInfo) -> str:
    """Of a tensor's bytes; of as many as there are where the file ends before."""
    digest = xxhash.xxh3_128()
    fd = open_regular(path)
    try:
        at, end = tensor.start, tensor.start + tensor.nbytes
        while at < end and (data := os.pread(fd, min(_BUFFER, end - at), at)):
            digest.update(data)
            at += len(data)
    finally:
        os.close(fd)
    return str(digest.hexdigest())
