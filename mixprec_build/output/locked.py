"""Locks a compiled checkpoint while a command reads or changes it.

Two kinds of locks exclude each other. The folder is locked (flock) by whoever reads it or changes its manifest. Lock
files in ``presplit`` show for as long as a split runs what it is writing: :data:`.SPLIT_LOCK` all of the checkpoint, a
rank's lock that rank. So splits of some ranks, which lock the folder only to begin and to list what they have cut, run
side by side; and where a file system does not lock folders for all machines, lock files still tell (:mod:`.lock_file`).
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.degree import parse_folder
from ..checkpoint.manifest import MANIFEST
from ..errors import OutputError, VerifyError
from ..ranks.layout import PRESPLIT, SPLIT_LOCK, beside_rank, is_degree_folder
from ..storage.disk import write_errors
from ..storage.owned import Entry, OwnedFolder
from .leftovers import locks
from .lock_file import Lock, Subject, beating, lock_file, require_free

__all__ = ["LockedFolder", "locked", "manifest_version", "opened"]

_POLL = 0.05
"""Seconds between two attempts to lock a folder."""
_READERS = 10
"""Attempts in a row that find readers after which these count as readers, not as others that wait for their turn."""
_PATIENCE = 60.0
"""Seconds for which a split waits for a locked folder in which no lock file shows another one."""


@contextmanager
def locked(
    folder: Path, *, shared: bool = False, wait_for_readers: bool = False
) -> Iterator[tuple[OwnedFolder, Callable[[], None]]]:
    """Locks a checkpoint that no split is writing to.

    With ``shared`` others may read it meanwhile, but none may change it. With ``wait_for_readers`` it waits for those
    that read it instead of raising. Yields the opened folder, and a function that raises :class:`OutputError` if its
    name is now another folder's.

    Raises:
        VerifyError: there is no such folder.
        OutputError: another command is using it.
    """
    with opened(folder) as place:
        place.lock(shared, wait_for_readers)
        place.check()
        place.require_no_split()
        yield place.owned, place.check


def manifest_version(owned: OwnedFolder) -> tuple[int, ...]:
    """Differs between any two manifests that were put into one place; empty where there is none."""
    state = owned.stat(MANIFEST)
    return () if state is None else (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)


@contextmanager
def opened(folder: Path) -> Iterator[LockedFolder]:
    """Opens a checkpoint's folder, which is not locked yet. Raises :class:`VerifyError` if there is none."""
    with write_errors(folder):
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise VerifyError(f"{folder}: no such folder; name one that `mixprec build` wrote") from None
    try:
        yield LockedFolder(folder, OwnedFolder(folder, fd))
    finally:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class LockedFolder:
    """The opened folder of a checkpoint, and its locks. Where its file system locks no folders, lock files remain."""

    folder: Path
    owned: OwnedFolder

    def check(self) -> None:
        """Raises :class:`OutputError` if the folder's name is now another folder's."""
        with write_errors(self.folder), suppress(FileNotFoundError):
            if os.path.samestat(self.folder.stat(), os.fstat(self.owned.fd)):
                return
        raise OutputError(f"{self.folder}: was replaced meanwhile; what is there now was left as it is")

    def lock(self, shared: bool, wait_for_readers: bool) -> None:
        """Locks the folder, as :func:`locked`."""
        if self._flock(fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            return
        if shared or not self._flock(fcntl.LOCK_SH):  # succeeds where only readers are in the way
            self.require_no_split()  # or names it
            raise self._written_by_others()
        if not wait_for_readers:
            raise self._read_by_others()
        self.wait()

    def begin(self) -> None:
        """Locks the folder for a split. Waits for others that only begin, or list the ranks that they have cut.

        Raises:
            OutputError: it is being compared, replaced, or changed by a split of more than some ranks.
        """
        readers, until = 0, time.monotonic() + _PATIENCE
        while not self._flock(fcntl.LOCK_EX):
            if self._locks():
                until = time.monotonic() + _PATIENCE
            if time.monotonic() > until:
                raise self._written_by_others()
            if self._flock(fcntl.LOCK_SH):
                self.unlock()
                readers += 1
                if readers == _READERS:
                    raise self._read_by_others()
            else:
                readers = 0
            self._require_free(SPLIT_LOCK)
            time.sleep(_POLL)

    def wait(self) -> None:
        """Locks the folder when all others have unlocked it."""
        with suppress(OSError):
            fcntl.flock(self.owned.fd, fcntl.LOCK_EX)

    def unlock(self) -> None:
        with suppress(OSError):
            fcntl.flock(self.owned.fd, fcntl.LOCK_UN)

    @contextmanager
    def split_locks(self, ranks: Sequence[str], take_over: bool) -> Iterator[Callable[[], None]]:
        """Holds the locks of these ranks' folders, or :data:`SPLIT_LOCK` where there are none. The folder is locked.

        Yields a function that raises :class:`OutputError` if another split has taken one of them over.

        Raises:
            OutputError: another split is writing what this one would.
        """
        held: list[Lock] = []

        def check() -> None:
            for lock in held:
                if not lock.is_signed():
                    subject = self._subject(lock.name).name
                    raise OutputError(f"{subject}: another `mixprec split` has taken it over; nothing more was written")

        with ExitStack() as stack:
            stack.callback(self._drop_empty)
            for name in [beside_rank(rank, "lock") for rank in ranks] or [SPLIT_LOCK]:
                stack.enter_context(self._lock_file(name, take_over, held))
            # Looks only now, so that of two that begin at once, without locks of the folder, one sees the other.
            others = [SPLIT_LOCK] if ranks else self._locks()
            for name in others:
                if name not in [lock.name for lock in held]:
                    self._require_free(name, take_over)
            stack.enter_context(beating(*held))
            yield check

    def require_no_split(self) -> None:
        """Raises :class:`OutputError` where a split is running, and names its rank."""
        for name in self._locks():
            self._require_free(name, hurry="")

    @contextmanager
    def _lock_file(self, name: str, take_over: bool, held: list[Lock]) -> Iterator[None]:
        """Holds a lock file, which is removed at the end."""
        with write_errors(self.folder):
            parent = name.rpartition("/")[0]
            try:
                lock = lock_file(
                    self.owned, name, self._subject(name), take_over, lambda: self.owned.make_folder(parent)
                )
            except FileNotFoundError:
                self.check()  # it may have been replaced, and removed
                raise
        try:
            with write_errors(self.folder):
                lock.sign()
            held.append(lock)
            yield
        finally:
            try:
                with suppress(OSError, OutputError):  # the next split removes it, too
                    if lock.is_signed():
                        self.owned.unlink(name)
            finally:
                with suppress(OSError):  # nothing was written through it that matters
                    os.close(lock.fd)

    def _drop_empty(self) -> None:
        """Removes folders that were made for locks, and are empty again."""

        def is_mine(entry: Entry) -> bool:
            return entry.is_folder and (entry.name == PRESPLIT or is_degree_folder(entry.name.partition("/")[2]))

        with suppress(OSError, OutputError):
            self.owned.remove(PRESPLIT, is_mine)

    def _locks(self) -> list[str]:
        with write_errors(self.folder):
            return locks(self.owned)

    def _require_free(self, name: str, take_over: bool = False, **words: str) -> None:
        with write_errors(self.folder):
            require_free(self.owned, name, self._subject(name, **words), take_over)

    def _subject(self, lock: str, **words: str) -> Subject:
        """What a lock stands for, as messages call it."""
        parent, _, last = lock.rpartition("/")
        found = parse_folder(f"{parent}/{last.removeprefix('.').removesuffix('.lock')}")
        which = "" if found is None else f": rank {found[1]} of {found[0]}"
        return Subject(f"{self.folder}{which}", "`mixprec split`", **words)

    def _flock(self, how: int) -> bool:
        """Whether the folder could be locked, or its file system locks no folders."""
        try:
            fcntl.flock(self.owned.fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # a network file system may lock no folders: then lock files remain
        return True

    def _written_by_others(self) -> OutputError:
        return OutputError(f"{self.folder}: another `mixprec split` or build is writing there; wait for it")

    def _read_by_others(self) -> OutputError:
        return OutputError(f"{self.folder}: `mixprec verify` is reading it; wait for it")
