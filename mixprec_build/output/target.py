"""Refuses an output folder that has other files in it, or that SGLang would not open by its name."""

from __future__ import annotations

import os
from pathlib import Path

from ..checkpoint.manifest import MANIFEST, check_outside, is_new_manifest, read_manifest
from ..checkpoint.mistral_layout import PARAMS, taken_for_own
from ..errors import OutputError, VerifyError
from ..planning.companions import CARD
from ..planning.types import Plan
from ..storage.folder import LocalFolder
from ..storage.owned import OwnedFolder
from .file_differences import edited_card
from .leftovers import unknown_entries
from .stage import Stage

__all__ = ["check_output"]


def check_output(plan: Plan, out: Path, *, force: bool) -> None:
    """Raises :class:`OutputError` if an output folder has other files in it, overlaps a source or has a wrong name."""
    if (words := taken_for_own(str(out))) is not None:
        raise OutputError(
            f"{out}: SGLang takes a folder with {words} in its path for one in Mistral's own layout, and stops as this "
            f"one would have no {PARAMS}; name another folder"
        )
    try:
        if out.is_symlink():
            raise OutputError(f"{out}: is a link; name the folder itself")
        _check_overlap(plan, out)
        check_outside(out)
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out}: is a file; name a folder")
        if os.path.ismount(out):
            raise OutputError(f"{out}: is a mount point, which no folder can replace; name a folder inside it")
        if not out.is_dir() or not any(out.iterdir()):
            return
        Stage.tidy(out.resolve())
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
    """The names in a folder that neither its manifest lists nor a stopped split left; all if it has no manifest."""
    with OwnedFolder.open(out, follow=False) as owned:
        entries = owned.entries()
    there = {entry.name for entry in entries}
    try:
        manifest = read_manifest(out)
        known = {MANIFEST, *manifest.files}
        # mixprec writes a regular file under each of these names: a folder or a link is somebody else's.
        files = [entry.name for entry in entries if entry.is_file]
        ours = {name for name in files if name in known or is_new_manifest(name)}
        edited = {f"{CARD}, edited since"} if CARD in ours and edited_card(out, manifest) else set()  # a person's work
        return there - ours - {"presplit"} | {*unknown_entries(out, manifest)} | edited
    except VerifyError:
        return there
