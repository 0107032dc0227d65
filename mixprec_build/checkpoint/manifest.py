"""The schema of what a build leaves beside its weights, version 1.

``config.json`` gets ``quantization_config``, small and complete: the formats with their parameters and, as
patterns, which module has which (the last matching line wins, as in a recipe). ``mixprec_manifest.json``
lists every module and tensor with its source and checksum, so that a checkpoint can be verified.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from operator import itemgetter
from pathlib import Path, PureWindowsPath
from reprlib import repr as brief
from typing import Any

import xxhash

from ..errors import SourceError, VerifyError
from ..storage.disk import inside, read_regular
from ..storage.header import TensorInfo
from ..storage.limits import load_json
from ..text import hide_password
from .declaration import VERSION

__all__ = [
    "CHECKSUM",
    "MANIFEST",
    "checksum_of",
    "dump_manifest",
    "layout_of",
    "merged_files",
    "read_manifest",
    "tensor_differences",
    "tensor_entries",
]

MANIFEST = "mixprec_manifest.json"
CHECKSUM = "xxh3_128"

_MAX_BYTES = 128 << 20
_MAX_VALUES = 8_000_000  # a tensor takes 19
_MAX_SOURCES = 100
_MAX_TEXT = 4096  # as long as a path may be

_SHARD_NAME = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
_RANK = re.compile(r"presplit/tp\d{1,4}-ep\d{1,4}(-dp\d{1,4})?/rank-\d{1,4}-of-\d{1,4}")

# The fields that are read back, and what they must be.
_SOURCE = {"location": str, "path": str | None, "commit": str | None}
_FILE = {"bytes": int, CHECKSUM: str}
_SHARD = {"bytes": int, "header": str}
_TENSOR = {"dtype": str, "shape": list, "bytes": int, "file": str, "source": str, CHECKSUM: str}
_texts_of = itemgetter("dtype", "file", "source", CHECKSUM)


def checksum_of(data: bytes | memoryview) -> str:
    return str(xxhash.xxh3_128_hexdigest(data))


def dump_manifest(manifest: Mapping[str, Any]) -> Iterator[bytes]:
    """JSON with one module a line, piece by piece: a manifest of 100,000 tensors stays readable and diffable.

    Its last line holds the checksum of all before it, so that a manifest that was damaged does not pass for
    a checkpoint that was.
    """
    digest = xxhash.xxh3_128()
    for text in _manifest_text(manifest):
        # A path that is no UTF-8 has lone surrogates here; escaped by a backslash they are JSON again.
        data = text.encode(errors="backslashreplace")
        digest.update(data)
        yield data
    yield _seal(digest.hexdigest())


def _manifest_text(manifest: Mapping[str, Any]) -> Iterator[str]:
    before = "{\n"
    for key, value in manifest.items():
        if key != "modules":
            yield f"{before} {json.dumps(key)}: {json.dumps(value, indent=1, ensure_ascii=False)}"
            before = ",\n"
    before += ' "modules": {\n'
    for name, entry in manifest["modules"]:
        yield f"{before}  {json.dumps(name)}: {json.dumps(entry, separators=(',', ':'), ensure_ascii=False)}"
        before = ",\n"
    yield "\n },\n"


def _seal(checksum: str) -> bytes:
    """The last lines of a manifest, with the checksum of those before."""
    return f' "manifest_{CHECKSUM}": "{checksum}"\n}}\n'.encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a compiled checkpoint, every field that is used checked for its type.

    Raises:
        VerifyError: there is none, or none that is whole.
    """
    path = hide_password(str(folder / MANIFEST))
    if not (folder / MANIFEST).exists():
        raise VerifyError(f"{path}: not there; this is for what `mixprec build` wrote")
    try:
        data = read_regular(inside(folder, MANIFEST), _MAX_BYTES)
        manifest = load_json(data, _MAX_VALUES)
        if manifest["version"] != VERSION or manifest["checksum"] != CHECKSUM:
            raise VerifyError(f"{path}: version {brief(manifest['version'])}; this mixprec reads version {VERSION}")
        body = memoryview(data)[: -len(_seal(checksum_of(b"")))]
        if data[len(body) :] != _seal(checksum_of(body)):
            raise VerifyError(f"{path}: was changed after it was written; build the checkpoint again")
        _check_fields(manifest)
    except SourceError as error:
        raise VerifyError(str(error)) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise VerifyError(f"{path}: damaged: {error!r:.500}; build the checkpoint again") from error
    return dict(manifest)


