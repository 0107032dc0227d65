"""A bound on the time that another library's function may take."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["TooLateError", "at_most"]


class TooLateError(BaseException):
    """The time is over. No ``Exception``: libraries that try again after those must not catch it."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises :class:`TooLateError` in the body once the time is over, at its next step in Python.

    So a body that waits for one byte after another ends, and cleans up after itself as on Ctrl-C; one that waits for a
    single answer needs a timeout of its own beside this.
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
        # What was raised and has not come up yet, if anything.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)
