"""One command at a time in a compiled checkpoint."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputError, VerifyError
from ..storage.disk import write_errors
from ..storage.owned import OwnedFolder

__all__ = ["alone"]


@contextmanager
def alone(folder: Path) -> Iterator[tuple[OwnedFolder, Callable[[], None]]]:
    """One split of a checkpoint at a time, for each lists its ranks in the same manifest, and none while a build
    replaces it.

    Yields the folder, open, and a function that raises :class:`OutputError` once it is no longer there by its name.
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
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{folder}: another `mixprec split` or build is writing there; wait for it") from None
        except OSError:
            pass  # network file systems lock no folders: what is left is the check
        check()
        yield OwnedFolder(folder, fd), check
    finally:
        os.close(fd)
