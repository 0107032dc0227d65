"""The operating system is asked for what a rank reads, and for no more, while its model is made."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import pytest
from support.sglang.harness import make, rank_of
from support.sglang.mixes import mix

from mixprec_build.checkpoint.manifest import read_manifest
from mixprec_build.storage.header import TensorInfo
from mixprec_runtime.loading import ahead, loader

pytestmark = pytest.mark.usefixtures("sglang")


@pytest.mark.parametrize(("rank", "tp", "ep"), [(0, 1, 1), (1, 2, 1), (1, 2, 2)])
def test_spans_are_what_the_loader_reads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rank: int, tp: int, ep: int
) -> None:
    checkpoint, read = mix(folder, "qwen3_moe"), defaultdict[str, set[int]](set)
    monkeypatch.setattr(ahead, "_NEAR", 0)
    monkeypatch.setattr(ahead, "begin", lambda _: None)
    stock = loader.FileReader.read_into

    def read_into(self: loader.FileReader, tensor: TensorInfo, window: memoryview, at: int = 0) -> None:
        read[tensor.file].update(range(tensor.start + at, tensor.start + at + len(window)))
        stock(self, tensor, window, at)

    with rank_of(rank, tp, ep):
        model, _ = make(checkpoint, **({"tp_size": tp, "ep_size": ep} if tp > 1 else {}))
        share = loader.rank_share(checkpoint, read_manifest(checkpoint))
        assert share is not None
        monkeypatch.setattr(loader.FileReader, "read_into", read_into)
        loader.load(model, share, model.load_weights)
    asked = defaultdict[str, set[int]](set)
    for file, start, end in ahead.spans(share.parameters.values()):
        assert start < end and not asked[file] & {start}
        asked[file].update(range(start, end))
    assert asked == read


def test_it_asks_for_the_first_bytes_when_a_model_is_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = mix(folder, "qwen3_moe")
    asked: list[tuple[int, int]] = []
    threads = []

    def advise(fd: int, start: int, nbytes: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED and 0 < start < start + nbytes <= os.fstat(fd).st_size
        asked.append((start, nbytes))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    monkeypatch.setattr(ahead, "MOST", 1 << 20)
    begin = ahead.begin
    monkeypatch.setattr(ahead, "begin", lambda share: threads.append(begin(share)))
    make(checkpoint)
    (thread,) = threads
    thread.join()
    assert sum(nbytes for _, nbytes in asked) == 1 << 20


def test_files_that_cannot_be_read_are_left_to_the_loader(folder: Path) -> None:
    """Which names them."""
    checkpoint = mix(folder, "qwen3_moe")
    with rank_of(0, 1, 1):
        share = loader.rank_share(checkpoint, read_manifest(checkpoint))
    assert share is not None
    ahead._ask_for(share.__class__(share.where, share.parameters, share.padded, lambda file: folder / "none" / file))
