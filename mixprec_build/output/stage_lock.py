"""Checks that a stage was made here by this user's mixprec, and locks it for one build at a time."""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputError
from ..storage.owned import OwnedFolder

__all__ = ["Lock", "beating", "mark", "stage_name", "take_lock", "write_and_close"]


_BEAT = 30.0
"""Seconds after which a running build touches its lock again."""
_SILENCE = 150.0
"""Seconds without a touch after which a build on another machine counts as dead."""


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


@dataclass(frozen=True, slots=True)
class Lock:
    """A locked lock file. Another build may take it over: :meth:`is_signed` tells whether it is still this one's."""

    root: OwnedFolder
    name: str
    fd: int
    text: bytes
    """The text that identifies this build."""

    def sign(self) -> None:
        """Writes this build's text into the file."""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, self.text, 0)

    def is_signed(self) -> bool:
        """Whether the file of this name is still the locked one, and no other build has signed it."""
        state = self.root.stat(self.name)
        return (
            state is not None
            and state.st_ino == os.fstat(self.fd).st_ino
            and os.pread(self.fd, len(self.text) + 1, 0) in (self.text, b"")
        )

    def release(self) -> None:
        """Empties the file, so that another machine's build need not wait."""
        os.ftruncate(self.fd, 0)


def take_lock(root: OwnedFolder, out: Path, take_over: bool) -> Lock:
    """Locks the stage, whose folder is made if necessary.

    Raises:
        OutputError: another build is writing there, or the stage was not made here by this user's mixprec.
    """
    name = f"{stage_name(out)}/lock"
    host, boot = socket.gethostname(), _boot()
    text = f"{host} pid {os.getpid()}\n{boot}\n{secrets.token_hex(8)}\n".encode()
    while True:
        root.make_folder(stage_name(out))
        _require_own(root, out, take_over)
        try:
            fd = root.open_file(name, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:
            continue  # a build that finished removed the folder just now
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode) or os.fstat(fd).st_nlink > 1:
                raise OutputError(f"{root.path / name}: is no file that mixprec wrote; remove it")
            locked = _flock(fd, out)
            holder, _, rest = _text(fd).partition("\n")
            # A network file system may not show locks of other machines, but it shows what these write.
            here = locked and (holder.partition(" ")[0] == host or rest.partition("\n")[0] == boot != "")
            if holder and not here and not take_over and (silent := _silence(root, fd, out)) < _SILENCE:
                same = holder.partition(" ")[0] == host
                whose = f"another mixprec build ({holder})" if same else f"a mixprec build on another host ({holder})"
                why = "" if locked else ", and this file system has no locks that tell whether it has ended"
                raise OutputError(
                    f"{out}: {whose} was writing there {max(0, silent):.0f} seconds ago{why}; if it has ended, wait "
                    f"until it was silent for {_SILENCE:.0f}, or pass --take-over: what is finished is kept"
                )
            there = root.stat(name)
            if there is not None and there.st_ino == os.fstat(fd).st_ino:
                return Lock(root, name, fd, text)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # locked a file that its build had removed: try the new one


def _flock(fd: int, out: Path) -> bool:
    """Locks a file. Returns whether its file system can. Raises :class:`OutputError` if another build has locked it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _text(fd).partition("\n")[0] or "unknown"
        raise OutputError(
            f"{out}: another mixprec build is writing there ({holder}); wait for it or name another folder"
        ) from None
    except OSError:
        return False
    return True


def _text(fd: int) -> str:
    """The text of a lock file, without the zero bytes that it may have after a power loss."""
    return os.pread(fd, 400, 0).strip(b"\0").decode(errors="replace")


def _silence(root: OwnedFolder, fd: int, out: Path) -> float:
    """Seconds since a lock was last touched, by the clock of its file system."""
    touched = os.fstat(fd).st_mtime
    folder = root.path / stage_name(out)
    os.utime(folder, follow_symlinks=False)
    state = root.stat(stage_name(out))
    return 0.0 if state is None else state.st_mtime - touched


def _boot() -> str:
    """The id of this machine's boot, the same in all of its containers; ``""`` where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


@contextmanager
def beating(lock: Lock) -> Iterator[None]:
    """Touches a lock regularly, to show builds on other machines that this one is running."""
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT):
            with suppress(OSError):
                os.utime(lock.fd)

    thread = threading.Thread(target=beat, daemon=True)
    with suppress(RuntimeError):  # no memory for it, which the build's own threads will report
        thread.start()
    try:
        yield
    finally:
        ended.set()
        if thread.ident is not None:
            thread.join()
