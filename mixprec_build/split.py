"""``mixprec split``: writes, lists and checks the per-rank files of a compiled checkpoint.

    presplit/tp4-ep1/rank-0-of-4/index.json            what the rank holds, with checksums
    presplit/tp4-ep1/rank-0-of-4/model-00001-of-00002.safetensors

A rank's folder is written under another name, synced and renamed, and only then listed in the manifest: what the
manifest lists is whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from . import __version__
from .checkpoint import Checkpoint
from .copier import Progress, check_space, pwrite_all, run_all, write_errors
from .errors import InterruptedBuildError, OutputError, SourceError, SplitError, VerifyError
from .formats.base import Format, numpy_dtype
from .header import (
    DTYPE_BITS,
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
from .manifest import CHECKSUM, MANIFEST, checksum_of, dump_manifest, read_manifest, tensor_entries
from .presplit import Degree, Parameter, Piece, Splitter
from .recipe import DEFAULT_SHARD_SIZE
from .sources import Source, open_source
from .stage import sync_folder

__all__ = ["RankIndex", "open_rank", "rank_differences", "read_rank", "split", "splitter_of"]

INDEX = "index.json"
_VERSION = 1
_BUFFER = 4 << 20
_MAX_INDEX_BYTES = 64 << 20
_MAX_INDEX_VALUES = 4_000_000


@dataclass(frozen=True, slots=True)
class RankIndex:
    """``index.json`` of a rank, read back."""

    degree: Degree
    rank: int
    folder: Path
    parameters: Mapping[str, Mapping[str, Any]]
    """Name -> dtype, shape, file, checksum."""
    files: Mapping[str, Mapping[str, Any]]
    """Name -> bytes, checksum of its header."""
    padded: Mapping[str, tuple[int, int]]
    """MLP or ``...experts`` -> the columns that SGLang gives a rank, and those that its files have."""


def splitter_of(source: Source, degree: Degree) -> Splitter:
    """The cut of a checkpoint on disk. Raises :class:`SplitError` where there is none."""
    modules: dict[str, tuple[Format, Any]] = {
        name: (source.format_of(name), module) for name, module in source.checkpoint.modules.items()
    }
    return Splitter(modules, source.checkpoint.config, degree)


def split(
    folder: Path,
    degree: Degree,
    *,
    ranks: Iterable[int] | None = None,
    jobs: int | None = None,
    shard_size: int = DEFAULT_SHARD_SIZE,
    watch: Callable[[Splitter, int], Progress] | None = None,
) -> list[Path]:
    """Writes the files of ``ranks`` (all of them) of a compiled checkpoint and lists them in its manifest.

    Ranks that are there already are left as they are. ``watch`` is given the cut and the bytes to be written, and
    gives what is called as they are. Returns the folders of all ranks asked for.

    Raises:
        VerifyError: ``folder`` is no compiled checkpoint.
        SplitError: it cannot be cut like that.
        OutputError: another split is writing there.
        WriteError: the disk is full, fails, or forbids it.
        InterruptedBuildError: Ctrl-C.
    """
    with _alone(folder):
        try:
            return _split(folder, degree, ranks, jobs, shard_size, watch)
        except KeyboardInterrupt:
            kept = "ranks that are finished are kept: the same command goes on from there"
            raise InterruptedBuildError(f"{folder}: interrupted; {kept}") from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One split of a checkpoint at a time: each lists its ranks in the same manifest."""
    with write_errors(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{folder}: another `mixprec split` is writing there; wait for it") from None
        yield
    finally:
        os.close(fd)


def _split(
    folder: Path,
    degree: Degree,
    ranks: Iterable[int] | None,
    jobs: int | None,
    shard_size: int,
    watch: Callable[[Splitter, int], Progress] | None,
) -> list[Path]:
    manifest = read_manifest(folder)
    wanted = sorted(set(range(degree.tp) if ranks is None else ranks))
    if any(not 0 <= rank < degree.tp for rank in wanted) or not wanted:
        raise SplitError(f"--ranks: the ranks of {degree} are 0 to {degree.tp - 1}")
    for path in (folder / "presplit", folder / f"presplit/{degree}"):
        if path.is_symlink():
            raise OutputError(f"{path}: is a link; remove it, ranks' files are written there")
    source = open_source(str(folder))
    splitter = splitter_of(source, degree)
    listed = manifest.get("presplit", {})
    padded = {name: [share.native, share.held] for name, share in splitter.padded.items()}
    cut_of = _cut_of(manifest, shard_size)
    heads: dict[int, dict[str, Any]] = {
        rank: {"version": _VERSION, "tp": degree.tp, "ep": degree.ep, "rank": rank, "cut_of": cut_of, "padded": padded}
        for rank in wanted
        if degree.folder(rank) not in listed
    }
    entries = {degree.folder(rank): _finished(folder / degree.folder(rank), head) for rank, head in heads.items()}
    plans = {rank: splitter.parameters(rank) for rank in heads if entries[degree.folder(rank)] is None}
    need = sum(p.nbytes for parameters in plans.values() for p in parameters)
    check_space(folder, need)
    report = watch(splitter, need) if watch is not None else None
    stopped = threading.Event()

    def progress(done: int) -> None:
        if stopped.is_set():
            raise _StoppedError
        if report is not None:
            report(done)

    def write(rank: int) -> None:
        name = degree.folder(rank)
        entries[name] = _write_rank(folder, name, heads[rank], source, plans[rank], shard_size, progress)

    run_all([partial(write, rank) for rank in plans], jobs or min(8, os.cpu_count() or 1), stopped, folder)
    if entries:
        _list_in_manifest(folder, {**manifest, "presplit": dict(sorted({**listed, **entries}.items()))})
    return [folder / degree.folder(rank) for rank in wanted]


class _StoppedError(Exception):
    """Ends a rank's thread when another has failed."""


def _cut_of(manifest: Mapping[str, Any], shard_size: int) -> str:
    """Stands for all that ranks' files depend on beside the degree."""
    config = manifest["files"].get("config.json", {}).get(CHECKSUM)
    digest = xxhash.xxh3_128(f"{__version__} {shard_size} {config}".encode(errors="backslashreplace"))
    for name, entry in tensor_entries(manifest).items():
        digest.update(f"\n{name} {entry[CHECKSUM]}".encode(errors="backslashreplace"))
    return str(digest.hexdigest())


def _finished(folder: Path, head: Mapping[str, Any]) -> dict[str, Any] | None:
    """The manifest's line of a rank that a stopped split had finished, and that would be written the same; or None."""
    try:
        data = read_regular(folder / INDEX, _MAX_INDEX_BYTES)
        index = load_json(data, _MAX_INDEX_VALUES)
        there = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != INDEX}
        if index | head != index or there != {name: entry["bytes"] for name, entry in index["files"].items()}:
            return None
    except (SourceError, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return _line(index["files"], data)


def _line(files: Mapping[str, Any], index: bytes) -> dict[str, Any]:
    """A rank's line in the manifest."""
    return {"bytes": sum(entry["bytes"] for entry in files.values()), CHECKSUM: checksum_of(index)}


def _list_in_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """The new manifest takes the old one's place by one rename."""
    path = folder / f".{MANIFEST}.new"
    with write_errors(path):
        path.unlink(missing_ok=True)  # it may be a link
        with path.open("xb") as file:
            for chunk in dump_manifest({**manifest, "modules": manifest["modules"].items()}):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        path.rename(folder / MANIFEST)
        sync_folder(folder)


# Writing


def _write_rank(
    root: Path,
    name: str,
    head: Mapping[str, Any],
    source: Source,
    parameters: Sequence[Parameter],
    shard_size: int,
    progress: Progress | None,
) -> dict[str, Any]:
    """Writes one rank's folder; returns its line in the manifest."""
    final = root / name
    part = final.with_name(f".{final.name}.part")
    with write_errors(final), ExitStack() as stack:
        for leftover in (part, final):
            if leftover.exists():  # of a split that was stopped before the manifest listed it
                shutil.rmtree(leftover)
        part.mkdir(parents=True)
        stack.callback(shutil.rmtree, part, ignore_errors=True)  # what was not renamed
        reader = stack.enter_context(_Reader(source))
        shards = _shards(parameters, shard_size)
        entries: dict[str, Any] = {}
        files: dict[str, Any] = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            header = build_header((p.name, p.dtype, p.shape, p.nbytes) for p in shard)
            files[file] = {"bytes": len(header) + sum(p.nbytes for p in shard), "header": checksum_of(header)}
            for parameter, checksum in _write_shard(part / file, header, shard, reader, progress):
                entries[parameter.name] = {
                    "dtype": parameter.dtype, "shape": parameter.shape, "file": file, CHECKSUM: checksum,
                }  # fmt: skip
        index = (json.dumps({**head, "files": files, "parameters": entries}, indent=1) + "\n").encode()
        with (part / INDEX).open("wb") as out:
            out.write(index)
            out.flush()
            os.fsync(out.fileno())
        sync_folder(part)
        part.rename(final)
        for folder in (final.parent, final.parent.parent, root):
            sync_folder(folder)
    return _line(files, index)


def _shards(parameters: Sequence[Parameter], most: int) -> list[list[Parameter]]:
    shards: list[list[Parameter]] = [[]]
    size = 0
    for parameter in parameters:
        if shards[-1] and size + parameter.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(parameter)
        size += parameter.nbytes
    return shards


def _write_shard(
    path: Path, header: bytes, parameters: Sequence[Parameter], reader: _Reader, progress: Progress | None
) -> Iterator[tuple[Parameter, str]]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        os.posix_fallocate(fd, 0, len(header) + sum(p.nbytes for p in parameters))
        pwrite_all(fd, memoryview(header), 0)
        at = len(header)
        for parameter in parameters:
            digest = xxhash.xxh3_128()
            for chunk in _contents(parameter, reader):
                digest.update(chunk)
                pwrite_all(fd, chunk, at)
                at += len(chunk)
                if progress is not None:
                    progress(len(chunk))
            yield parameter, digest.hexdigest()
        os.fsync(fd)
    finally:
        os.close(fd)


def _contents(parameter: Parameter, reader: _Reader) -> Iterator[memoryview]:
    """A parameter's bytes in order, a few MiB at a time."""
    blocks, rows, columns = parameter.blocks
    if not columns:
        return
    element = np.dtype(f"u{parameter.itemsize}")
    filler = np.array(parameter.filler).astype(numpy_dtype(parameter.dtype)).view(element)
    by_block: dict[int, list[Piece]] = {}
    for piece in parameter.pieces:
        by_block.setdefault(piece.at[0], []).append(piece)
    step = max(1, _BUFFER // (columns * parameter.itemsize))
    for block in range(blocks):
        pieces = by_block.get(block, [])
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            chunk = np.full((stop - start, columns), filler, element)
            for piece in pieces:
                _, row, column = piece.at
                down, across = (piece.columns, piece.rows) if piece.turned else (piece.rows, piece.columns)
                # The rows of this chunk that the piece has, counted where it comes from.
                first = max(down[0], down[0] + start - row)
                last = min(down[1], down[0] + stop - row)
                if first < last:
                    to = row + first - down[0] - start
                    chunk[to : to + last - first, column : column + across[1] - across[0]] = reader.read(
                        piece, first, last
                    )
            yield chunk.view(np.uint8).data.cast("B")


class _Reader:
    """Rows of stored tensors, from files that stay open."""

    def __init__(self, source: Source):
        self._source = source
        self._open: dict[str, int] = {}

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._open.values():
            os.close(fd)

    def read(self, piece: Piece, first: int, last: int) -> np.ndarray[Any, Any]:
        """Rows ``first`` to ``last`` of the piece, or columns where it is turned, as whole numbers of their size."""
        tensor = piece.tensor
        element = np.dtype(f"u{numpy_dtype(tensor.dtype).itemsize}")
        rows, columns = (piece.rows, (first, last)) if piece.turned else ((first, last), piece.columns)
        data = np.empty((rows[1] - rows[0], piece.width), element)
        self._fill(tensor, data.view(np.uint8).data.cast("B"), tensor.start + rows[0] * piece.width * element.itemsize)
        data = data[:, columns[0] : columns[1]]
        return data.T if piece.turned else data

    def _fill(self, tensor: TensorInfo, window: memoryview, at: int) -> None:
        path = self._source.checkpoint.storage.cached(tensor.file)
        if path is None:
            raise SourceError(f"{tensor.file} is not on this machine", path=self._source.location)
        if tensor.file not in self._open:
            self._open[tensor.file] = open_regular(path)
        try:
            got = pread_into(self._open[tensor.file], window, at)
        except OSError as error:
            raise SourceError(f"cannot read {tensor.name}: {error.strerror}", path=path) from error
        if got < len(window):
            raise SourceError(f"ends inside {tensor.name}", path=path)


# Reading back


def read_rank(folder: Path, manifest: Mapping[str, Any], degree: Degree, rank: int) -> RankIndex | None:
    """What a rank's files hold; None where the manifest lists no such rank.

    Raises:
        VerifyError: the index is not the one that was listed.
    """
    name = degree.folder(rank)
    listed = manifest.get("presplit", {}).get(name)
    if listed is None:
        return None
    path = folder / name / INDEX
    try:
        data = read_regular(inside(folder, f"{name}/{INDEX}"), _MAX_INDEX_BYTES)
        if checksum_of(data) != listed[CHECKSUM]:
            raise VerifyError(f"{path}: was changed after it was written; remove {folder / name} and split again")
        index = load_json(data, _MAX_INDEX_VALUES)
        for key, entry in index["parameters"].items():
            sizes = entry["shape"]
            whole = isinstance(sizes, list) and all(type(n) is int and n >= 0 for n in sizes)
            texts = all(isinstance(entry[field], str) for field in ("dtype", "file", CHECKSUM))
            if not whole or not texts or entry["dtype"] not in DTYPE_BITS:
                raise ValueError(f"the entry of {key:.200}")
        padded = {key: (native, held) for key, (native, held) in index["padded"].items()}
        if not all(type(n) is int and 0 < n < 1 << 31 for columns in padded.values() for n in columns):
            raise ValueError("columns that are no numbers")
        if not all(isinstance(entry["header"], str) for entry in index["files"].values()):
            raise ValueError("files without checksums of their headers")
        return RankIndex(degree, rank, folder / name, index["parameters"], index["files"], padded)
    except SourceError as error:
        raise VerifyError(str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise VerifyError(f"{path}: damaged: {error!r:.300}; split the checkpoint again") from error


def rank_differences(folder: Path, manifest: Mapping[str, Any], checkpoint: Checkpoint) -> Iterator[str]:
    """Every difference between the per-rank files, what the manifest lists, and the merged tensors."""
    listed = manifest.get("presplit", {})
    degrees = {str(Path(name).parent) for name in listed}
    present = {str(path.relative_to(folder)) for part in ("*", "*/*") for path in folder.glob(f"presplit/{part}")}
    for name in sorted(present - listed.keys() - degrees):
        yield f"{name}: not in the manifest"
    source = Source.of("", checkpoint) if listed else None
    splitters: dict[Degree, Splitter] = {}
    for name in listed:
        degree, rank = _parse(name)
        if source is None or degree is None:
            yield f"{name}: no name of a rank's folder"
            continue
        try:
            index = read_rank(folder, manifest, degree, rank)
        except VerifyError as error:
            yield str(error)
            continue
        assert index is not None
        if degree not in splitters:
            splitters[degree] = splitter_of(source, degree)
        yield from _differences_of(index, source, splitters[degree].parameters(rank))


def _parse(name: str) -> tuple[Degree | None, int]:
    try:
        _, degree, rank = name.split("/")
        tp, ep = degree.removeprefix("tp").split("-ep")
        found = Degree(int(tp), int(ep))
        number = int(rank.split("-")[1])
    except (ValueError, IndexError, SplitError):
        return None, 0
    return (found, number) if number < found.tp and found.folder(number) == name else (None, 0)


def _differences_of(index: RankIndex, source: Source, parameters: Sequence[Parameter]) -> Iterator[str]:
    try:
        stored = open_rank(index)
    except SourceError as error:
        yield str(error)
        return
    if extra := {p.name for p in index.folder.iterdir()} - {INDEX, *(t.file for t in stored.values())}:
        yield f"{index.folder / min(extra)}: not in the index"
    for file in dict.fromkeys(tensor.file for tensor in stored.values()):
        header, _ = read_header(index.folder / file)
        if file not in index.files or checksum_of(header) != index.files[file]["header"]:
            yield f"{index.folder / file}: its header was changed"
    due = {parameter.name: parameter for parameter in parameters}
    for name in sorted(due.keys() ^ stored.keys()):
        yield f"{index.folder}: {name} is {'missing' if name in due else 'no parameter of this rank'}"
    with _Reader(source) as reader:
        for name, parameter in due.items():
            tensor = stored.get(name)
            if tensor is None:
                continue
            where = f"{name} in {index.folder / tensor.file}"
            if (tensor.dtype, tensor.shape) != (parameter.dtype, parameter.shape):
                yield f"{where}: {tensor.dtype} {list(tensor.shape)}, cut as {parameter.dtype} {list(parameter.shape)}"
                continue
            checksum = _checksum_of_range(index.folder / tensor.file, tensor)
            if checksum != index.parameters[name][CHECKSUM]:
                yield f"{where}: its bytes were changed"
                continue
            digest = xxhash.xxh3_128()
            for chunk in _contents(parameter, reader):
                digest.update(chunk)
            if digest.hexdigest() != checksum:
                yield f"{where}: not what the merged tensors would be cut into"


def _checksum_of_range(path: Path, tensor: TensorInfo) -> str:
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


def open_rank(index: RankIndex) -> dict[str, TensorInfo]:
    """The tensors in a rank's files, by their headers. Raises :class:`SourceError` for damaged or missing files."""
    tensors: dict[str, TensorInfo] = {}
    for file in sorted({str(entry["file"]) for entry in index.parameters.values()}):
        if Path(file).name != file:
            raise SourceError(f"its index names the file {file!r:.200}", path=index.folder)
        path = inside(index.folder, file)
        data, size = read_header(path)
        tensors |= parse_header(data, path=path, file=file, file_size=size)[0]
    for name in tensors.keys() - index.parameters.keys():
        raise SourceError(f"{name} is not in its index; split the checkpoint again", path=index.folder)
    for name, entry in index.parameters.items():
        tensor = tensors.get(name)
        if tensor is None or (tensor.dtype, list(tensor.shape), tensor.file) != (
            entry["dtype"], list(entry["shape"]), entry["file"],
        ):  # fmt: skip
            raise SourceError(f"{name} is not there as its index says; split the checkpoint again", path=index.folder)
    return tensors
