"""Opens, reads and writes files on this machine, with errors that name the file."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from ..errors import SourceError, WriteError

__all__ = [
    "MAX_FILE_BYTES",
    "check_space",
    "checksum_of_file",
    "inside",
    "open_regular",
    "open_size",
    "opened",
    "pread_all",
    "pread_into",
    "pwrite_all",
    "read_chunks",
    "read_regular",
    "source_errors",
    "sync_folder",
    "write_errors",
]

_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux; a hint, so its absence costs time only


def pwrite_all(fd: int, data: memoryview, at: int) -> None:
    """Writes all of ``data`` to a file from the byte ``at`` on."""
    while data:
        done = os.pwrite(fd, data, at)
        data, at = data[done:], at + done


def start_writeback(fd: int) -> None:
    """Asks the kernel to start writing a file's dirty pages, so that the disk works while the copy goes on."""
    if _sync_file_range is not None:
        _sync_file_range(fd, ctypes.c_int64(0), ctypes.c_int64(0), 2)  # SYNC_FILE_RANGE_WRITE, fcntl.h


def check_space(folder: Path, need: int) -> None:
    """Raises :class:`WriteError` if fewer than ``need`` bytes are free where ``folder`` is."""
    with write_errors(folder):
        disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if need > free:
        raise WriteError(f"{folder}: {need} bytes are needed, {free} are free")


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` into a :class:`WriteError` with its file, or ``path``, and what to do about it."""
    try:
        yield
    except OSError as error:
        hint = {
            errno.ENOSPC: "; free some space",
            errno.EDQUOT: "; your quota is used up, free some space",
            errno.EACCES: "; write permission is missing",
        }.get(error.errno or 0, "")
        raise WriteError(f"{error.filename or path}: {error.strerror}{hint}") from error


MAX_FILE_BYTES = 256 << 20
"""Most bytes of a file other than safetensors: a tokenizer, a manifest, ..."""
_CHUNK = 4 << 20


@contextmanager
def source_errors(path: Path) -> Iterator[None]:
    """Turns an ``OSError`` into a :class:`SourceError` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise SourceError(f"cannot read it: {error.strerror}", path=path) from error


def open_regular(path: Path) -> int:
    """Opens a regular file for reading. Raises :class:`SourceError` for any other, without waiting for a FIFO."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"cannot open it: {error.strerror}", path=path) from error
    try:
        with source_errors(path):
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return fd
        raise SourceError("not a regular file", path=path)
    except SourceError:
        os.close(fd)
        raise


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Opens a regular file for reading, and closes it. Raises :class:`SourceError`, also if the body fails to read."""
    fd = open_regular(path)
    with source_errors(path):
        try:
            yield fd
        finally:
            os.close(fd)


def open_size(path: Path) -> int:
    """The size in bytes of a regular file. Raises :class:`SourceError` if it cannot be opened."""
    with opened(path) as fd:
        return os.fstat(fd).st_size


def pread_all(fd: int, length: int, offset: int) -> bytes:
    """Reads ``length`` bytes of a file, fewer only where it ends. One ``pread`` reads 2 GiB at most."""
    parts = []
    while length > 0 and (data := os.pread(fd, length, offset)):
        parts.append(data)
        length, offset = length - len(data), offset + len(data)
    return b"".join(parts)


def pread_into(fd: int, window: memoryview, offset: int) -> int:
    """Fills ``window`` from a file. Returns the number of bytes read, less than its length only where the file ends."""
    done = 0
    while done < len(window) and (got := os.preadv(fd, [window[done:]], offset + done)):
        done += got
    return done


def read_regular(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """Reads a small file. Raises :class:`SourceError` if it is larger than ``limit`` or not a regular file."""
    with opened(path) as fd:
        return pread_all(fd, _size_within(limit, fd, path), 0)


def _size_within(limit: int, fd: int, path: Path) -> int:
    size = os.fstat(fd).st_size
    if size > limit:
        raise SourceError(f"{size} bytes; at most {limit} are read", path=path)
    return size


def checksum_of_file(path: Path, limit: int = MAX_FILE_BYTES) -> str:
    """The hexadecimal xxh3_128 of a file, read a few MiB at a time.

    Raises:
        SourceError: it is no regular file, larger than ``limit``, or cannot be read.
    """
    digest = xxhash.xxh3_128()
    for data in read_chunks(path, limit):
        digest.update(data)
    return str(digest.hexdigest())


def read_chunks(path: Path, limit: int = MAX_FILE_BYTES) -> Iterator[bytes]:
    """Yields a file's bytes, a few MiB at a time. Raises as :func:`checksum_of_file`."""
    with opened(path) as fd:
        at, size = 0, _size_within(limit, fd, path)
        while at < size:
            data = pread_all(fd, min(_CHUNK, size - at), at)
            if not data:
                raise SourceError("was cut short while it was read; start again", path=path)
            yield data
            at += len(data)


def inside(folder: Path, name: str) -> Path:
    """The path of a checkpoint's file, which may be a link within the folder or into the blobs of the hub's cache.

    Raises:
        SourceError: it is a link to anywhere else, such as a file of the user's, or a folder in ``name`` is a link.
    """
    path = folder / name
    home, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    if target == home / name:
        return path
    parent = Path(name).parent
    if os.path.realpath(folder / parent) != str(home / parent):
        raise SourceError("a folder of its name is a link; put the folder itself there", path=path)
    # models--org--name/snapshots/<commit>/<file> -> models--org--name/blobs/<etag>, with no other link on the way
    repository = next((parent.parent for parent in home.parents if parent.name == "snapshots"), home)
    cached = repository.name.startswith("models--") and target.parent == repository / "blobs"
    if not cached and home not in target.parents:
        raise SourceError(f"a link to {target}, outside of the checkpoint; put the file itself there", path=path)
    return path


def sync_folder(folder: Path) -> None:
    """Syncs a folder's entries to the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
