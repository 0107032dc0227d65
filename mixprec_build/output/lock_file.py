"""Lock files: each is locked (flock) by its holder, which also writes into it who it is, and touches it regularly.

A file system that many machines share may show that to all of them where it does not show, or does not have, locks.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputError
from ..storage.owned import OwnedFolder

__all__ = ["Lock", "Subject", "beating", "lock_file", "require_free"]


_BEAT = 30.0
"""Seconds after which a running process touches its lock again."""
_SILENCE = 150.0
"""Seconds without a touch after which a process on another machine counts as dead."""


@dataclass(frozen=True, slots=True)
class Lock:
    """A locked lock file. Another process may take it over: :meth:`is_signed` tells whether it is still this one's."""

    root: OwnedFolder
    name: str
    fd: int
    text: bytes
    """The text that identifies this process."""

    def sign(self) -> None:
        """Writes this process's text into the file."""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, self.text, 0)
        os.fsync(self.fd)  # for other machines, which do not see what is only in this one's memory

    def is_signed(self) -> bool:
        """Whether the file of this name is still the locked one, and no other process has signed it."""
        state = self.root.stat(self.name)
        return (
            state is not None
            and state.st_ino == os.fstat(self.fd).st_ino
            and os.pread(self.fd, len(self.text) + 1, 0) in (self.text, b"")
        )

    def release(self) -> None:
        """Empties the file, so that another machine need not wait."""
        os.ftruncate(self.fd, 0)


@dataclass(frozen=True, slots=True)
class Subject:
    """What a lock file stands for, as messages call it."""

    name: str
    """The output, and the rank where the lock is a rank's."""
    command: str
    """The command that holds such locks."""
    instead: str = ""
    """Advice besides waiting for it."""
    hurry: str = ", or pass --take-over: what is finished is kept"
    """Advice besides waiting until it was silent for long enough."""


def lock_file(root: OwnedFolder, name: str, subject: Subject, take_over: bool, prepare: Callable[[], None]) -> Lock:
    """Locks the file ``name``, which is not signed yet. ``prepare`` makes its folder where that does not exist.

    Raises:
        OutputError: it is another process's, or was within the last 150 seconds and this file system does not tell
            whether that has ended, unless ``take_over``; or it is no file that mixprec wrote.
    """
    text = f"{socket.gethostname()} pid {os.getpid()}\n{_boot()}\n{secrets.token_hex(8)}\n".encode()
    while True:
        prepare()
        try:
            fd = root.open_file(name, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            continue  # one that finished removed the folder just now
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode) or os.fstat(fd).st_nlink > 1:
                raise OutputError(f"{root.path / name}: is no file that mixprec wrote; remove it")
            _require_free(root, name, fd, subject, fcntl.LOCK_EX, take_over)
            there = root.stat(name)
            if there is not None and there.st_ino == os.fstat(fd).st_ino:
                return Lock(root, name, fd, text)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # locked a file that its holder had removed: try the new one


def require_free(root: OwnedFolder, name: str, subject: Subject, take_over: bool = False) -> None:
    """Raises :class:`OutputError` where :func:`lock_file` would; changes nothing, and needs no such file."""
    try:
        fd = root.open_file(name, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        if stat.S_ISREG(os.fstat(fd).st_mode):
            _require_free(root, name, fd, subject, fcntl.LOCK_SH, take_over)
    finally:
        os.close(fd)


def _require_free(root: OwnedFolder, name: str, fd: int, subject: Subject, how: int, take_over: bool) -> None:
    """Locks an opened lock file, as ``how`` says, or raises :class:`OutputError` where another process may hold it."""
    locked = _flock(fd, subject, how)
    holder, _, rest = _text(fd).partition("\n")
    # A network file system may not show locks of other machines, but it shows what these write.
    same = holder.partition(" ")[0] == socket.gethostname()
    here = locked and (same or rest.partition("\n")[0] == _boot() != "")
    if holder and not here and not take_over and (silent := _silence(root, name, fd)) < _SILENCE:
        whose = f"another {subject.command} ({holder})" if same else f"a {subject.command} on another host ({holder})"
        why = "" if locked else ", and this file system has no locks that tell whether it has ended"
        raise OutputError(
            f"{subject.name}: {whose} was writing there {max(0, silent):.0f} seconds ago{why}; if it has ended, wait "
            f"until it was silent for {_SILENCE:.0f}{subject.hurry}"
        )


def _flock(fd: int, subject: Subject, how: int) -> bool:
    """Locks a file. Returns whether its file system can. Raises :class:`OutputError` if another process holds it."""
    for last in (False, False, False, True):
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if last:
                break
            time.sleep(0.01)  # another may only look whether it is free
        except OSError:
            return False
    holder = _text(fd).partition("\n")[0] or "unknown"
    raise OutputError(
        f"{subject.name}: another {subject.command} is writing there ({holder}); wait for it{subject.instead}"
    )


def _text(fd: int) -> str:
    """The text of a lock file, without the zero bytes that it may have after a power loss."""
    return os.pread(fd, 400, 0).strip(b"\0").decode(errors="replace")


def _silence(root: OwnedFolder, name: str, fd: int) -> float:
    """Seconds since a lock was last touched, by the clock of its file system."""
    touched = os.fstat(fd).st_mtime
    folder = name.rpartition("/")[0]
    try:
        os.utime(root.path / folder, follow_symlinks=False)
    except OSError:  # a reader that may not write there
        return time.time() - touched
    state = root.stat(folder)
    return 0.0 if state is None else state.st_mtime - touched


def _boot() -> str:
    """The id of this machine's boot, the same in all of its containers; ``""`` where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@contextmanager
def beating(*locks: Lock) -> Iterator[None]:
    """Touches locks regularly, to show processes on other machines that this one is running."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT):
            for lock in locks:
                with suppress(OSError):
                    os.utime(lock.fd)

    thread = threading.Thread(target=beat, daemon=True)
    with suppress(RuntimeError):  # no memory for it, which the threads that write will report
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()
