"""A Hugging Face checkpoint, opened by its headers alone: names, dtypes, shapes, byte ranges.

Weights are never mapped into memory and never read here beyond what is asked for by :meth:`Checkpoint.read`.
"""

from __future__ import annotations

import errno
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from sys import intern
from threading import Lock
from typing import TYPE_CHECKING, NamedTuple, Protocol

import xxhash

from .errors import HubError, SourceError
from .header import TensorInfo, header_length, inside, load_json, open_regular, parse_header, pread_all
from .patterns import MAX_NAME

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "Checkpoint",
    "Files",
    "LocalFolder",
    "StoredModule",
    "ValueReader",
    "hide_password",
    "open_checkpoint",
    "open_storage",
    "split_name",
]

INDEX = "model.safetensors.index.json"
REST = "presplit/rest"
"""What a compiled checkpoint keeps of merged files that were dropped."""
_MAX_CONFIG_BYTES = 16 << 20
_MAX_INDEX_BYTES = 64 << 20  # 58 layers x 256 experts in GPTQ are 178,176 entries, 16 MB
_MAX_JSON_VALUES = 2_000_000
_MAX_JSON_DEPTH = 64
_MAX_HEADERS_BYTES = 256 << 20  # of all shards; those of 178,176 tensors take 25 MB
_MAX_TENSORS = 500_000
_FIRST_READ = 256 << 10  # most headers come with their length in one read

_NOT_IN_NAMES = re.compile(r"[ *?{}\[\]]")  # beside what cannot be seen; a pattern means something else by these

# The last word of a tensor's name, when it is a part of a module and not a parameter of its own.
_LEAVES = frozenset(
    {
        "weight", "bias", "weight_scale", "weight_scale_inv", "input_scale",
        "qweight", "qzeros", "scales", "g_idx",
        "weight_packed", "weight_shape", "weight_g_idx", "weight_zero_point", "input_zero_point",
        "weight_scale_2", "weight_global_scale", "input_global_scale", "SCB",
    }
)  # fmt: skip


def split_name(tensor: str) -> tuple[str, str]:
    """``"a.b.qweight"`` -> ``("a.b", "qweight")``; a parameter like ``"a.A_log"`` is a module of its own."""
    module, _, leaf = tensor.rpartition(".")
    return (module, intern(leaf)) if leaf in _LEAVES and module else (tensor, "")


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")


def hide_password(text: str) -> str:
    """A URL without the user name and password in front of its host; other text as it is."""
    return re.sub(r"(:/+).*@", r"\1***@", text, flags=re.DOTALL) if _URL.match(text) else text


