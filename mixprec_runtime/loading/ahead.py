"""Reads a rank's files ahead, into the page cache, while SGLang makes the model that they are for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.errors import SourceError
from mixprec_build.storage.disk import opened

__all__ = ["MOST", "files_of", "reading"]

MOST = 4 << 30
"""Bytes a rank: what a fast disk reads meanwhile, and little beside the memory of a machine with GPUs."""
_THREADS = 4
_BLOCK = 1 << 20
"""Small, since what is read to make the model waits for blocks that are under way."""


def files_of(folder: Path, degree: Degree, rank: int) -> Sequence[Path]:
    """The files that a rank reads, in the order to read them ahead: its own, else all of a checkpoint's.

    All ranks need a part of each of the latter, so that each begins with another file.
    """
    own = folder / degree.folder(rank)
    files = sorted((own if own.is_dir() else folder).glob("*.safetensors"))
    first = 0 if own.is_dir() else rank * len(files) // degree.tp
    return files[first:] + files[:first]


@contextmanager
def reading(files: Sequence[Path]) -> Iterator[None]:
    """Reads ``files`` one after the other while the context lasts, up to :data:`MOST` bytes of them."""
    ended = Event()
    threads = [Thread(target=_read, args=(files, number, ended), daemon=True) for number in range(_THREADS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def _read(files: Sequence[Path], number: int, ended: Event) -> None:
    """Reads every fourth block, beginning with block ``number``."""
    buffer, count = memoryview(bytearray(_BLOCK)), 0
    try:
        for path in files:
            with opened(path) as fd:
                size = os.fstat(fd).st_size
                for at in range(0, size, _BLOCK):
                    count += 1
                    if ended.is_set() or count * _BLOCK > MOST:
                        return
                    # The system may have read the first bytes along with the block before.
                    if count % _THREADS == number and not _is_cached(fd, min(at + _BLOCK, size) - 1):
                        os.preadv(fd, [buffer], at)
    except SourceError:
        return  # whoever needs these bytes meets the same error, and names it


def _is_cached(fd: int, at: int) -> bool:
    """Whether the byte ``at`` is in the page cache, as far as the file system tells."""
    try:
        return bool(os.preadv(fd, [bytearray(1)], at, os.RWF_NOWAIT))
    except OSError:  # it is not, or the file system cannot tell
        return False
