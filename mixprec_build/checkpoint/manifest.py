"""``mixprec_manifest.json``, version 1: every file, module and tensor of a build with its source and checksum.

It is parsed and checked once, into :class:`Manifest`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from reprlib import repr as brief
from sys import intern
from typing import Any, NamedTuple, TypeVar

import xxhash

from ..errors import OutputError, SourceError, VerifyError
from ..formats.base import Format
from ..formats.registry import format_from_json
from ..storage.disk import inside, read_regular, source_errors
from ..storage.header import TensorInfo
from ..storage.limits import load_json
from ..text import hide_password
from .declaration import VERSION
from .degree import rank_of

__all__ = [
    "CHECKSUM",
    "MANIFEST",
    "FileEntry",
    "Manifest",
    "ManifestHead",
    "ModuleEntry",
    "RankEntry",
    "SourceEntry",
    "TensorEntry",
    "check_outside",
    "checksum_of",
    "dump_manifest",
    "is_new_manifest",
    "new_manifest",
    "read_head",
    "read_manifest",
]

MANIFEST = "mixprec_manifest.json"
CHECKSUM = "xxh3_128"
"""The algorithm of all checksums, and their key in the JSON."""

_Read = TypeVar("_Read")

_MAX_BYTES = 1 << 30  # enough for the most tensors that `opening` reads; one of 500,000 takes 145 MB
_MAX_VALUES = 40_000_000  # a tensor takes 19 and more, with its module
_MAX_SOURCES = 100
_MAX_TEXT = 4096  # as long as a path may be

_NEW = re.compile(rf"\.{re.escape(MANIFEST)}(?:\.tp[-\w]{{1,100}})?\.new", re.ASCII)
_SHARD_NAME = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
_TENSOR_KEYS = {"dtype", "shape", "bytes", "file", "source", CHECKSUM}


class TensorEntry(NamedTuple):
    """A tensor of the output, and the source that it was copied from."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str
    source: str
    checksum: str

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorEntry:
        """Raises ``KeyError``, ``TypeError`` or ``ValueError`` if ``data`` is malformed."""
        sizes = data["shape"]
        if type(sizes) is not list:
            raise TypeError(f"shape is {type(sizes).__name__}")
        if {*map(type, sizes)} - {int}:
            raise ValueError("a shape holds more than whole numbers")
        dtype, file, source = [intern(_text(data[key], key)) for key in ("dtype", "file", "source")]
        return cls(dtype, _shared(tuple(sizes)), _size(data["bytes"]), file, source, _text(data[CHECKSUM], CHECKSUM))

    def to_json(self) -> dict[str, object]:
        return {
            "dtype": self.dtype,
            "shape": self.shape,
            "bytes": self.nbytes,
            "file": self.file,
            "source": self.source,
            CHECKSUM: self.checksum,
        }


class ModuleEntry(NamedTuple):
    """A module of the output: the name of its format, the shape of the weight it stands for, its tensors by name."""

    format: str
    shape: tuple[int, ...]
    tensors: Mapping[str, TensorEntry]

    def to_json(self) -> dict[str, object]:
        tensors = {name: tensor.to_json() for name, tensor in self.tensors.items()}
        return {"format": self.format, "shape": self.shape, "tensors": tensors}


class SourceEntry(NamedTuple):
    """The place of a source: ``path`` is the folder of a local one, ``commit`` the commit of one on the hub."""

    location: str
    path: str | None
    commit: str | None

    @property
    def place(self) -> str:
        """Its folder, or its hub id at the commit that it was built from."""
        repository = self.location.partition("@")[0]
        return self.path or (f"{repository}@{self.commit}" if self.commit else repository)


class FileEntry(NamedTuple):
    """A file of the output. ``checksum`` is that of a shard's header, whose tensors have their own, or of the file."""

    nbytes: int
    checksum: str
    shard: bool


class RankEntry(NamedTuple):
    """A folder of one rank's files: their bytes, and the checksum of its index."""

    nbytes: int
    checksum: str

    def to_json(self) -> dict[str, object]:
        return {"bytes": self.nbytes, CHECKSUM: self.checksum}


