"""Opens, renames and removes files below a folder that mixprec owns: by descriptor, never through a link.

A checkpoint or a stage folder may come from somebody else, with links in it, and between a check of a path and an
action on it a link can be put there. So each action opens the folders above its target one by one, never through a
link, and acts in the last of them.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..errors import OutputError

__all__ = ["Entry", "OwnedFolder"]


_BUFFER = 4 << 20
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Entry:
    """Something below an owned folder: its path from there, and its type and permissions (``st_mode``)."""

    name: str
    mode: int

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file; links, FIFOs and devices are none."""
        return stat.S_ISREG(self.mode)

    @property
    def kind(self) -> str:
        """A noun for messages: ``"a link"``, ``"a FIFO"``, ..."""
        return _KINDS.get(stat.S_IFMT(self.mode), "no regular file")


_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True, slots=True)
class OwnedFolder:
    """An open folder. Names are relative to it, with ``/`` between folders and without ``..``.

    Every method raises :class:`OutputError` where a folder of a name, or a file that is to be opened, is a link, and
    ``OSError`` with the path for other failures.
    """

    path: Path
    fd: int

    @classmethod
    @contextmanager
    def open(cls, path: Path, *, follow: bool = True) -> Iterator[OwnedFolder]:
        """Opens a folder. It may be a link only with ``follow``; folders above it may be links in any case."""
        with _named(path, "", None):
            fd = os.open(path, _FOLDER & ~os.O_NOFOLLOW if follow else _FOLDER)
        try:
            yield cls(path, fd)
        finally:
            _close(fd)

    def create(self, name: str) -> int:
        """Creates a file that is not there yet and returns its descriptor, for writing."""
        return self.open_file(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def open_file(self, name: str, flags: int) -> int:
        """Opens a file and returns its descriptor."""
        with self._above(name) as (fd, last), _named(self.path, name, (fd, last)):
            return os.open(last, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666, dir_fd=fd)

    def stat(self, name: str) -> os.stat_result | None:
        """The state of an entry, without following a link; None where there is none."""
        with suppress(FileNotFoundError), self._above(name) as (fd, last), _named(self.path, name, None):
            return os.stat(last, dir_fd=fd, follow_symlinks=False)
        return None

    def entry(self, name: str) -> Entry | None:
        """The entry of this name; None where there is none."""
        state = self.stat(name)
        return None if state is None else Entry(name, state.st_mode)

    def make_folder(self, name: str) -> None:
        """Makes a folder and those above it, where they do not exist."""
        parts = PurePosixPath(name).parts
        for depth in range(1, len(parts) + 1):
            part = "/".join(parts[:depth])
            with self._above(part) as (fd, last):
                with _named(self.path, part, None), suppress(FileExistsError):
                    os.mkdir(last, dir_fd=fd)
                with _named(self.path, part, (fd, last)):
                    _close(os.open(last, _FOLDER, dir_fd=fd))

    def rename(self, old: str, new: str) -> None:
        with self._above(old) as source, self._above(new) as target, _named(self.path, new, None):
            os.rename(source[1], target[1], src_dir_fd=source[0], dst_dir_fd=target[0])

    def move_file(self, old: str, new: str) -> None:
        """Renames a file. Between two file systems, copies it, syncs the copy and removes ``old``.

        A reader of ``new`` may see a part of it during the copy.
        """
        try:
            self.rename(old, new)
            return
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        with suppress(FileNotFoundError):
            self.unlink(new)
        with (
            os.fdopen(self.open_file(old, os.O_RDONLY), "rb") as source,
            os.fdopen(self.create(new), "wb") as target,
        ):
            shutil.copyfileobj(source, target, _BUFFER)
            target.flush()
            os.fsync(target.fileno())
        self.unlink(old)

    def unlink(self, name: str) -> None:
        with self._above(name) as (fd, last), _named(self.path, name, None):
            os.unlink(last, dir_fd=fd)

    def sync(self, name: str = ".") -> None:
        """Syncs a folder's entries to the disk."""
        with self._folder(name) as fd, _named(self.path, name, None):
            os.fsync(fd)

    def entries(self, name: str = ".") -> list[Entry]:
        """The entries of a folder, sorted by name; none if there is no such folder."""
        with suppress(FileNotFoundError, NotADirectoryError), self._folder(name) as fd:
            found = []
            with _named(self.path, name, None), os.scandir(fd) as there:
                for entry in there:
                    with suppress(FileNotFoundError):  # removed meanwhile
                        mode = entry.stat(follow_symlinks=False).st_mode
                        found.append(Entry(entry.name if name == "." else f"{name}/{entry.name}", mode))
            return sorted(found, key=lambda entry: entry.name)
        return []

    def below(self, name: str, mine: Callable[[Entry], bool]) -> Iterator[Entry]:
        """Yields the entries of a folder and of folders below it that are ``mine``, each folder before its entries."""
        for entry in self.entries(name):
            yield entry
            if entry.is_folder and mine(entry):
                yield from self.below(entry.name, mine)

    def remove(self, name: str, mine: Callable[[Entry], bool]) -> bool:
        """Removes an entry if it is ``mine``, with those below it that are. Returns whether nothing is left of it.

        A folder with other entries stays, with these.
        """
        entry = self.entry(name)
        return entry is None or self._remove(entry, mine)

    def _remove(self, entry: Entry, mine: Callable[[Entry], bool]) -> bool:
        if not mine(entry):
            return False
        if not entry.is_folder:
            with suppress(FileNotFoundError):
                self.unlink(entry.name)
            return True
        left = [inner for inner in self.entries(entry.name) if not self._remove(inner, mine)]
        if left:
            return False
        with suppress(FileNotFoundError), self._above(entry.name) as (fd, last), _named(self.path, entry.name, None):
            os.rmdir(last, dir_fd=fd)
        return True

    @contextmanager
    def _folder(self, name: str) -> Iterator[int]:
        """A descriptor of a folder below, or of this one where ``name`` is ``"."``."""
        with self._above(f"{name}/_" if name != "." else "_") as (fd, _):
            yield fd

    @contextmanager
    def _above(self, name: str) -> Iterator[tuple[int, str]]:
        """A descriptor of the folder that an entry is in, and the last part of the entry's name."""
        parts = PurePosixPath(name).parts
        if not parts or {"..", "/", "//"} & {*parts}:
            raise OutputError(f"{self.path}: {name!r} is no name below it")
        *folders, last = parts
        fd = self.fd
        try:
            for depth, part in enumerate(folders, start=1):
                with _named(self.path, "/".join(folders[:depth]), (fd, part)):
                    inner = os.open(part, _FOLDER, dir_fd=fd)
                if fd != self.fd:
                    _close(fd)
                fd = inner
            yield fd, last
        finally:
            if fd != self.fd:
                _close(fd)


def _close(fd: int) -> None:
    """Closes a folder. An error does not matter, for nothing was written through it."""
    with suppress(OSError):
        os.close(fd)


@contextmanager
def _named(root: Path, name: str, opened: tuple[int, str] | None) -> Iterator[None]:
    """Puts the full path into errors. Raises :class:`OutputError` if ``opened``, a name in a folder, is a link."""
    try:
        yield
    except OSError as error:
        path = root / name
        try:
            folder, last = opened or (None, path)
            linked = stat.S_ISLNK(os.stat(last, dir_fd=folder, follow_symlinks=False).st_mode)
        except OSError:
            linked = False
        if linked and (opened or not name):
            raise OutputError(
                f"{path}: is a link; remove it: nothing is written, renamed or removed through one"
            ) from error
        error.filename = str(path)
        raise
