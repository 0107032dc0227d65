"""The files beside the weights: config, index, manifest, and what comes with the model."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import INDEX
from ..checkpoint.declaration import VERSION, name_formats, quantization_config
from ..checkpoint.declared import DECLARATION_FILES, without_declarations
from ..checkpoint.manifest import CHECKSUM, MANIFEST, ModuleEntry, TensorEntry, checksum_of
from ..planning.types import Plan
from ..storage.disk import read_regular, write_errors
from ..versions import __version__

if TYPE_CHECKING:
    pass

__all__ = ["companion_files", "manifest_head", "module_entries", "write_companions", "write_file"]


def manifest_head(plan: Plan, folder: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    """The manifest's sections but the modules.

    The build's shards lie in ``folder``; ``files`` are the contents of its other files.
    """
    names = name_formats(module.format for module in plan.modules.values())
    return {
        "version": VERSION,
        "mixprec": __version__,
        "checksum": CHECKSUM,
        "sources": {
            name: {
                "location": source.location,
                "path": source.checkpoint.folder,
                "commit": source.checkpoint.commit,
            }
            for name, source in plan.sources.by_name.items()
        },
        "unservable": list(plan.unservable),
        "problems": [problem.to_json() for problem in plan.problems],
        "left_out": [asdict(left_out) for left_out in plan.left_out],
        "formats": {name: fmt.to_json() for fmt, name in names.items()},
        "files": {
            **{name: {"bytes": len(data), CHECKSUM: checksum_of(data)} for name, data in sorted(files.items())},
            **{shard.file: _shard_entry(folder / shard.file) for shard in plan.shards},
        },
    }


def module_entries(plan: Plan, checksums: Mapping[tuple[str, str], str]) -> Iterator[tuple[str, ModuleEntry]]:
    """The manifest's modules, one at a time; ``checksums`` are those of ``(source, tensor)``."""
    names = name_formats(module.format for module in plan.modules.values())
    shard_of = {tensor.info.name: shard.file for shard in plan.shards for tensor in shard.tensors}
    for module in plan.modules.values():
        tensors = {
            tensor.info.name: TensorEntry(
                tensor.info.dtype,
                tensor.info.shape,
                tensor.info.nbytes,
                shard_of[tensor.info.name],
                tensor.source,
                checksums[tensor.source, tensor.info.name],
            )
            for tensor in module.tensors.values()
        }
        yield module.name, ModuleEntry(names[module.format], module.shape, tensors)


def _shard_entry(path: Path) -> dict[str, object]:
    """A shard's size and the checksum of its header; its tensors have their own."""
    with path.open("rb") as file:
        first = file.read(8)
        header = first + file.read(int.from_bytes(first, "little"))
        return {"bytes": os.fstat(file.fileno()).st_size, "header": checksum_of(header)}


# Left behind by other tools: they describe the source's quantization, not the output's.
_STALE = {"config.json", INDEX, MANIFEST, *DECLARATION_FILES}
_KEPT_SUFFIXES = {".json", ".jinja", ".model", ".py", ".tiktoken", ".txt", ".vocab"}
_KEPT_NAMES = {"LICENSE", "LICENCE", "NOTICE", "USE_POLICY.md"}


def companion_files(plan: Plan) -> list[str]:
    """Tokenizer, generation config, chat template, license, ... of the model's checkpoint; never weights."""
    return sorted(
        name
        for name in plan.sources.model.storage.files
        if "/" not in name
        and name not in _STALE
        and not name.endswith(".index.json")
        and (Path(name).suffix in _KEPT_SUFFIXES or name in _KEPT_NAMES)
    )


# The files beside the weights


def write_companions(plan: Plan, stage: Path, companions: Mapping[str, Path]) -> dict[str, bytes]:
    """Writes config, index and what comes with the model; returns what they hold."""
    config = without_declarations(plan.sources.model.config)
    config["quantization_config"] = quantization_config({name: m.format for name, m in plan.modules.items()})
    weight_map = {tensor.info.name: shard.file for shard in plan.shards for tensor in shard.tensors}
    index = {"metadata": {"total_size": plan.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    contents: dict[str, bytes] = {name: read_regular(path) for name, path in companions.items()}
    contents["config.json"] = _json(config)
    contents[INDEX] = _json(index)
    for name, data in contents.items():
        write_file(stage / name, [data])
    return contents


def _json(data: object) -> bytes:
    # A lone surrogate, which JSON can hold and UTF-8 cannot, becomes the escape it was read from.
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


# Disk


def write_file(path: Path, chunks: Iterable[bytes]) -> None:
    with write_errors(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with os.fdopen(fd, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(fd)
