"""Plan -> files. Obeys; decides nothing.

Everything is written into a hidden folder beside the output, synced, and renamed: the output appears whole or
not at all.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

from .checkpoint import INDEX, LocalFolder
from .copier import Copier, Progress, pwrite_all, write_errors
from .errors import OutputError, WriteError
from .manifest import MANIFEST, build_manifest, dump_manifest, quantization_config
from .plan import Plan

__all__ = ["check_output", "companion_files", "fetch", "write"]

# Left behind by other tools: they describe the source's quantization, not the output's.
_STALE = {"config.json", INDEX, "quantize_config.json", "quant_config.json", "hf_quant_config.json", MANIFEST}
_KEPT_SUFFIXES = {".json", ".jinja", ".model", ".py", ".tiktoken", ".txt", ".vocab"}
_KEPT_NAMES = {"LICENSE", "LICENCE", "NOTICE", "USE_POLICY.md"}


def check_output(plan: Plan, out: Path, *, force: bool) -> None:
    """Refuses an output folder that holds something else or overlaps a source. Raises :class:`OutputError`."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out}: is a file; name a folder")
    if out.is_dir() and any(out.iterdir()):
        if not force:
            raise OutputError(f"{out}: exists and is not empty; pass --force to replace it, or name another folder")
        if not (out / MANIFEST).is_file():
            raise OutputError(
                f"{out}: holds files that mixprec did not write; remove it yourself or name another folder"
            )
    target = out.resolve()
    for source in plan.sources.by_name.values():
        storage = source.checkpoint.storage
        if not isinstance(storage, LocalFolder):
            continue
        folder = storage.folder.resolve()
        if target == folder or target in folder.parents or folder in target.parents:
            raise OutputError(f"{out}: overlaps the source `{source.name}` ({folder}); name another folder")


def fetch(plan: Plan) -> dict[tuple[str, str], Path]:
    """Brings the source files a plan needs to this machine: ``(source, file)`` -> path."""
    needed: dict[str, set[str]] = {}
    for shard in plan.shards:
        for tensor in shard.tensors:
            needed.setdefault(tensor.source, set()).add(tensor.info.file)
    return {
        (source, file): path
        for source, files in needed.items()
        for file, path in plan.sources.by_name[source].checkpoint.storage.fetch(sorted(files)).items()
    }


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


def write(
    plan: Plan, out: Path, *, force: bool = False, jobs: int | None = None, progress: Progress | None = None
) -> Path:
    """Writes the checkpoint and returns the path of its manifest. ``progress`` is called with bytes done.

    Raises:
        OutputError: ``out`` is in use.
        SourceError: a source cannot be read or has changed since it was planned.
        WriteError: the disk is full, fails, or forbids it.
    """
    check_output(plan, out, force=force)
    paths = fetch(plan)
    companions = plan.sources.model.storage.fetch(companion_files(plan))
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = out.parent / f".{out.name}.mixprec-{secrets.token_hex(4)}"
    try:
        with write_errors(stage):
            stage.mkdir()
            _check_space(plan, stage)
            checksums = Copier(plan, paths, stage, progress or (lambda _: None)).run(
                jobs or min(8, os.cpu_count() or 1)
            )
            files = _write_companions(plan, stage, companions)
            _write_file(stage / MANIFEST, dump_manifest(build_manifest(plan, stage, checksums, files)))
            _sync(stage)
            _publish(stage, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return out / MANIFEST


# The files beside the weights


def _write_companions(plan: Plan, stage: Path, companions: Mapping[str, Path]) -> dict[str, bytes]:
    """Writes config, index and what comes with the model; returns what they hold."""
    config = {
        key: value
        for key, value in plan.sources.model.config.items()
        if key not in ("quantization_config", "compression_config")
    }
    config["quantization_config"] = quantization_config({name: m.format for name, m in plan.modules.items()})
    weight_map = {tensor.info.name: shard.file for shard in plan.shards for tensor in shard.tensors}
    index = {"metadata": {"total_size": plan.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    contents: dict[str, bytes] = {name: path.read_bytes() for name, path in companions.items()}
    contents["config.json"] = _json(config)
    contents[INDEX] = _json(index)
    for name, data in contents.items():
        _write_file(stage / name, data)
    return contents


def _json(data: object) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()


# Disk


def _check_space(plan: Plan, stage: Path) -> None:
    need = sum(shard.file_bytes(plan.sources) for shard in plan.shards if shard.link is None)
    free = os.statvfs(stage)
    have = free.f_bavail * free.f_frsize
    if need > have:
        raise WriteError(f"{stage.parent}: {need} bytes are needed, {have} are free; nothing was written")


def _write_file(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        pwrite_all(fd, memoryview(data), 0)
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _publish(stage: Path, out: Path) -> None:
    """The finished folder takes its name by one rename; a folder it replaces goes first, and last of all away."""
    old = None
    if out.is_dir():
        if any(out.iterdir()):
            old = stage.with_name(f"{stage.name}-old")
            out.rename(old)
        else:
            out.rmdir()
    try:
        stage.rename(out)
    except OSError:
        if old is not None:
            old.rename(out)
        raise
    _sync(out.parent)
    if old is not None:
        shutil.rmtree(old)
