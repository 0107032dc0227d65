"""Progress bars, consoles and JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from ..storage.threads import Progress

__all__ = ["console", "print_json", "progress_bar"]


@contextmanager
def progress_bar(what: str, total: int, quiet: bool) -> Iterator[Progress]:
    """Shows a progress bar on standard error; yields the function to call with the bytes just done."""
    if quiet or not total:
        yield lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)


def console(stderr: bool = False) -> Console:
    """A console on standard output or standard error."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    # Piped output is for other programs: wide enough that no cell is broken.
    return Console(stderr=stderr, width=None if stream.isatty() else 160, highlight=False)


def print_json(facts: object) -> None:
    """Prints JSON with control characters and changes of direction escaped."""
    text = json.dumps(facts, indent=2, ensure_ascii=False)
    print("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))