@dataclass(frozen=True, slots=True)
class ManifestHead:
    """The manifest of a compiled checkpoint without its modules, which are nearly all of its text."""

    head: Mapping[str, Any]
    """All sections but the modules, as JSON. Unknown keys are kept when the manifest is written again."""
    sources: Mapping[str, SourceEntry]
    formats: Mapping[str, Format]
    files: Mapping[str, FileEntry]
    ranks: Mapping[str, RankEntry]
    """Folder, such as ``presplit/tp4-ep1/rank-0-of-4`` -> its entry."""
    rest: RankEntry | None
    """The folder of what is kept of merged files that were dropped; None where they were not."""
    checksum: str
    """The manifest's checksum. It covers the checksums of all tensors: equal values mean equal checkpoints."""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ManifestHead:
        """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where it is not what :func:`dump_manifest` writes."""
        return cls(**_head_of(data))

    @property
    def layout(self) -> str:
        """``merged``, ``presplit`` (files cut for ranks only) or ``both``."""
        return "presplit" if self.rest is not None else "both" if self.ranks else "merged"

    @property
    def shards(self) -> dict[str, FileEntry]:
        """The merged files, whether they were dropped or not."""
        return {name: entry for name, entry in self.files.items() if entry.shard}

    @property
    def unservable(self) -> list[str]:
        """Reasons why SGLang could not serve it, which were allowed when it was built."""
        return list(self.head.get("unservable", []))

    @property
    def planned_for(self) -> str:
        """The release of SGLang that it was planned for; empty where an older mixprec did not record it."""
        return str(self._sglang.get("planned_for", ""))

    @property
    def needs(self) -> dict[str, list[str]]:
        """Rule that only some releases of SGLang keep -> patterns of the modules that need it."""
        return {str(name): [str(one) for one in of] for name, of in dict(self._sglang.get("needs", {})).items()}

    @property
    def _sglang(self) -> Mapping[str, Any]:
        recorded: Mapping[str, Any] = _object(self.head.get("sglang", {}), "sglang")
        return recorded

    @property
    def drops_mtp(self) -> bool:
        """Whether draft layers were left out with ``--drop-mtp``."""
        return self.head.get("drop_mtp") is True


@dataclass(frozen=True, slots=True)
class Manifest(ManifestHead):
    """The manifest of a compiled checkpoint."""

    modules: Mapping[str, ModuleEntry]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Manifest:
        """As :meth:`ManifestHead.from_json`."""
        head = _head_of(data)
        modules = _object(data["modules"], "modules")
        return cls(**head, modules={name: _module(entry, head["formats"]) for name, entry in modules.items()})

    def tensors(self) -> dict[str, TensorEntry]:
        """All tensors by name."""
        return {name: tensor for module in self.modules.values() for name, tensor in module.tensors.items()}

    def differences(
        self, stored: Mapping[str, TensorInfo]
    ) -> Iterator[tuple[str, TensorEntry | None, TensorInfo | None]]:
        """Yields tensors whose headers differ from the manifest: name, entry and header, None for a missing one."""
        recorded = self.tensors()
        for name, entry in recorded.items():
            info = stored.get(name)
            if info is None or (info.dtype, info.shape, info.file) != (entry.dtype, entry.shape, entry.file):
                yield name, entry, info
        for name in stored.keys() - recorded.keys():
            yield name, None, stored[name]

    def listing(self, ranks: Mapping[str, RankEntry], rest: RankEntry | None) -> Manifest:
        """A copy of the manifest with these folders of ranks, and with ``rest`` if merged files were dropped."""
        head = {key: value for key, value in self.head.items() if key not in ("presplit", "layout", "rest")}
        ranks = dict(sorted(ranks.items()))
        if ranks:
            head["presplit"] = {name: entry.to_json() for name, entry in ranks.items()}
        if rest is not None:
            head |= {"layout": "presplit", "rest": rest.to_json()}
        return replace(self, head=head, ranks=ranks, rest=rest)

    def dump(self) -> Iterator[bytes]:
        """Yields its text, as :func:`dump_manifest`."""
        return dump_manifest(self.head, self.modules.items())


