"""Writes the files of one rank from the merged tensors, and reads them back.

    presplit/tp4-ep1/rank-0-of-4/index.json            the rank's parameters, with checksums
    presplit/tp4-ep1/rank-0-of-4/model-00001-of-00002.safetensors

A rank's folder is written under another name, synced and renamed, and only then listed in the manifest, so that listed
folders are complete.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import REST
from ..checkpoint.degree import Degree
from ..checkpoint.manifest import CHECKSUM, Manifest, RankEntry, checksum_of
from ..errors import OutputError, SourceError, VerifyError
from ..storage.disk import inside, read_regular, write_errors
from ..storage.dtypes import DTYPE_BITS
from ..storage.header import MOST_TENSORS, TensorInfo, build_header, parse_header, read_header
from ..storage.limits import load_json
from ..storage.owned import OwnedFolder
from ..storage.reader import TensorReader
from ..storage.threads import Progress
from .assemble import write_parameters
from .layout import beside_rank, is_ours
from .pieces import Parameter

__all__ = [
    "INDEX",
    "RankIndex",
    "changed_headers",
    "check_headers",
    "damage",
    "finished",
    "open_rank",
    "read_index",
    "read_rank",
    "write_rank",
]


INDEX = "index.json"
VERSION = 1
_MAX_INDEX_BYTES = 64 << 20
_MAX_INDEX_VALUES = 4_000_000


@dataclass(frozen=True, slots=True)
class RankIndex:
    """``index.json`` of a rank, read back."""

    folder: Path
    parameters: Mapping[str, Mapping[str, Any]]
    """Name -> dtype, shape, file, checksum."""
    files: Mapping[str, Mapping[str, Any]]
    """Name -> bytes, checksum of its header."""
    padded: Mapping[str, tuple[int, int]]
    """MLP or ``...experts`` -> a rank's columns in SGLang, and in its files, which have zeros added."""

    @property
    def remedy(self) -> str:
        """Advice for damaged files."""
        return _remedy(self.folder)


def _remedy(folder: Path) -> str:
    bring = "bring the folder again"
    if folder.name == Path(REST).name:
        return bring
    return f"{bring}, or cut it again with `mixprec split`, from the merged files or all ranks of another degree"


def write_rank(
    root: OwnedFolder,
    name: str,
    head: Mapping[str, Any],
    reader: TensorReader,
    parameters: Sequence[Parameter],
    shard_size: int,
    progress: Progress | None,
    check: Callable[[], None],
) -> RankEntry:
    """Writes one rank's folder; returns its entry of the manifest.

    ``check`` raises where another process writes this rank now; it is called before each change.

    Raises:
        WriteError: the disk is full, fails, or forbids it.
        OutputError: a link, or files that mixprec did not write, are in the way.
    """
    part = beside_rank(name, "part")
    with write_errors(root.path / name), ExitStack() as stack:
        check()
        for leftover in (part, name):  # of a split that was stopped before the manifest listed it
            if root.remove(leftover, is_ours):
                continue
            there = root.entry(leftover)
            what = "holds files that mixprec did not write" if there is None or there.is_folder else f"is {there.kind}"
            raise OutputError(f"{root.path / leftover}: {what}; move it away, a rank's files are written there")
        root.make_folder(part)
        stack.callback(_discard, root, part, check)  # if it was not renamed
        shards = _shards(parameters, shard_size)
        entries: dict[str, Any] = {}
        files: dict[str, Any] = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            header = build_header((p.name, p.dtype, p.shape, p.nbytes) for p in shard)
            files[file] = {"bytes": len(header) + sum(p.nbytes for p in shard), "header": checksum_of(header)}
            check()
            fd = root.create(f"{part}/{file}")
            for parameter, checksum in write_parameters(fd, header, shard, reader, progress):
                entries[parameter.name] = {
                    "dtype": parameter.dtype, "shape": parameter.shape, "file": file, CHECKSUM: checksum,
                }  # fmt: skip
        index = (
            json.dumps({"version": VERSION, **head, "files": files, "parameters": entries}, indent=1) + "\n"
        ).encode()
        check()
        with os.fdopen(root.create(f"{part}/{INDEX}"), "wb") as out:
            out.write(index)
            out.flush()
            os.fsync(out.fileno())
        root.sync(part)
        check()
        root.rename(part, name)
        for folder in (name.rpartition("/")[0], "presplit", "."):
            root.sync(folder)
    return _line(files, index)


def _discard(root: OwnedFolder, part: str, check: Callable[[], None]) -> None:
    with suppress(OSError, OutputError):  # the next split removes it, too
        check()
        root.remove(part, is_ours)


def finished(folder: Path, head: Mapping[str, Any]) -> RankEntry | None:
    """The manifest's entry of a rank that a stopped split finished, if it would be written the same now; else None."""
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


def _line(files: Mapping[str, Any], index: bytes) -> RankEntry:
    """A rank's entry of the manifest."""
    return RankEntry(sum(entry["bytes"] for entry in files.values()), checksum_of(index))


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


def read_rank(folder: Path, manifest: Manifest, degree: Degree, rank: int) -> RankIndex | None:
    """Reads a rank's index; None where the manifest lists no such rank.

    Raises:
        VerifyError: the index is not the one that was listed.
    """
    name = degree.folder(rank)
    listed = manifest.ranks.get(name)
    return None if listed is None else read_index(folder, name, listed)


def read_index(folder: Path, name: str, listed: RankEntry) -> RankIndex:
    """Reads ``index.json`` in the folder ``name``. Raises :class:`VerifyError` if it is not the one that was listed."""
    path = folder / name / INDEX
    try:
        data = read_regular(inside(folder, f"{name}/{INDEX}"), _MAX_INDEX_BYTES)
        if checksum_of(data) != listed.checksum:
            raise VerifyError(f"{path}: was changed after it was written; {_remedy(folder / name)}")
        index = load_json(data, _MAX_INDEX_VALUES)
        for key, entry in index["parameters"].items():
            sizes = entry["shape"]
            is_shape = isinstance(sizes, list) and all(type(n) is int and n >= 0 for n in sizes)
            texts = all(isinstance(entry[field], str) for field in ("dtype", "file", CHECKSUM))
            if not is_shape or not texts or entry["dtype"] not in DTYPE_BITS:
                raise ValueError(f"the entry of {key:.200}")
        padded = {key: (native, stored) for key, (native, stored) in index["padded"].items()}
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
    """The files whose headers were changed. Raises :class:`SourceError` where one has no header."""
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


def damage(folder: Path, name: str, listed: RankEntry) -> str | None:
    """Describes damage of the files in ``name`` that index, headers or sizes show; None if they show none."""
    try:
        index = read_index(folder, name, listed)
        open_rank(index)
        check_headers(index)
    except (SourceError, VerifyError) as error:
        return str(error)
    return None