class Files(Protocol):
    """Where a checkpoint's files are: a local folder or a hub repository."""

    @property
    def files(self) -> Mapping[str, int | None]:
        """Name -> size in bytes."""

    def read(self, name: str, offset: int, length: int) -> bytes:
        """Exactly these bytes of a file."""

    def cached(self, name: str) -> Path | None:
        """The file on this machine, if it is here."""

    def fetch(self, names: Iterable[str]) -> dict[str, Path]:
        """Brings the files to this machine."""


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A checkpoint in a folder, or a snapshot in the hub's cache (whose files are links into ``blobs/``).

    A file that is a link to elsewhere is listed, and refused when it is asked for.
    """

    folder: Path
    files: Mapping[str, int | None]

    @classmethod
    def open(cls, folder: Path) -> LocalFolder:
        try:
            files = {p.name: p.stat().st_size for p in sorted(folder.iterdir()) if p.exists() and not p.is_dir()}
        except OSError as error:
            raise SourceError(f"cannot read it: {error.strerror}", path=error.filename or folder) from error
        return cls(folder, files)

    def read(self, name: str, offset: int, length: int) -> bytes:
        path = inside(self.folder, name)
        fd = open_regular(path)
        try:
            data = pread_all(fd, length, offset)
        except OSError as error:
            raise SourceError(f"read error: {error.strerror}", path=path) from error
        finally:
            os.close(fd)
        if len(data) != length:
            raise SourceError(f"ends at byte {offset + len(data)}, {offset + length} were expected", path=path)
        return data

    def cached(self, name: str) -> Path | None:
        return inside(self.folder, name)

    def fetch(self, names: Iterable[str]) -> dict[str, Path]:
        return {name: inside(self.folder, name) for name in names}


class StoredModule(NamedTuple):
    """The tensors of one module, by the last word of their names (``""`` for a bare parameter)."""

    name: str
    tensors: Mapping[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its size, the length and checksum of its header, its ``__metadata__``."""

    size: int
    header_bytes: int
    """With the eight bytes of its length: where the data section starts."""
    header_checksum: str
    metadata: object
    modified: int | None
    """When its file was last changed (ns), where that is on this machine: the plan rests on its values too."""


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """An opened checkpoint.

    ``quantization`` is ``quantization_config`` of ``config.json``, or else ``quantize_config.json``, with
    ``quantization_file`` naming which; empty for a plain model.
    """

    location: str
    storage: Files
    config: Mapping[str, object]
    quantization: Mapping[str, object]
    quantization_file: str
    tensors: Mapping[str, TensorInfo]
    shards: Mapping[str, Shard] = field(repr=False)
    modules: Mapping[str, StoredModule] = field(repr=False)
    absent: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Modules known from the index only -> their shard, which the cache of an unreachable hub lacks."""
    values: dict[str, bytes] = field(default_factory=dict, repr=False)
    """Tensor -> its first bytes, of those that were read although their files are not on this machine."""

    @property
    def commit(self) -> str | None:
        """The hub commit, for provenance."""
        return getattr(self.storage, "commit", None)

    @property
    def offline(self) -> str | None:
        """Why the cache answered for the hub; None when it did not have to."""
        return getattr(self.storage, "offline", None)

    @property
    def folder(self) -> str | None:
        """The absolute path of a local checkpoint."""
        return str(self.storage.folder.resolve()) if isinstance(self.storage, LocalFolder) else None

    def path_of(self, file: str) -> str:
        """How messages name a file of this checkpoint."""
        return f"{self.location}/{file}"

    def read(self, tensor: TensorInfo) -> np.ndarray:
        """A tensor's values, ``shape`` as stored; BF16 and FP8 as ml_dtypes types."""
        import numpy as np

        from .formats.base import numpy_dtype

        data = self.storage.read(tensor.file, tensor.start, tensor.nbytes)
        return np.frombuffer(data, dtype=numpy_dtype(tensor.dtype)).reshape(tensor.shape)

    def read_values(self, tensors: Iterable[TensorInfo]) -> None:
        """Reads the first values of tensors whose files are on an online hub only, for :class:`ValueReader`."""
        if isinstance(self.storage, LocalFolder) or self.offline is not None:
            return
        wanted = [tensor for tensor in tensors if tensor.name not in self.values]
        away = {file for file in {tensor.file for tensor in wanted} if self.storage.cached(file) is None}
        wanted = [tensor for tensor in wanted if tensor.file in away]

        def read(tensor: TensorInfo) -> bytes:
            return self.storage.read(tensor.file, tensor.start, min(tensor.nbytes, ValueReader.LIMIT))

        with ThreadPoolExecutor(max_workers=8) as pool:
            self.values.update(zip((tensor.name for tensor in wanted), pool.map(read, wanted), strict=True))


class ValueReader:
    """Reads the first values of small tensors of several checkpoints, where they are here or were read ahead.

    A sparse file with nothing but a header is enough to plan with: what lies in a hole is not read.
    """

    LIMIT = 64 << 10

    def __init__(self, checkpoints: Mapping[str, Checkpoint]):
        self._checkpoints = checkpoints
        self._open: dict[tuple[str, str], int | None] = {}

    def __enter__(self) -> ValueReader:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._open.values():
            if fd is not None:
                os.close(fd)

    def read(self, checkpoint: str, tensor: TensorInfo) -> np.ndarray | None:
        """The first values of a tensor, flat, up to 64 KiB; None where they are not here."""
        import numpy as np

        from .formats.base import numpy_dtype

        key = (checkpoint, tensor.file)
        if key not in self._open:
            path = self._checkpoints[checkpoint].storage.cached(tensor.file)
            self._open[key] = None if path is None else open_regular(path)
        fd = self._open[key]
        if fd is None:
            ahead = self._checkpoints[checkpoint].values.get(tensor.name)
            return None if ahead is None else np.frombuffer(ahead, dtype=numpy_dtype(tensor.dtype))
        if not tensor.nbytes:
            return None
        path_text = self._checkpoints[checkpoint].path_of(tensor.file)
        want = min(tensor.nbytes, self.LIMIT)
        try:
            if os.lseek(fd, tensor.start, os.SEEK_DATA) >= tensor.start + tensor.nbytes:
                return None
            data = pread_all(fd, want, tensor.start)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole from here to the end
                return None
            raise SourceError(f"cannot read {tensor.name!r}: {error.strerror}", path=path_text) from error
        if len(data) != want:
            raise SourceError(f"ends inside {tensor.name}; fetch the file again", path=path_text)
        return np.frombuffer(data, dtype=numpy_dtype(tensor.dtype))


