"""Locks a compiled checkpoint while a command reads or changes it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputError, VerifyError
from ..storage.disk import write_errors
from ..storage.owned import OwnedFolder

__all__ = ["locked"]


@contextmanager
def locked(
    folder: Path, *, shared: bool = False, wait_for_readers: bool = False
) -> Iterator[tuple[OwnedFolder, Callable[[], None]]]:
    """Locks a checkpoint, which one split or build at a time may change.

    With ``shared`` others may read it meanwhile, but none may change it. With ``wait_for_readers`` it waits for those
    that read it instead of raising. Yields the opened folder, and a function that raises :class:`OutputError` if its
    name is now another folder's.

    Raises:
        VerifyError: there is no such folder.
        OutputError: another command is using it.
    """
    with write_errors(folder):
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise VerifyError(f"{folder}: no such folder; name one that `mixprec build` wrote") from None

    def check() -> None:
        with write_errors(folder), suppress(FileNotFoundError):
            if os.path.samestat(folder.stat(), os.fstat(fd)):
                return
        raise OutputError(f"{folder}: was replaced meanwhile; what is there now was left as it is")

    try:
        with suppress(OSError):  # a network file system may lock no folders: then only the check remains
            _lock(fd, folder, shared, wait_for_readers)
        check()
        yield OwnedFolder(folder, fd), check
    finally:
        os.close(fd)


def _lock(fd: int, folder: Path, shared: bool, wait_for_readers: bool) -> None:
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        return
    except BlockingIOError:
        pass
    try:
        if not shared:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # succeeds where only readers are in the way
    except BlockingIOError:
        shared = True
    if shared:
        raise OutputError(f"{folder}: another `mixprec split` or build is writing there; wait for it") from None
    if not wait_for_readers:
        raise OutputError(f"{folder}: `mixprec verify` is reading it; wait for it") from None
    fcntl.flock(fd, fcntl.LOCK_EX)
