"""Plan -> files. Obeys; decides nothing.

Everything is written into a hidden folder beside the output, synced, and renamed: the output appears whole or
not at all.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from .checkpoint import INDEX, LocalFolder
from .copier import Copier, Progress, pwrite_all, write_errors
from .errors import OutputError, SourceError, WriteError
from .header import read_regular
from .manifest import MANIFEST, build_manifest, dump_manifest, quantization_config
from .plan import Plan

__all__ = ["check_output", "companion_files", "fetch", "write"]

# Left behind by other tools: they describe the source's quantization, not the output's.
_STALE = {"config.json", INDEX, "quantize_config.json", "quant_config.json", "hf_quant_config.json", MANIFEST}
_KEPT_SUFFIXES = {".json", ".jinja", ".model", ".py", ".tiktoken", ".txt", ".vocab"}
_KEPT_NAMES = {"LICENSE", "LICENCE", "NOTICE", "USE_POLICY.md"}


def check_output(plan: Plan, out: Path, *, force: bool) -> None:
    """Refuses an output folder that holds something else or overlaps a source. Raises :class:`OutputError`."""
    try:
        if out.is_symlink():
            raise OutputError(f"{out}: is a link; name the folder itself")
        _check_overlap(plan, out)
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out}: is a file; name a folder")
        if not out.is_dir() or not any(out.iterdir()):
            return
        if not force:
            raise OutputError(f"{out}: exists and is not empty; pass --force to replace it, or name another folder")
        foreign = sorted({entry.name for entry in out.iterdir()} - _written(out))
    except (OSError, RuntimeError) as error:  # the latter for a loop of links, before Python 3.13
        raise OutputError(f"{out}: cannot be used: {getattr(error, 'strerror', error)}") from error
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise OutputError(
            f"{out}: holds files that mixprec did not write ({', '.join(foreign[:3])}{more}); "
            "remove it yourself or name another folder"
        )


def _check_overlap(plan: Plan, out: Path) -> None:
    target = out.resolve()
    sources = [(source.name, source.checkpoint) for source in plan.sources.by_name.values()]
    for name, checkpoint in [*sources, ("model", plan.sources.model)]:
        if not isinstance(checkpoint.storage, LocalFolder):
            continue
        folder = checkpoint.storage.folder.resolve()
        if target == folder or target in folder.parents or folder in target.parents:
            raise OutputError(f"{out}: overlaps the source `{name}` ({folder}); name another folder")


def _written(out: Path) -> set[str]:
    """The names in a folder that its manifest lists; none where it has no manifest."""
    try:
        files = json.loads(read_regular(out / MANIFEST))["files"]
        return {MANIFEST, *(name.partition("/")[0] for name in files)}
    except (SourceError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return set()


def fetch(plan: Plan) -> dict[tuple[str, str], Path]:
    """Brings the source files a plan needs to this machine: ``(source, file)`` -> path."""
    needed: dict[str, set[str]] = {name: set() for name in plan.sources.by_name}
    for shard in plan.shards:
        for tensor in shard.tensors:
            needed[tensor.source].add(tensor.info.file)
    paths = {}
    for source, shards in needed.items():
        storage = plan.sources.by_name[source].checkpoint.storage
        # With these in the cache the same recipe plans and builds again without the hub.
        described_by = {"config.json", "quantize_config.json", INDEX} & storage.files.keys()
        fetched = storage.fetch(sorted(shards | described_by))
        paths.update({(source, file): fetched[file] for file in shards})
    return paths


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
    # `.` has no name of its own to put another folder beside.
    target = out.resolve()
    stage = target.parent / f".{target.name}.mixprec-{secrets.token_hex(4)}"
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        with write_errors(stage):
            _make_folder(stage, out)
            _check_space(plan, stage)
            checksums = Copier(plan, paths, stage, progress or (lambda _: None)).run(
                jobs or min(8, os.cpu_count() or 1)
            )
            files = _write_companions(plan, stage, companions)
            _write_file(stage / MANIFEST, dump_manifest(build_manifest(plan, stage, checksums, files)))
            _sync(stage)
            check_output(plan, out, force=force)  # hours may have passed
            _publish(stage, target, force=force)
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise
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
    contents: dict[str, bytes] = {name: read_regular(path) for name, path in companions.items()}
    contents["config.json"] = _json(config)
    contents[INDEX] = _json(index)
    for name, data in contents.items():
        _write_file(stage / name, data)
    return contents


def _json(data: object) -> bytes:
    # A lone surrogate, which JSON can hold and UTF-8 cannot, becomes the escape it was read from.
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


# Disk


def _make_folder(stage: Path, out: Path) -> None:
    try:
        stage.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OutputError(f"{out}: cannot be created ({error.filename}: {error.strerror})") from error


def _check_space(plan: Plan, stage: Path) -> None:
    need = sum(shard.file_bytes(plan.sources) for shard in plan.shards if shard.link is None)
    free = os.statvfs(stage)
    have = free.f_bavail * free.f_frsize
    if need > have:
        raise WriteError(f"{stage.parent}: {need} bytes are needed, {have} are free; nothing was written")


def _write_file(path: Path, data: bytes) -> None:
    with write_errors(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            pwrite_all(fd, memoryview(data), 0)
            os.fsync(fd)
        finally:
            os.close(fd)


def _sync(folder: Path) -> None:
    with write_errors(folder):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _publish(stage: Path, out: Path, *, force: bool) -> None:
    """The finished folder takes its name by one rename; a folder it replaces goes first, and last of all away."""
    old = None
    if force and out.is_dir() and any(out.iterdir()):
        old = stage.with_name(f"{stage.name}-old")
    try:
        if old is not None:
            out.rename(old)
        try:
            stage.rename(out)  # also onto an empty folder
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise OutputError(f"{out}: something else was put there meanwhile; it was left as it is") from error
            raise
        try:
            _sync(out.parent)
        except WriteError:
            out.rename(stage)
            raise
    except BaseException:
        if old is not None and old.exists() and not out.exists():
            old.rename(out)
        raise
    if old is not None:
        try:
            shutil.rmtree(old)
        except OSError as error:
            raise WriteError(
                f"{old}: {error.strerror}: the new checkpoint is in place, but this one, which it replaces, "
                "could not be removed; remove it yourself"
            ) from error
