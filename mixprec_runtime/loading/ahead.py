"""Has the operating system read files ahead, while SGLang makes the model that they are for."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from threading import Thread

from mixprec_build.errors import MixprecError
from mixprec_build.ranks.pieces import Parameter
from mixprec_build.storage.disk import opened

from .loader import Share

__all__ = ["MOST", "begin", "spans"]

MOST = 2 << 30
"""Bytes a rank: what a fast disk reads meanwhile, and little beside the memory of a machine with GPUs."""
_NEAR = 1 << 20
"""Bytes between two spans that are read along, since they cost less than another request."""

Span = tuple[str, int, int]
"""A file, and the first byte and the end of a part of it."""


def begin(share: Share) -> Thread:
    """Asks for the first :data:`MOST` bytes of what a rank reads, in a thread that nothing has to wait for."""
    thread = Thread(target=_ask_for, args=(share,), name="mixprec-read-ahead", daemon=True)
    thread.start()
    return thread


def _ask_for(share: Share) -> None:
    left = MOST
    for file, parts in groupby(spans(share.parameters.values()), itemgetter(0)):
        # Whoever needs these bytes meets the same error, and names it.
        with suppress(OSError, MixprecError), opened(Path(share.path_of(file))) as fd:
            for _, start, end in parts:
                nbytes = min(left, end - start)
                os.posix_fadvise(fd, start, nbytes, os.POSIX_FADV_WILLNEED)
                left -= nbytes
                if not left:
                    return


def spans(parameters: Iterable[Parameter]) -> Iterator[Span]:
    """Yields the parts of files that parameters are in, in the order of files and of their bytes."""
    pieces = [(piece.tensor, piece.rows) for parameter in parameters for piece in parameter.pieces]
    rectangles: list[Span] = []
    for tensor, (first, last) in pieces:
        row = tensor.nbytes // (tensor.shape[0] if tensor.shape else 1)
        rectangles.append((tensor.file, tensor.start + first * row, tensor.start + last * row))
    rectangles.sort()
    file, start, end = "", 0, 0
    for part, first, last in rectangles:
        if part != file or first > end + _NEAR:
            if end:
                yield file, start, end
            file, start, end = part, first, last
        end = max(end, last)
    if end:
        yield file, start, end
