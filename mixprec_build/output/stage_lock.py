"""Checks that a stage was made here by this user's mixprec, and locks it for one build at a time."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

from ..errors import OutputError
from ..storage.owned import OwnedFolder
from .lock_file import Lock, Subject, lock_file

__all__ = ["mark", "stage_name", "take_lock", "write_and_close"]


def stage_name(out: Path) -> str:
    """The name of an output's stage, beside it."""
    return f".{out.name}.mixprec"


def write_and_close(fd: int, data: bytes) -> None:
    """Writes a file of the stage through its descriptor, syncs and closes it."""
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)


def mark(root: OwnedFolder, name: str) -> None:
    """Writes into a new stage that it was made here."""
    if _is_marked(root, name):
        return
    with suppress(FileNotFoundError):
        root.unlink(f"{name}/made")
    folder = root.stat(name)
    with os.fdopen(root.create(f"{name}/made"), "wb") as file:
        if folder is not None:
            file.write(b"%d %d\n" % (folder.st_ino, os.fstat(file.fileno()).st_ino))
        file.flush()
        os.fsync(file.fileno())
    root.sync(name)
    root.sync()


def _is_marked(root: OwnedFolder, name: str) -> bool:
    """Whether a folder's mark names the folder's inode and its own, which no archive or download can reproduce."""
    folder = root.stat(name)
    try:
        fd = root.open_file(f"{name}/made", os.O_RDONLY)
    except (OSError, OutputError):
        return False
    with os.fdopen(fd, "rb") as file:
        mark = os.fstat(fd)
        if folder is None or not stat.S_ISREG(mark.st_mode) or mark.st_nlink != 1 or mark.st_uid != folder.st_uid:
            return False
        return file.read(100) == b"%d %d\n" % (folder.st_ino, mark.st_ino)


def _require_own(root: OwnedFolder, out: Path, take_over: bool) -> None:
    """Raises :class:`OutputError` where the stage was not made here by this user's mixprec."""
    name = stage_name(out)
    entries = root.entries(name)
    files = all(entry.is_file for entry in entries)
    begun = files and {entry.name for entry in entries} <= {f"{name}/lock", f"{name}/made"}
    state = root.stat(name)
    if state is not None and state.st_uid != os.geteuid() and state.st_uid != _uid_of_new_files(root, out):
        raise OutputError(f"{root.path / name}: belongs to another user; remove it, a build of {out} is written there")
    if not begun and not take_over and not _is_marked(root, name):
        raise OutputError(
            f"{root.path / name}: was not made here by mixprec, it may have come with a download; move it away, a "
            f"build of {out} is written there, or go on from it with --take-over if it is your own"
        )


def _uid_of_new_files(root: OwnedFolder, out: Path) -> int:
    """The owner of files that this process creates there, which a network file system may map to another user."""
    name = f"{stage_name(out)}.probe"
    with suppress(FileNotFoundError):
        root.unlink(name)
    fd = root.create(name)
    try:
        return os.fstat(fd).st_uid
    finally:
        os.close(fd)
        root.unlink(name)


def take_lock(root: OwnedFolder, out: Path, take_over: bool) -> Lock:
    """Locks the stage, whose folder is made if necessary.

    Raises:
        OutputError: another build is writing there, or the stage was not made here by this user's mixprec.
    """

    def prepare() -> None:
        root.make_folder(stage_name(out))
        _require_own(root, out, take_over)

    subject = Subject(str(out), "mixprec build", " or name another folder")
    return lock_file(root, f"{stage_name(out)}/lock", subject, take_over, prepare)
