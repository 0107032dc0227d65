"""Which commands may be at work in a compiled checkpoint at the same time."""

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
    """Locks a checkpoint: one split at a time, for each lists its ranks in the same manifest, and none while a build
    replaces it.

    With ``shared`` others may read it meanwhile, and none may change it; with ``wait_for_readers`` those that read it
    are waited for. Yields the folder, open, and a function that raises :class:`OutputError` once it is no longer there
    by its name.

    Raises:
        VerifyError: there is no such folder.
        OutputError: another command is at work in it.
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
        with suppress(OSError):  # network file systems lock no folders: what is left is the check
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
