"""Garbage collection, which only takes time where millions of objects stay, and memory that the C library keeps."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["give_back_large_blocks", "no_garbage_collection"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE = 8 << 20


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Turns garbage collection off: planning makes a million objects that all stay, and would take a third longer."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def give_back_large_blocks() -> None:
    """Makes glibc give freed blocks of 8 MiB or more back to the system.

    By itself it raises that limit, up to 32 MiB, once such a block is freed, and keeps smaller ones. Headers, indexes
    and manifests of many tensors have that size: what is kept of them would be up to a fifth of a command's memory.
    Other C libraries have no such function.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
        mallopt(_M_TRIM_THRESHOLD, _LARGE)
