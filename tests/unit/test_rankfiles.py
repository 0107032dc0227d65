"""What is read of a checkpoint's tensors for a parameter is what its pieces say, whatever the size of a chunk."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mixprec_build.header import TensorInfo
from mixprec_build.presplit import Parameter, Piece
from mixprec_build.rankfiles import Reader, contents

Array = np.ndarray[Any, Any]


class Memory(Reader):
    """Tensors of two axes."""

    def __init__(self, tensors: dict[str, Array]):
        self._tensors = tensors

    def close(self) -> None: ...

    def rows(self, piece: Piece, first: int, into: Array) -> None:
        assert into.flags.c_contiguous and into.shape[1] == piece.width
        into[...] = self._tensors[piece.tensor.name][first : first + len(into)]


def cuts(draw: random.Random, size: int) -> Iterator[tuple[int, int]]:
    """Ranges from 0 to ``size``, one after the other."""
    inner = sorted(draw.sample(range(1, size), min(size - 1, draw.randrange(3))))
    return zip([0, *inner], [*inner, size], strict=True)


@pytest.mark.parametrize("seed", range(200))
def test_contents_are_what_the_pieces_say(seed: int) -> None:
    draw, noise = random.Random(seed), np.random.default_rng(seed)
    dtype, element = draw.choice([("U8", np.uint8), ("BF16", np.uint16), ("I32", np.uint32)])
    experts, rows, columns = (draw.randrange(1, size) for size in (5, 40, 30))
    due = np.zeros((experts, rows, columns), element)
    tensors: dict[str, Array] = {}
    pieces = []
    for expert in range(experts):
        for top, bottom in cuts(draw, rows):
            for left, right in cuts(draw, columns):
                if draw.random() < 0.2:  # left to the filler
                    continue
                turned = draw.random() < 0.3
                height, width = (right - left, bottom - top) if turned else (bottom - top, right - left)
                above, beside = (draw.choice([0, 0, 3]) for _ in range(2))
                stored = noise.integers(1, 250, (height + above + 1, width + beside), element)
                name = f"{len(tensors)}"
                tensors[name] = stored
                piece = stored[above : above + height, beside : beside + width]
                due[expert, top:bottom, left:right] = piece.T if turned else piece
                info = TensorInfo(name, dtype, stored.shape, "file", 0, stored.nbytes)
                pieces.append(
                    Piece(info, (above, above + height), (beside, beside + width), (expert, top, left), turned)
                )
    draw.shuffle(pieces)
    parameter = Parameter("p", dtype, due.shape, tuple(pieces), experts=True)
    buffers = [np.full(due.nbytes + 4000, 77, np.uint8) for _ in range(2)]

    def allocate(nbytes: int) -> Array:
        buffers.reverse()
        return buffers[0][:nbytes]

    chunks = [
        bytes(chunk) for chunk in contents(parameter, Memory(tensors), most=draw.randrange(1, 4000), allocate=allocate)
    ]
    assert b"".join(chunks) == due.tobytes()
