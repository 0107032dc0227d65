"""The one reader of tensors: what it reads; where it cannot, it names the file and the tensor."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mixprec_build.errors import SourceError
from mixprec_build.output.copier import read_tensor
from mixprec_build.storage.header import TensorInfo, build_header, parse_header, read_header
from mixprec_build.storage.reader import BUFFER, FileReader, checksum_on_disk

ROWS = np.arange(12, dtype="<i2").reshape(4, 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of two tensors, the second of which is ``ROWS``."""
    header = build_header([("first", "U8", (5,), 5), ("rows", "I16", ROWS.shape, ROWS.nbytes)])
    path = tmp_path / "model.safetensors"
    path.write_bytes(header + b"12345" + ROWS.tobytes())
    return path


def tensor_in(path: Path, name: str = "rows") -> TensorInfo:
    data, size = read_header(path)
    return parse_header(data, path=path, file=path.name, file_size=size)[0][name]


def copied(path: Path, tensor: TensorInfo) -> bytes:
    """As a build copies it."""
    window = memoryview(bytearray(tensor.nbytes))
    fd = os.open(path, os.O_RDONLY)
    try:
        read_tensor(fd, path, tensor, window)
    finally:
        os.close(fd)
    return bytes(window)


Read = Callable[[Path, TensorInfo], Any]


def through_reader(read: Callable[[FileReader, TensorInfo], Any]) -> Read:
    def call(path: Path, tensor: TensorInfo) -> Any:
        with FileReader(lambda _: path) as reader:
            return read(reader, tensor)

    return call


WAYS: dict[str, Read] = {
    "array": through_reader(FileReader.array),
    "bytes": through_reader(lambda reader, tensor: reader.read(tensor, 6, 12)),
    "chunks": through_reader(lambda reader, tensor: list(reader.chunks(tensor))),
    "first values": through_reader(lambda reader, tensor: reader.first_values(tensor, 18)),
    "checksum": checksum_on_disk,
    "copy": copied,
}


@pytest.mark.parametrize("way", WAYS)
def test_all_say_the_same_of_a_file_that_became_shorter(path: Path, way: str) -> None:
    tensor = tensor_in(path)
    os.truncate(path, path.stat().st_size - 8)
    with pytest.raises(SourceError) as caught:
        WAYS[way](path, tensor)
    assert str(caught.value) == f"{path}: ends inside rows; fetch the file again"


@pytest.mark.parametrize("way", WAYS)
def test_all_say_the_same_of_a_disk_that_fails(path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    tensor = tensor_in(path)

    def fail(*_: Any) -> Any:
        raise OSError(5, os.strerror(5))

    for function in ("pread", "preadv", "lseek"):
        monkeypatch.setattr(os, function, fail)
    with pytest.raises(SourceError) as caught:
        WAYS[way](path, tensor)
    assert str(caught.value) == f"{path}: cannot read rows: Input/output error"


def test_rows_and_values(path: Path) -> None:
    tensor = tensor_in(path)
    with FileReader(lambda _: path) as reader:
        assert np.array_equal(reader.array(tensor), ROWS)
        window = np.empty((2, 3), "<i2")
        reader.read_into(tensor, window.view(np.uint8).data.cast("B"), 6)
        assert np.array_equal(window, ROWS[1:3])
        first = reader.first_values(tensor, 10)
        assert first is not None and first.tolist() == [0, 1, 2, 3, 4]
        assert reader.array(tensor_in(path, "first")).tobytes() == b"12345"


def test_chunks_are_small(tmp_path: Path) -> None:
    size = 2 * BUFFER + 3
    tensor = TensorInfo("t", "U8", (size,), "t", 1, size)
    (tmp_path / "t").write_bytes(b"x" * (size + 1))
    with FileReader(lambda file: tmp_path / file) as reader:
        assert [len(chunk) for chunk in reader.chunks(tensor)] == [BUFFER, BUFFER, 3]


def test_files_that_are_elsewhere(path: Path) -> None:
    tensor = tensor_in(path)
    data = path.read_bytes()
    asked = []

    def elsewhere(file: str, offset: int, length: int) -> bytes:
        asked.append((file, length))
        return data[offset : offset + length]

    reader = FileReader(lambda _: None, elsewhere)
    assert np.array_equal(reader.array(tensor), ROWS)
    assert b"".join(reader.chunks(tensor)) == ROWS.tobytes()
    assert reader.first_values(tensor, 6) is None, "is not worth a request"
    assert asked == [(path.name, ROWS.nbytes)] * 2
    data = data[:-1]
    for read in (reader.array, lambda tensor: list(reader.chunks(tensor))):
        with pytest.raises(SourceError, match=re.escape(f"{path.name}: ends inside rows; fetch the file again")):
            read(tensor)
    with pytest.raises(SourceError, match=r"^model\.safetensors is not on this machine$"):
        FileReader(lambda _: None).array(tensor)