def tensor_entries(manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a manifest says of each tensor, by its name."""
    return {name: entry for module in manifest["modules"].values() for name, entry in module["tensors"].items()}


def tensor_differences(
    manifest: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, Mapping[str, Any] | None, TensorInfo | None]]:
    """Where headers tell of other tensors than the manifest: a name, its entry, and what headers say; None for what is
    missing."""
    recorded = tensor_entries(manifest)
    for name, entry in recorded.items():
        info = tensors.get(name)
        if info is None or (info.dtype, list(info.shape), info.file) != (entry["dtype"], entry["shape"], entry["file"]):
            yield name, entry, info
    for name in tensors.keys() - recorded.keys():
        yield name, None, tensors[name]


def layout_of(manifest: Mapping[str, Any]) -> str:
    """``merged``, ``presplit`` (files cut for ranks only) or ``both``."""
    return str(manifest.get("layout", "both" if manifest.get("presplit") else "merged"))


def merged_files(manifest: Mapping[str, Any]) -> list[str]:
    """The names of the safetensors files of the whole model, whether they were dropped or not."""
    return [name for name, entry in manifest["files"].items() if "header" in entry]


def _check_fields(manifest: Mapping[str, Any]) -> None:
    """Raises ``ValueError``, ``KeyError`` or ``TypeError`` where a manifest is not what ``build_manifest`` makes."""
    from ..formats.registry import format_from_json

    for section in ("sources", "formats", "files", "modules"):
        _check_type(manifest[section], dict, section)
    if len(manifest["sources"]) > _MAX_SOURCES:
        raise ValueError(f"more than {_MAX_SOURCES} sources")
    for source in manifest["sources"].values():
        _check_entry(source, _SOURCE)
    for name, file in manifest["files"].items():
        pure = PureWindowsPath(name)  # also takes backslashes and drives for what they are
        if pure.anchor or ".." in pure.parts:
            raise ValueError(f"the file {name[:200]!r} is not in this folder")
        _check_entry(file, _SHARD if "header" in file else _FILE)
        if "header" in file and not _SHARD_NAME.fullmatch(name):
            raise ValueError(f"{name[:200]!r} is no name of a merged file")
    for fmt in manifest["formats"].values():
        format_from_json(fmt)
    for module in manifest["modules"].values():
        _check_type(module["tensors"], dict, "tensors")
        for tensor in module["tensors"].values():
            if _is_as_built(tensor):
                continue
            _check_entry(tensor, _TENSOR)
            if not all(type(n) is int for n in tensor["shape"]):
                raise ValueError("a shape holds more than whole numbers")
        if module["format"] not in manifest["formats"]:
            raise ValueError(f"format {brief(module['format'])} is not declared")
    presplit = manifest.get("presplit", {})
    _check_type(presplit, dict, "presplit")
    for name, rank in presplit.items():
        if not _RANK.fullmatch(name):
            raise ValueError(f"{brief(name)} is no name of a rank's folder")
        _check_entry(rank, _FILE)
    if "layout" in manifest:
        if manifest["layout"] != "presplit":
            raise ValueError(f"the layout {brief(manifest['layout'])}")
        _check_entry(manifest["rest"], _FILE)
    unservable = manifest.get("unservable", [])
    _check_type(unservable, list, "unservable")
    for problem in unservable:
        _check_type(problem, str, "unservable")


def _is_as_built(tensor: Any) -> bool:
    """Whether an entry passes all checks, at a glance: of one that does not, they say what is wrong."""
    try:
        texts = "".join(_texts_of(tensor))  # which takes nothing but strings
        nbytes, shape = tensor["bytes"], tensor["shape"]
    except (KeyError, TypeError):
        return False
    for n in shape if type(shape) is list else (None,):
        if type(n) is not int:
            return False
    return len(texts) <= _MAX_TEXT and type(nbytes) is int and 0 <= nbytes < 1 << 63


def _check_entry(entry: Any, fields: Mapping[str, Any]) -> None:
    _check_type(entry, dict, "an entry")
    for name, kind in fields.items():
        value = entry[name]
        _check_type(value, kind, name)
        if isinstance(value, int) and not 0 <= value < 1 << 63:
            raise ValueError(f"{name} is {value}")
        if isinstance(value, str) and len(value) > _MAX_TEXT:
            raise ValueError(f"{name} has {len(value)} characters")


def _check_type(value: object, kind: Any, name: str) -> None:
    """``kind`` is what ``isinstance`` takes."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {type(value).__name__}")
