"""Writes the files of a plan.

Everything is written into a hidden folder beside the output (:mod:`.stage`), synced, and renamed: the output appears
complete or not at all, and a build that was stopped can be continued.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from ..checkpoint.checkpoint import INDEX
from ..checkpoint.degree import Degree
from ..checkpoint.manifest import MANIFEST, dump_manifest, new_manifest
from ..errors import OutputError, WriteError
from ..planning.companions import CARD, companion_files
from ..planning.types import Plan
from ..ranks.layout import is_ours
from ..storage.disk import sync_folder, write_errors
from ..storage.owned import Entry, OwnedFolder
from ..storage.threads import Progress
from .companions import files_of_own, manifest_head, module_entries, write_companions, write_file
from .copier import Copier
from .locked import locked
from .parts import adopt_parts, refuse_parts
from .split import split
from .stage import Stage
from .staging import fetch, opened_stage, stop_reported
from .target import check_output

__all__ = ["write"]


def write(
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    take_over: bool = False,
    finish: bool = False,
    card: bool = True,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Writes the checkpoint and returns the path of its manifest.

    Args:
        take_over: continue what a build on another machine left, see :meth:`.Stage.open`.
        finish: take all shards from the parts of a build on many machines.
        card: write a model card, ``README.md``.
        progress: called with bytes as they are done, of the plan's ``written_bytes``.

    Raises:
        OutputError: ``out`` is in use, or parts of a build are missing.
        SourceError: a source cannot be read or has changed since it was planned.
        WriteError: the disk is full, fails, or forbids it.
    """
    check_output(plan, out, force=force)
    if not finish:
        refuse_parts(out)
    paths = fetch(plan)
    beside = [name for name in companion_files(plan.sources.model) if card or name != CARD]
    companions = plan.sources.model.storage.fetch(beside)
    # The stage is named after the output, and `.` has no name.
    target = out.resolve()
    with write_errors(out):
        made = [folder for folder in target.parents if not folder.exists()]
    try:
        with opened_stage(target, out, take_over) as stage:
            # A build that was killed while it replaced an output may have left that output in the stage.
            check_output(plan, out, force=force)
            with stop_reported(stage, out, len(plan.shards)), write_errors(out):  # errors that no step reports itself
                adopt = partial(adopt_parts, stage, plan, take_over=take_over) if finish else None
                _fill(stage, plan, paths, companions, card, jobs, progress or (lambda _: None), adopt)
                check_output(plan, out, force=force)
                _publish(stage, force=force)
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
    card: bool,
    jobs: int | None,
    progress: Progress,
    adopt: Callable[[Mapping[str, str]], None] | None,
) -> None:
    """Completes the checkpoint in the stage's payload, and syncs it. ``adopt`` brings finished shards."""
    beside = [*companions, *files_of_own(plan, companions), *([CARD] if card else [])]
    stage.expect([*beside, "config.json", INDEX, MANIFEST, new_manifest()])
    checksums = Copier(plan, paths, stage, progress, adopt=adopt).run(jobs or min(8, os.cpu_count() or 1))
    files = write_companions(plan, stage.payload, companions, with_card=card)
    head = manifest_head(plan, stage.payload, files)
    write_file(stage.payload / MANIFEST, dump_manifest(head, module_entries(plan, checksums)))
    degrees = [Degree(tp) for tp in plan.recipe.tp]
    with OwnedFolder.open(stage.payload, follow=False) as payload:
        for entry in payload.entries("presplit") if degrees else [Entry("presplit", stat.S_IFDIR)]:
            if entry.name.rpartition("/")[2] not in map(str, degrees):
                payload.remove(entry.name, is_ours)  # of a stopped build of another recipe
    # The smallest degree is cut last: merged files are dropped with it, and can be restored from it.
    for degree in sorted(degrees, key=lambda degree: -degree.tp):
        layout = plan.recipe.layout if degree.tp == min(plan.recipe.tp) else "both"
        split(
            stage.payload,
            degree,
            layout=layout,
            take_over=True,  # the stage is locked
            jobs=jobs,
            shard_size=plan.recipe.shard_size,
            watch=lambda splitter, nbytes: progress,
        )
    sync_folder(stage.payload)


def _publish(stage: Stage, *, force: bool) -> None:
    """Renames the finished folder to the output. A folder that it replaces is moved away before, and removed after."""
    out, root, replaced = stage.out, stage.root, False
    payload, waiting = stage.inner("out"), stage.inner("replaced")
    with write_errors(out), ExitStack() as stack:
        stage.check()
        stage.refuse_others()
        if force and root.entries(out.name):
            replaced = True
            stack.enter_context(
                locked(out, wait_for_readers=True)
            )  # else a running split would write into the new one, which has its name
        try:
            if replaced:
                _rename(root, out.name, waiting)
            try:
                _rename(root, payload, out.name)  # also onto an empty folder
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise OutputError(f"{out}: something else was put there meanwhile; it was left as it is") from error
                raise
            try:
                root.sync()
            except OSError:
                root.rename(out.name, payload)
                raise
        except BaseException:
            if replaced and root.entry(waiting) is not None and root.entry(out.name) is None:
                root.rename(waiting, out.name)
            raise
    if replaced:
        left = "the new checkpoint is in place, but the one that it replaces could not be removed; remove it yourself"
        try:
            if not stage.discard_replaced():
                raise WriteError(f"{stage.replaced}: holds files that mixprec did not write: {left}")
        except OSError as error:
            raise WriteError(f"{stage.replaced}: {error.strerror}: {left}") from error


def _rename(root: OwnedFolder, old: str, new: str) -> None:
    try:
        root.rename(old, new)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        # An overlay file system cannot rename folders of a layer below, such as a container's image.
        raise WriteError(
            f"{root.path / old}: its file system cannot rename it to {new}, as for a folder of a container's image; "
            "move it away yourself (copy and remove it), or name another folder"
        ) from error
