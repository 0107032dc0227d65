"""Files out of the page cache, and how fast they are read, for benchmarks."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["forget", "seconds_to_read"]

PIECE = 8 << 20


def forget(folder: Path) -> None:
    """Drops a folder's files from the page cache."""
    for path in folder.rglob("*"):
        if not path.is_file():
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_to_read(folder: Path, threads: int) -> float:
    """Reads a folder's safetensors files, 8 MiB at a time in ``threads``, into memory that is used again."""
    pieces = [(path, at) for path in folder.glob("*.safetensors") for at in range(0, path.stat().st_size, PIECE)]
    buffers = [bytearray(PIECE) for _ in range(threads)]

    def work(thread: int) -> None:
        for path, at in pieces[thread::threads]:
            fd = os.open(path, os.O_RDONLY)
            os.preadv(fd, [buffers[thread]], at)
            os.close(fd)

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return time.perf_counter() - started
