"""What is read of a checkpoint's tensors for a parameter is what its pieces say, whatever the size of a chunk."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixprec_build.errors import SourceError
from mixprec_build.ranks.assemble import as_parameter, contents
from mixprec_build.ranks.files import _shards
from mixprec_build.ranks.pieces import Parameter, Piece
from mixprec_build.storage import reader as storage_reader
from mixprec_build.storage.header import TensorInfo, build_header, parse_header
from mixprec_build.storage.reader import FileReader, TensorReader

Array = np.ndarray[Any, Any]


class Memory(TensorReader):
    """Tensors of two axes, which are read by rows."""

    def __init__(self, tensors: dict[str, Array]):
        self._tensors = tensors

    def close(self) -> None: ...

    def read_into(self, tensor: TensorInfo, window: memoryview, at: int = 0) -> None:
        stored = self._tensors[tensor.name]
        assert at % stored.strides[0] == len(window) % stored.strides[0] == 0
        window[:] = stored.tobytes()[at : at + len(window)]

    def chunks(self, tensor: TensorInfo) -> Iterator[bytes]:
        raise NotImplementedError


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
                transposed = draw.random() < 0.3
                height, width = (right - left, bottom - top) if transposed else (bottom - top, right - left)
                above, beside = (draw.choice([0, 0, 3]) for _ in range(2))
                stored = noise.integers(1, 250, (height + above + 1, width + beside), element)
                name = f"{len(tensors)}"
                tensors[name] = stored
                piece = stored[above : above + height, beside : beside + width]
                due[expert, top:bottom, left:right] = piece.T if transposed else piece
                info = TensorInfo(name, dtype, stored.shape, "file", 0, stored.nbytes)
                pieces.append(
                    Piece(info, (above, above + height), (beside, beside + width), (expert, top, left), transposed)
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


def open_below(folder: Path) -> int:
    """How many files of a folder this process has open."""
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(link.resolve().parent == folder for link in links)


def files(folder: Path, count: int) -> list[TensorInfo]:
    """Each of one tensor, of its own bytes."""
    for number in range(count):
        (folder / str(number)).write_bytes(bytes([number]) * 1000)
    return [TensorInfo(f"of {number}", "U8", (1000,), str(number), 0, 1000) for number in range(count)]


def test_no_more_files_stay_open_than_may(tmp_path: Path) -> None:
    tensors = files(tmp_path, 200)
    with FileReader(lambda file: tmp_path / file) as reader:
        for number in (*range(200), *range(200)):
            assert b"".join(contents(as_parameter(tensors[number]), reader)) == bytes([number]) * 1000
        assert open_below(tmp_path) == storage_reader._MOST_OPEN == 64
        tensors[0] = tensors[0]._replace(file="gone")
        with pytest.raises(SourceError, match="gone: cannot open it"):
            b"".join(contents(as_parameter(tensors[0]), reader))
        assert open_below(tmp_path) < 64
    assert open_below(tmp_path) == 0


def test_no_file_is_closed_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More threads than files may be open: each reads what is in its own."""
    monkeypatch.setattr(storage_reader, "_MOST_OPEN", 2)
    tensors = files(tmp_path, 20)
    draw = random.Random(0)
    order = [draw.randrange(20) for _ in range(4000)]
    most = 0

    def read(number: int) -> bool:
        nonlocal most
        most = max(most, len(reader._open))
        return b"".join(contents(as_parameter(tensors[number]), reader)) == bytes([number]) * 1000

    with FileReader(lambda file: tmp_path / file) as reader, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, order))
    assert most <= 8 + 2 and open_below(tmp_path) == 0


def test_a_file_has_no_more_tensors_than_are_read(tmp_path: Path) -> None:
    parameters = [Parameter(f"p.{number}.{'x' * 60}", "U8", (1,), ()) for number in range(350_000)]
    shards = _shards(parameters, 1 << 40)
    assert [len(shard) for shard in shards] == [150_000, 150_000, 50_000]
    header = build_header((p.name, p.dtype, p.shape, p.nbytes) for p in shards[0])
    read, _ = parse_header(header, path="x", file="x", file_size=len(header) + 150_000)
    assert list(read) == [parameter.name for parameter in shards[0]]