def open_checkpoint(location: str, *, relative_to: Path | None = None) -> Checkpoint:
    """Opens a local folder (relative ones start at ``relative_to``) or a hub id with optional ``@revision``.

    Raises:
        SourceError: nothing is there, only pickle files are there, or a file contradicts itself or another.
    """
    return open_storage(_locate(location, relative_to or Path()), location)


def open_storage(storage: Files, location: str, headers: Iterable[tuple[str, bytes]] | None = None) -> Checkpoint:
    """:func:`open_checkpoint` of files that are found; of shards that are given by their headers alone with these."""
    config = _read_json(storage, location, "config.json", _MAX_CONFIG_BYTES)
    if config is None:
        raise SourceError("no config.json: this is no Hugging Face checkpoint", path=location)
    quantization, quantization_file = config.get("quantization_config"), "config.json"
    if quantization is None:
        quantization_file = "quantize_config.json"
        quantization = _read_json(storage, location, quantization_file, _MAX_CONFIG_BYTES)
    if quantization is None:
        quantization, quantization_file = {}, "config.json"
    if not isinstance(quantization, dict):
        raise SourceError("`quantization_config` is not an object", path=f"{location}/{quantization_file}")

    index: dict[str, str] | None = None
    tensors: dict[str, TensorInfo] = {}
    shards: dict[str, Shard] = {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        if headers is None:
            names, index = _shard_names(storage, location)
            headers = zip(names, pool.map(_HeaderReader(storage, location).read, names), strict=True)
        for shard, data in headers:
            size = _size(storage, shard)
            found, metadata = parse_header(data, path=f"{location}/{shard}", file=shard, file_size=size)
            for name in found.keys() & tensors.keys():
                raise SourceError(f"tensor {name!r} is in {tensors[name].file} and in {shard}", path=location)
            tensors |= found
            if len(tensors) > _MAX_TENSORS:
                raise SourceError(f"more than {_MAX_TENSORS} tensors", path=location)
            file = storage.cached(shard)
            modified = None if file is None else file.stat().st_mtime_ns
            shards[shard] = Shard(size, len(data), xxhash.xxh3_128_hexdigest(data), metadata, modified)
    absent = {}
    if index is not None:
        if _offline(storage):
            absent = {split_name(name)[0]: shard for name, shard in index.items() if shard not in storage.files}
            index = {name: shard for name, shard in index.items() if shard in storage.files}
        _check_index(index, tensors, f"{location}/{INDEX}")

    parts: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, tensor in tensors.items():
        if not 0 < len(name) <= MAX_NAME or not name.isprintable() or _NOT_IN_NAMES.search(name):
            raise _bad_name(tensor, location)
        module, leaf = split_name(name)
        parts[module][leaf] = tensor
    modules = {name: StoredModule(name, leaves) for name, leaves in parts.items()}
    return Checkpoint(location, storage, config, quantization, quantization_file, tensors, shards, modules, absent)


def _offline(storage: Files) -> bool:
    """Whether a hub's cache answers for the hub: it may hold some shards and not others."""
    return getattr(storage, "offline", None) is not None


def _locate(location: str, relative_to: Path) -> Files:
    try:
        folder = relative_to / Path(location).expanduser()
        if folder.is_dir():
            return LocalFolder.open(folder)
    except (OSError, RuntimeError) as error:  # RuntimeError for the home folder of a user that does not exist
        raise SourceError(f"cannot be looked at: {getattr(error, 'strerror', error)}", path=location) from error
    if _URL.match(location):
        raise SourceError(
            "a URL; write a local folder or a hub id like org/name@revision", path=hide_password(location)
        )
    from .hub import HubRepo, parse_repo_id

    looks_local = location.startswith(("/", "./", "../", "~")) or location.count("/") != 1
    parsed = None if looks_local else parse_repo_id(location)
    if parsed is None:
        where = "" if Path(location).is_absolute() else f" ({folder.absolute()})"
        if folder.exists():
            raise SourceError(f"is no folder{where}; name the folder that the checkpoint's files are in", path=location)
        raise SourceError(f"no such folder{where}, and not a hub id like org/name@revision", path=location)
    try:
        return HubRepo.open(*parsed)
    except HubError as error:
        if folder.parent.is_dir():  # perhaps a mistyped path
            error.args = (f"{error}; and there is no folder {folder.absolute()}",)
        raise


def _read_json(storage: Files, location: str, name: str, limit: int) -> dict[str, object] | None:
    if name not in storage.files:
        return None
    path = f"{location}/{name}"
    size = _size(storage, name)
    if size > limit:
        raise SourceError(f"{size} bytes; at most {limit} are read", path=path)
    try:
        data = load_json(storage.read(name, 0, size), _MAX_JSON_VALUES)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"not valid JSON: {error}", path=path) from error
    if not isinstance(data, dict):
        raise SourceError("not a JSON object", path=path)
    if _deeper_than(_MAX_JSON_DEPTH, data):
        # Who prints or writes it would run out of stack.
        raise SourceError(f"nested deeper than {_MAX_JSON_DEPTH} levels", path=path)
    return data


