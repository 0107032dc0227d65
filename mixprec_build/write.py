"""Plan -> files. Obeys; decides nothing.

Everything is written into a hidden folder beside the output (:mod:`.stage`), synced, and renamed: the output appears
whole or not at all, and a build that was stopped goes on where it was.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .checkpoint import INDEX, LocalFolder
from .copier import Copier, Progress, write_errors
from .errors import InterruptedBuildError, MixprecError, OutputError, SourceError, WriteError
from .header import read_regular
from .manifest import MANIFEST, build_manifest, dump_manifest, quantization_config
from .plan import Plan
from .presplit import Degree
from .split import alone, split, strangers
from .stage import Stage, sync_folder

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
        if os.path.ismount(out):
            raise OutputError(f"{out}: is a mount point, which no folder can replace; name a folder inside it")
        if not out.is_dir() or not any(out.iterdir()):
            return
        if not force:
            raise OutputError(f"{out}: exists and is not empty; pass --force to replace it, or name another folder")
        foreign = sorted(_foreign(out))
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


def _foreign(out: Path) -> set[str]:
    """The names in a folder that its manifest does not list and no stopped split left there; all of them where it has
    no manifest."""
    there = {entry.name for entry in out.iterdir()}
    try:
        manifest = json.loads(read_regular(out / MANIFEST))
        known = {MANIFEST, f".{MANIFEST}.new", *manifest["files"]}
        if (out / "presplit").is_dir():
            known.add("presplit")
        return there - known | {*strangers(out, manifest)}
    except (SourceError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return there


def fetch(plan: Plan) -> dict[tuple[str, str], Path]:
    """Brings the source files a plan needs to this machine: ``(source, file)`` -> path."""
    needed: dict[str, set[str]] = {name: set() for name in plan.sources.by_name}
    for shard in plan.shards:
        for tensor in shard.tensors:
            needed[tensor.source].add(tensor.info.file)
    paths = {}
    for source, shards in needed.items():
        storage = plan.sources.by_name[source].checkpoint.storage
        # With these in the cache the same recipe plans and builds again without the hub, but where scales may be folded
        # into norms of other shards.
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
    """Writes the checkpoint and returns the path of its manifest. ``progress`` is called with bytes done, of the plan's
    ``written_bytes``.

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
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        with _stage(target, out) as stage:
            # A build that was killed while it replaced an output may have left that output in the stage.
            check_output(plan, out, force=force)
            try:
                with write_errors(out):  # all that no step names itself
                    _fill(stage, plan, paths, companions, jobs, progress or (lambda _: None))
                    check_output(plan, out, force=force)
                    _publish(stage, force=force)
            except (KeyboardInterrupt, InterruptedBuildError):
                raise InterruptedBuildError(f"{out}: interrupted; {stage.kept(len(plan.shards))}") from None
            except MemoryError:
                raise WriteError(f"{out}: out of memory; {stage.kept(len(plan.shards))}") from None
            except MixprecError as error:
                if stage.finished or isinstance(error, WriteError):
                    error.args = (f"{error}; {stage.kept(len(plan.shards))}",)
                raise
    except BaseException:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        raise
    return out / MANIFEST


def _fill(
    stage: Stage,
    plan: Plan,
    paths: Mapping[tuple[str, str], Path],
    companions: Mapping[str, Path],
    jobs: int | None,
    progress: Progress,
) -> None:
    """Makes the payload of a stage the whole checkpoint, and syncs it."""
    checksums = Copier(plan, paths, stage, progress).run(jobs or min(8, os.cpu_count() or 1))
    files = _write_companions(plan, stage.payload, companions)
    _write_file(stage.payload / MANIFEST, dump_manifest(build_manifest(plan, stage.payload, checksums, files)))
    degrees = [Degree(tp) for tp in plan.recipe.tp]
    for folder in stage.payload.glob("presplit/*" if degrees else "presplit"):
        if folder.name not in map(str, degrees):
            shutil.rmtree(folder)  # of another recipe's build, which was stopped
    # The merged files are dropped after the last of them, the one that they could be restored from.
    for degree in sorted(degrees, key=lambda degree: -degree.tp):
        layout = plan.recipe.layout if degree.tp == min(plan.recipe.tp) else "both"
        split(
            stage.payload,
            degree,
            layout=layout,
            jobs=jobs,
            shard_size=plan.recipe.shard_size,
            watch=lambda splitter, nbytes: progress,
        )
    sync_folder(stage.payload)


@contextmanager
def _stage(target: Path, out: Path) -> Iterator[Stage]:
    """The opened stage; :class:`OutputError` where the output's folder cannot even be begun."""
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stage = stack.enter_context(Stage.open(target))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                with write_errors(out):
                    raise
            raise OutputError(f"{out}: cannot be created ({error.filename}: {error.strerror})") from error
        yield stage


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
        _write_file(stage / name, [data])
    return contents


def _json(data: object) -> bytes:
    # A lone surrogate, which JSON can hold and UTF-8 cannot, becomes the escape it was read from.
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace")


# Disk


def _write_file(path: Path, chunks: Iterable[bytes]) -> None:
    with write_errors(path):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with os.fdopen(fd, "wb") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(fd)


def _publish(stage: Stage, *, force: bool) -> None:
    """The finished folder takes its name by one rename; a folder it replaces goes first, and last of all away."""
    out, replaced = stage.out, None
    with write_errors(out), ExitStack() as stack:
        if force and out.is_dir() and any(out.iterdir()):
            replaced = stage.replaced
            stack.enter_context(alone(out))  # a split would go on in it, under the name of the new one
        try:
            if replaced is not None:
                out.rename(replaced)
            try:
                stage.payload.rename(out)  # also onto an empty folder
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise OutputError(f"{out}: something else was put there meanwhile; it was left as it is") from error
                raise
            try:
                sync_folder(out.parent)
            except OSError:
                out.rename(stage.payload)
                raise
        except BaseException:
            if replaced is not None and replaced.exists() and not out.exists():
                replaced.rename(out)
            raise
    if replaced is not None:
        try:
            shutil.rmtree(replaced)
        except OSError as error:
            raise WriteError(
                f"{replaced}: {error.strerror}: the new checkpoint is in place, but this one, which it replaces, "
                "could not be removed; remove it yourself"
            ) from error
