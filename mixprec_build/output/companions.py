"""Writes the files beside the weights: config, index, manifest, tokenizer and the like."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import xxhash

from ..checkpoint.checkpoint import INDEX
from ..checkpoint.declaration import VERSION, name_formats, quantization_config
from ..checkpoint.declared import without_declarations
from ..checkpoint.manifest import CHECKSUM, FileEntry, ModuleEntry, TensorEntry, checksum_of
from ..families.draft_layers import with_declared_drafts
from ..families.mistral_config import PROCESSOR_FILES, processor_of
from ..planning.companions import CARD
from ..planning.types import Plan
from ..storage.disk import read_chunks, write_errors
from ..storage.header import json_text
from ..versions import __version__
from .card import card

__all__ = ["files_of_own", "manifest_head", "module_entries", "write_companions", "write_file"]


def manifest_head(plan: Plan, folder: Path, files: Mapping[str, FileEntry]) -> dict[str, Any]:
    """The sections of the manifest other than ``modules``.

    Args:
        folder: where the build's shards are.
        files: the build's other files.
    """
    names = name_formats(module.format for module in plan.modules.values())
    return {
        "version": VERSION,
        "mixprec": __version__,
        "sglang": {"planned_for": plan.sglang, "needs": {name: list(of) for name, of in plan.needs.items()}},
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
        **({"drop_mtp": True} if plan.drafts.dropped else {}),
        "left_out": [asdict(left_out) for left_out in plan.left_out],
        "formats": {name: fmt.to_json() for fmt, name in names.items()},
        "files": {
            **{name: {"bytes": file.nbytes, CHECKSUM: file.checksum} for name, file in sorted(files.items())},
            **{shard.file: _shard_entry(folder / shard.file) for shard in plan.shards},
        },
    }


def module_entries(plan: Plan, checksums: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, ModuleEntry]]:
    """Yields the manifest's modules. ``checksums``: file -> tensor -> hexadecimal xxh3_128."""
    names = name_formats(module.format for module in plan.modules.values())
    shard_of = {tensor.info.name: shard.file for shard in plan.shards for tensor in shard.tensors}
    for module in plan.modules.values():
        tensors = {}
        for source, info in module.tensors.values():
            file = shard_of[info.name]
            checksum = checksums[file][info.name]
            tensors[info.name] = TensorEntry(info.dtype, info.shape, info.nbytes, file, source, checksum)
        yield module.name, ModuleEntry(names[module.format], module.shape, tensors)


def _shard_entry(path: Path) -> dict[str, object]:
    """A shard's size and the checksum of its header; its tensors have their own."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(0)
        return {"bytes": os.fstat(file.fileno()).st_size, "header": checksum_of(file.read(8 + length))}


def write_companions(
    plan: Plan, stage: Path, companions: Mapping[str, Path], *, with_card: bool = True
) -> dict[str, FileEntry]:
    """Writes config, index, copies of the ``companions`` and the model card; returns their entries of the manifest.

    The card of the model, if it is among the companions, is kept in the new one; without one it is not copied.
    """
    drafts = plan.drafts
    like = None if drafts.source is None else plan.sources.by_name[drafts.source].facts.config
    config = with_declared_drafts(without_declarations(plan.sources.model.facts.config), drafts.layers, like)
    config["quantization_config"] = quantization_config({name: m.format for name, m in plan.modules.items()})
    written = {
        **{name: write_file(stage / name, read_chunks(path)) for name, path in companions.items() if name != CARD},
        "config.json": write_file(stage / "config.json", [_json(config)]),
        INDEX: write_file(stage / INDEX, _index(plan)),
        **{name: write_file(stage / name, [_json(data)]) for name, data in files_of_own(plan, companions).items()},
    }
    if with_card:
        written[CARD] = write_file(stage / CARD, card(plan, written, companions.get(CARD)))
    return written


def files_of_own(plan: Plan, companions: Mapping[str, Path]) -> dict[str, object]:
    """Files that SGLang needs beside a ``config.json`` and not in Mistral's own layout -> their contents, as JSON."""
    model = plan.sources.model
    if not model.own_layout or not companions.keys().isdisjoint(PROCESSOR_FILES):
        return {}
    processor = processor_of(model.facts.config)
    return {} if processor is None else {PROCESSOR_FILES[0]: processor}


def _index(plan: Plan) -> Iterator[bytes]:
    """Yields the index, as ``json.dumps`` with an indent of 2 would write it."""
    files = sorted((tensor.info.name, shard.file) for shard in plan.shards for tensor in shard.tensors)
    yield f'{{\n  "metadata": {{\n    "total_size": {plan.tensor_bytes}\n  }},\n  "weight_map": {{'.encode()
    before = "\n"
    for name, file in files:
        yield f"{before}    {json_text(name)}: {json_text(file)}".encode()
        before = ",\n"
    yield b"\n  }\n}\n"


def _json(data: object) -> bytes:
    # A lone surrogate, which JSON can hold and UTF-8 cannot, becomes the escape it was read from.
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


def write_file(path: Path, chunks: Iterable[bytes]) -> FileEntry:
    """Writes chunks to a new file and syncs it; returns its entry of the manifest. Raises :class:`WriteError`."""
    digest, size = xxhash.xxh3_128(), 0
    with write_errors(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with os.fdopen(fd, "wb") as file:
            for chunk in chunks:
                digest.update(chunk)
                size += len(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(fd)
    return FileEntry(size, digest.hexdigest(), False)
