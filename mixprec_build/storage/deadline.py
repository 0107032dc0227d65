"""Bounds the time that another library's function may take."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["TooLateError", "at_most"]


class TooLateError(BaseException):
    """The time is over. Not an ``Exception``, which libraries catch to try again."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises :class:`TooLateError` in the body, at its next step in Python, once the time is over.

    This ends a body that receives one byte after another, which cleans up as after Ctrl-C. A body that waits for a
    single answer needs a timeout of its own.
    """
    thread, lock = ctypes.c_ulong(threading.get_ident()), threading.Lock()
    running = [True]

    def end() -> None:
        with lock:
            if running:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(TooLateError))

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            running.clear()
        # Takes back an exception that has not been raised yet.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)