def _deeper_than(depth: int, value: object) -> bool:
    level = [value]
    for _ in range(depth):
        inner = (node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list))
        level = [child for children in inner for child in children]
    return bool(level)


def _size(storage: Files, name: str) -> int:
    size = storage.files[name]
    # An offline cache knows a size only by the file itself.
    return storage.fetch([name])[name].stat().st_size if size is None else size


def _shard_names(storage: Files, location: str) -> tuple[list[str], dict[str, str] | None]:
    """The shards of a checkpoint, and the index's tensor -> shard map if there is an index."""
    index = _read_json(storage, location, INDEX, _MAX_INDEX_BYTES)
    if index is not None:
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise SourceError("`weight_map` must map tensor names to file names", path=f"{location}/{INDEX}")
        shards = sorted(set(weight_map.values()))
        for shard in shards:
            pure = PureWindowsPath(shard)  # also takes backslashes and drives for what they are
            if pure.anchor or pure.drive or len(pure.parts) != 1 or PurePosixPath(shard).suffix != ".safetensors":
                raise SourceError(
                    f"names the file {shard!r}, which is no shard in this folder", path=f"{location}/{INDEX}"
                )
            if shard not in storage.files and not _offline(storage):
                remedy = "fetch it again"
                if isinstance(storage, LocalFolder) and (storage.folder / REST).is_dir():
                    remedy = (
                        "this checkpoint has files cut for ranks only: restore the merged ones with "
                        f"`mixprec split {storage.folder.absolute()} --layout both`"
                    )
                raise SourceError(f"the shard {shard} is missing; {remedy}", path=location)
        return [shard for shard in shards if shard in storage.files], weight_map
    found = [name for name in storage.files if name.endswith(".safetensors")]
    if "model.safetensors" in found or len(found) == 1:
        return ["model.safetensors" if "model.safetensors" in found else found[0]], None
    if found:
        raise SourceError(
            f"{len(found)} .safetensors files but no {INDEX} that says which belong together", path=location
        )
    if any(name.endswith((".bin", ".pt", ".pth", ".gguf")) for name in storage.files):
        raise SourceError(
            "only safetensors files are read, and there are none here; convert it first, "
            "e.g. with transformers: save_pretrained(..., safe_serialization=True)",
            path=location,
        )
    raise SourceError("no safetensors files", path=location)


class _HeaderReader:
    """Reads what comes before the data section of shards, for several threads at a time."""

    def __init__(self, storage: Files, location: str):
        self._storage, self._location = storage, location
        self._lock, self._total = Lock(), 0

    def read(self, name: str) -> bytes:
        size = _size(self._storage, name)
        first = self._storage.read(name, 0, min(size, _FIRST_READ))
        end = 8 + header_length(first[:8], path=f"{self._location}/{name}", file_size=size)
        with self._lock:
            self._total += end
            if self._total > _MAX_HEADERS_BYTES:
                raise SourceError(f"headers of more than {_MAX_HEADERS_BYTES} bytes in all", path=self._location)
        if end > len(first):
            first += self._storage.read(name, len(first), end - len(first))
        return first[:end]


def _bad_name(tensor: TensorInfo, location: str) -> SourceError:
    name, path = tensor.name, f"{location}/{tensor.file}"
    if len(name) > MAX_NAME:
        return SourceError(f"tensor name {name[:MAX_NAME]!r}... is longer than any model's", path=path)
    return SourceError(f"tensor name {name!r} has characters no model uses", path=path)


def _check_index(index: Mapping[str, str], tensors: Mapping[str, TensorInfo], path: str) -> None:
    for name, shard in index.items():
        tensor = tensors.get(name)
        if tensor is None:
            raise SourceError(f"lists {name!r} in {shard}, which does not hold it", path=path)
        if tensor.file != shard:
            raise SourceError(f"lists {name!r} in {shard}, but it is in {tensor.file}", path=path)
    for name in tensors.keys() - index.keys() if len(tensors) > len(index) else ():
        raise SourceError(f"does not list {name!r}, which {tensors[name].file} holds", path=path)
