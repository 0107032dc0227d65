"""A rank's files are in the page cache, as far as there was time, when its model has been made."""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from pathlib import Path
from typing import Any

import pytest
from support.page_cache import forget
from support.sglang.harness import make
from support.sglang.mixes import mix

from mixprec_build.checkpoint.degree import Degree
from mixprec_runtime.loading import ahead

pytestmark = pytest.mark.usefixtures("sglang")

MIB = 1 << 20


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """On a disk, and not in the page cache."""
    found = [tmp_path / f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    for path in found:
        path.write_bytes(os.urandom(20 * MIB))
    forget(tmp_path)
    if any(cached(path) for path in found):
        pytest.skip("this file system forgets nothing")
    return found


def cached(path: Path) -> int:
    """MiB of a file in the page cache. Reading, even without waiting, would have the system read more."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as pages:
        count = len(pages) // mmap.PAGESIZE
        resident = (ctypes.c_ubyte * count)()
        start = ctypes.c_char.from_buffer(pages)
        assert not ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(pages)), resident)
        del start  # an exported pointer keeps the map open
        return sum(page & 1 for page in resident) * mmap.PAGESIZE // MIB


def wait_for(condition: Any) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_files_are_read_in_order_up_to_a_limit(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MOST", 32 * MIB)
    with ahead.reading(files):
        wait_for(lambda: cached(files[0]) == 20 and cached(files[1]) >= 8)
    assert cached(files[2]) < 8


def test_reading_ends_with_the_context(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    stock = os.preadv

    def slow(fd: int, buffers: Any, at: int, flags: int = 0) -> int:
        if not flags:
            read.append(at)
            time.sleep(0.05)
        return stock(fd, buffers, at, flags)

    monkeypatch.setattr(os, "preadv", slow)
    with ahead.reading(files * 1000):
        wait_for(lambda: len(read) >= 4)
    assert len(read) <= 16  # of thousands
    count = len(read)
    time.sleep(0.2)
    assert len(read) == count


def test_what_is_cached_is_not_read_again(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for path in files:
        path.read_bytes()
    asked, stock = [], os.preadv

    def listed(fd: int, buffers: Any, at: int, flags: int = 0) -> int:
        asked.append(flags)
        return stock(fd, buffers, at, flags)

    monkeypatch.setattr(os, "preadv", listed)
    with ahead.reading(files):
        wait_for(lambda: len(asked) == 60)
    assert {*asked} == {os.RWF_NOWAIT}


def test_a_missing_file_and_a_pipe_are_left_to_the_loader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("none", "pipe"):
        with ahead.reading([tmp_path / name]):
            pass


def test_each_rank_begins_with_another_file_or_has_its_own(files: list[Path]) -> None:
    folder = files[0].parent
    assert ahead.files_of(folder, Degree(1), 0) == files
    assert [ahead.files_of(folder, Degree(3), rank) for rank in (1, 2)] == [
        [files[1], files[2], files[0]],
        [files[2], files[0], files[1]],
    ]
    own = folder / Degree(2).folder(1)
    own.mkdir(parents=True)
    (own / "x.safetensors").touch()
    assert ahead.files_of(folder, Degree(2), 1) == [own / "x.safetensors"]


def test_the_files_of_a_model_are_read_while_it_is_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, read = mix(folder, "qwen3_moe"), []
    stock = ahead.reading
    monkeypatch.setattr(ahead, "reading", lambda files: read.append([*files]) or stock(files))
    make(checkpoint)
    assert read == [sorted(checkpoint.glob("*.safetensors"))]