def new_manifest(rank: str | None = None) -> str:
    """The file that a manifest is written into before it replaces the old one.

    Commands that each cut other ranks may do so at the same time: ``rank`` is a folder that only this one writes.
    """
    return f".{MANIFEST}.new" if rank is None else f".{MANIFEST}.{rank.partition('/')[2].replace('/', '-')}.new"


def is_new_manifest(name: str) -> bool:
    """Whether :func:`new_manifest` returns this name."""
    return _NEW.fullmatch(name) is not None


def check_outside(path: Path) -> None:
    """Raises :class:`OutputError` for a place within a compiled checkpoint, whose verification would find it there."""
    for folder in path.absolute().parents:
        if (folder / MANIFEST).is_file():
            raise OutputError(
                f"{path}: lies in {folder}, a checkpoint that mixprec built, and would be a difference to `mixprec "
                "verify`; name a place outside of it"
            )


def checksum_of(data: bytes | memoryview) -> str:
    """The hexadecimal :data:`CHECKSUM` of some bytes."""
    return str(xxhash.xxh3_128_hexdigest(data))


def dump_manifest(head: Mapping[str, Any], modules: Iterable[tuple[str, ModuleEntry]]) -> Iterator[bytes]:
    """Yields pieces of JSON with one module a line, so that a manifest of 100,000 tensors stays readable and diffable.

    Its last line has the checksum of all before it, so that a damaged manifest is not taken for a damaged checkpoint.
    Modules are taken one at a time: all at once would need more memory than the build.
    """
    digest = xxhash.xxh3_128()
    for text in _manifest_text(head, modules):
        # A path that is no UTF-8 has lone surrogates here; escaped by a backslash they are JSON again.
        data = text.encode(errors="backslashreplace")
        digest.update(data)
        yield data
    yield _seal(digest.hexdigest())


def _manifest_text(head: Mapping[str, Any], modules: Iterable[tuple[str, ModuleEntry]]) -> Iterator[str]:
    before = "{\n"
    for key, value in head.items():
        yield f"{before} {json.dumps(key)}: {json.dumps(value, indent=1, ensure_ascii=False)}"
        before = ",\n"
    before = _BEFORE_MODULES.decode()
    for name, entry in modules:
        text = json.dumps(entry.to_json(), separators=(",", ":"), ensure_ascii=False)
        yield f"{before}  {json.dumps(name)}: {text}"
        before = ",\n"
    yield "\n },\n"


_BEFORE_MODULES = b',\n "modules": {\n'
"""The end of the head. A source may be named so as well, but no line of a module, which has two spaces, begins so."""
_SEAL_KEY = f"manifest_{CHECKSUM}"


def _seal(checksum: str) -> bytes:
    """The last lines of a manifest, with the checksum of those before."""
    return f' "{_SEAL_KEY}": "{checksum}"\n}}\n'.encode()


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of a compiled checkpoint and checks the types of its fields.

    Raises:
        VerifyError: there is none, or it is damaged, was changed, or is of another version.
    """

    def parse(data: bytes) -> Any:
        # Each tensor becomes a tuple as it is read: dictionaries of them all would take five times the memory.
        return load_json(data, _MAX_VALUES, object_hook=_tensor_or_object)

    return _read(folder, parse, Manifest.from_json)


def read_head(folder: Path) -> ManifestHead:
    """As :func:`read_manifest`, but parses no modules, whose text is only compared with the checksum."""

    def parse(data: bytes) -> Any:
        head, found, _ = data.rpartition(_BEFORE_MODULES)
        return load_json(head + b"}" if found else data, _MAX_VALUES)

    return _read(folder, parse, ManifestHead.from_json)


def _read(folder: Path, parse: Callable[[bytes], Any], convert: Callable[[Any], _Read]) -> _Read:
    path = hide_password(str(folder / MANIFEST))
    try:
        with source_errors(folder / MANIFEST):
            there = (folder / MANIFEST).exists()
        if not there:
            raise VerifyError(f"{path}: not there; this is for what `mixprec build` wrote")
        data = read_regular(inside(folder, MANIFEST), _MAX_BYTES)
        manifest = parse(data)
        if manifest["version"] != VERSION or manifest["checksum"] != CHECKSUM:
            raise VerifyError(f"{path}: version {brief(manifest['version'])}; this mixprec reads version {VERSION}")
        body = memoryview(data)[: -len(_seal(checksum_of(b"")))]
        manifest[_SEAL_KEY] = checksum_of(body)
        if data[len(body) :] != _seal(manifest[_SEAL_KEY]):
            raise VerifyError(f"{path}: was changed after it was written; build the checkpoint again")
        return convert(manifest)
    except SourceError as error:
        raise VerifyError(str(error)) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise VerifyError(f"{path}: damaged: {error!r:.500}; build the checkpoint again") from error
    except MemoryError:
        raise VerifyError(f"{path}: reading it takes more memory than this process has") from None


@lru_cache(maxsize=4096)
def _shared(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The same tuple for each of many tensors that have a shape."""
    return shape


