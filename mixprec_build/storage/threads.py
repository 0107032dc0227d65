"""Runs tasks in threads that stop together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from ..errors import WriteError

__all__ = ["MOST_JOBS", "Progress", "map_in_order", "run_all"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


MOST_JOBS = 256
"""Threads at a time: more have never been faster, and each takes memory."""

Progress = Callable[[int], None]
"""Called with the number of bytes that were just done, from any thread."""


def run_all(tasks: Sequence[Callable[[], None]], jobs: int, stop: threading.Event, out: Path) -> None:
    """Runs tasks in ``jobs`` threads, at most :data:`MOST_JOBS`.

    If one fails, and on Ctrl-C, sets ``stop`` and waits for all that have begun. More Ctrl-C do not end the wait, for
    the caller then closes the files that these tasks write to.

    Raises:
        WriteError: no thread can be started.
    """
    idle = threading.Condition()
    working = 0

    def run(task: Callable[[], None]) -> None:
        nonlocal working
        with idle:
            working += 1
        try:
            if not stop.is_set():
                task()
        finally:
            with idle:
                working -= 1
                idle.notify_all()

    with ThreadPoolExecutor(max_workers=min(jobs, MOST_JOBS)) as pool:
        try:
            try:
                running = [pool.submit(run, task) for task in tasks]
            except RuntimeError as error:  # no memory for its stack, or no more processes allowed
                raise WriteError(f"{out}: {error}; try --jobs 1") from error
            for done in as_completed(running):
                done.result()
        except BaseException:
            stop.set()
            waiting = True
            while waiting:
                # Futures cannot tell: after Ctrl-C while a thread was started there is none.
                with suppress(KeyboardInterrupt), idle:
                    idle.wait_for(lambda: not working)
                    waiting = False
            raise


def map_in_order(
    function: Callable[[_Item], _Result], items: Iterable[_Item], jobs: int
) -> Generator[_Result, None, None]:
    """Yields ``function(item)`` of each item in order, computed in ``jobs`` threads. Closing it waits for these.

    ``Executor.map`` would hand out all items before the first result: a million of them take a GB.
    """
    waiting: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