def _tensor_or_object(data: dict[str, Any]) -> dict[str, Any] | TensorEntry:
    return TensorEntry.from_json(data) if data.keys() == _TENSOR_KEYS else data


def _head_of(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of :class:`ManifestHead`. Raises as its ``from_json``."""
    sections = {key: _object(data[key], key) for key in ("sources", "formats", "files")}
    if len(sections["sources"]) > _MAX_SOURCES:
        raise ValueError(f"more than {_MAX_SOURCES} sources")
    layout = data.get("layout")
    if layout not in (None, "presplit"):
        raise ValueError(f"the layout {brief(layout)}")
    unservable = data.get("unservable", [])
    if not isinstance(unservable, list):
        raise TypeError(f"unservable is {type(unservable).__name__}")
    for problem in unservable:
        _text(problem, "unservable", most=1 << 20)
    return {
        "head": {key: value for key, value in data.items() if key not in ("modules", _SEAL_KEY)},
        "sources": {name: _source(entry) for name, entry in sections["sources"].items()},
        "formats": {intern(str(name)): format_from_json(fmt) for name, fmt in sections["formats"].items()},
        "files": {name: _file(name, entry) for name, entry in sections["files"].items()},
        "ranks": {name: _rank(entry, name) for name, entry in _object(data.get("presplit", {}), "presplit").items()},
        "rest": None if layout is None else _rank(data["rest"]),
        "checksum": data[_SEAL_KEY],
    }


def _module(data: Any, formats: Mapping[str, Format]) -> ModuleEntry:
    tensors = _object(_object(data, "a module")["tensors"], "tensors")
    for entry in tensors.values():
        if type(entry) is not TensorEntry:
            TensorEntry.from_json(_object(entry, "an entry"))  # raises, and says what it lacks
            raise ValueError("an entry has more than a tensor's keys")
    if data["format"] not in formats:
        raise ValueError(f"format {brief(data['format'])} is not declared")
    return ModuleEntry(intern(data["format"]), tuple(data.get("shape", ())), tensors)


def _source(data: Any) -> SourceEntry:
    entry = _object(data, "an entry")
    place = (None if entry[key] is None else _text(entry[key], key) for key in ("path", "commit"))
    return SourceEntry(_text(entry["location"], "location"), *place)


def _file(name: str, data: Any) -> FileEntry:
    pure = PureWindowsPath(name)  # recognises backslashes and drives as well
    if pure.anchor or ".." in pure.parts:
        raise ValueError(f"the file {name[:200]!r} is not in this folder")
    entry = _object(data, "an entry")
    key = "header" if "header" in entry else CHECKSUM
    if key == "header" and not _SHARD_NAME.fullmatch(name):
        raise ValueError(f"{name[:200]!r} is no name of a merged file")
    return FileEntry(_size(entry["bytes"]), _text(entry[key], key), key == "header")


def _rank(data: Any, name: str | None = None) -> RankEntry:
    if name is not None:
        rank_of(name)
    entry = _object(data, "an entry")
    return RankEntry(_size(entry["bytes"]), _text(entry[CHECKSUM], CHECKSUM))


def _object(value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"{name} is {type(value).__name__}")
    return value


def _text(value: Any, name: str, most: int = _MAX_TEXT) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} is {type(value).__name__}")
    if len(value) > most:
        raise ValueError(f"{name} has {len(value)} characters")
    return value


def _size(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"bytes is {type(value).__name__}")
    if not 0 <= value < 1 << 63:
        raise ValueError(f"bytes is {value}")
    return value
