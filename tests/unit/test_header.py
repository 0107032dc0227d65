"""safetensors headers: each rule of the format by a file that breaks it, with the safetensors library as judge."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from support.files import file_tensors
from support.run import at_most

from mixprec_build.errors import SourceError
from mixprec_build.storage import header as headers
from mixprec_build.storage.disk import open_regular, pread_all, read_regular
from mixprec_build.storage.dtypes import DTYPE_BITS
from mixprec_build.storage.header import MAX_HEADER_BYTES, TensorInfo, build_header, header_length, parse_header

PATH = "model.safetensors"
DAMAGED = f"{PATH}: damaged safetensors file: "


judge: Callable[[bytes], list[tuple[str, Any]]] = safetensors.deserialize


def pack(header: object, data: bytes = b"") -> bytes:
    """A file of this header (bytes as they are, anything else as JSON) and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def read(data: bytes) -> tuple[dict[str, TensorInfo], object]:
    """As a checkpoint's headers are read."""
    length = header_length(data[:8], path=PATH, file_size=len(data))
    return parse_header(data[: 8 + length], path=PATH, file=PATH, file_size=len(data))


def text(inner: str) -> bytes:
    """A header of one tensor ``a`` whose entry is written out."""
    return b'{"a":{' + inner.encode() + b"}}"


class Bad(NamedTuple):
    """A malformed file and what is said about it. The library accepts those that are ``stricter`` here."""

    name: str
    data: bytes
    message: str
    stricter: bool = False


NUMBERS = "tensor 'a': `shape` and `data_offsets` must be whole numbers, zero or more"
FIELDS = "tensor 'a' needs `dtype`, `shape` and two `data_offsets`"
TOO_SHORT = "too short for its header; fetch the file again"

BAD = [
    # The length and the size of the file
    Bad("empty file", b"", TOO_SHORT),
    Bad("seven bytes", b"\x02" + b"\0" * 6, TOO_SHORT),
    Bad("length and nothing else", (2).to_bytes(8, "little"), TOO_SHORT),
    Bad("length 0", pack(b""), TOO_SHORT),
    Bad("length 1", pack(b"{"), TOO_SHORT),
    Bad("length past the end", (3).to_bytes(8, "little") + b"{}", TOO_SHORT),
    Bad("length 2^64-1", b"\xff" * 8 + b"{}", TOO_SHORT),
    # Offsets: neither holes nor overlaps, and nothing before or after
    Bad("trailing byte", pack({"a": entry()}, b"12345"), "73 bytes long, but its tensors end at 72; fetch"),
    Bad("missing byte", pack({"a": entry()}, b"123"), "71 bytes long, but its tensors end at 72; fetch"),
    Bad("data without tensors", pack({}, b"1"), "11 bytes long, but its tensors end at 10; fetch"),
    Bad(
        "hole",
        pack({"a": entry(), "b": entry(offsets=(5, 9))}, b"123456789"),
        "tensor 'b' starts at 5 where 4 was due (hole or overlap)",
    ),
    Bad("hole in front", pack({"a": entry(offsets=(1, 5))}, b"12345"), "tensor 'a' starts at 1 where 0 was due"),
    Bad(
        "overlap",
        pack({"a": entry(), "b": entry(offsets=(3, 7))}, b"1234567"),
        "tensor 'b' starts at 3 where 4 was due (hole or overlap)",
    ),
    Bad(
        "the same span twice",
        pack({"a": entry(), "b": entry()}, b"1234"),
        "tensor 'b' starts at 0 where 4 was due (hole or overlap)",
    ),
    Bad(
        "empty tensor inside another",
        pack({"a": entry(), "b": entry(shape=[0], offsets=(2, 2))}, b"1234"),
        "tensor 'b' starts at 2 where 4 was due (hole or overlap)",
    ),
    Bad(
        "half a byte, reversed by one",
        pack({"a": entry("F4", (7,), (1, 0))}, b"1"),
        "tensor 'a': F4 [7] does not take the -1 bytes",
    ),
    Bad("reversed", pack({"a": entry(offsets=(4, 0))}, b"1234"), "tensor 'a': U8 [4] does not take the -4 bytes"),
    Bad("negative", pack({"a": entry(offsets=(-4, 0))}, b"1234"), NUMBERS),
    Bad("offset 2^64", pack({"a": entry(offsets=(1 << 64, (1 << 64) + 4))}, b"1234"), NUMBERS),
    Bad("float offset", pack({"a": entry(offsets=(0, 4.0))}, b"1234"), NUMBERS),
    Bad("bool offset", pack({"a": entry(shape=[1], offsets=(0, True))}, b"1"), NUMBERS),
    Bad("text offsets", pack({"a": entry(offsets="04")}, b"1234"), NUMBERS),
    Bad("null offset", pack({"a": entry(offsets=(0, None))}, b"1234"), NUMBERS),
    Bad("one offset", pack({"a": entry(offsets=(4,))}, b"1234"), FIELDS),
    Bad("three offsets", pack({"a": entry(offsets=(0, 4, 4))}, b"1234"), FIELDS),
    # Shapes
    Bad("too many bytes", pack({"a": entry("U8", (3,))}, b"1234"), "tensor 'a': U8 [3] does not take the 4 bytes"),
    Bad("too few bytes", pack({"a": entry("F32", (2,))}, b"1234"), "tensor 'a': F32 [2] does not take the 4 bytes"),
    Bad("half a byte", pack({"a": entry("F4", (7,))}, b"1234"), "tensor 'a': F4 [7] does not take the 4 bytes"),
    Bad("overflow", pack({"a": entry("U8", (1 << 62, 8, 4))}, b"1234"), f"tensor 'a': U8 [{1 << 62}, 8, 4] overflows"),
    Bad(
        "overflow back to zero",
        pack({"a": entry("U8", (1 << 62, 1 << 62, 0), (0, 0))}),
        f"tensor 'a': U8 [{1 << 62}, {1 << 62}, 0] overflows",
    ),
    Bad("float dim", pack({"a": entry(shape=[4.0])}, b"1234"), NUMBERS),
    Bad("exponent dim", pack(text('"dtype":"U8","shape":[4e0],"data_offsets":[0,4]'), b"1234"), NUMBERS),
    Bad("bool dim", pack({"a": entry(shape=[True], offsets=(0, 1))}, b"1"), NUMBERS),
    Bad("text dim", pack({"a": entry(shape=["4"])}, b"1234"), NUMBERS),
    Bad("negative dims", pack({"a": entry(shape=[-2, -2])}, b"1234"), NUMBERS),
    Bad("2^64 dim", pack({"a": entry(shape=[1 << 64, 0], offsets=(0, 0))}), NUMBERS),
    Bad("shape a number", pack({"a": entry(shape=4)}, b"1234"), NUMBERS),
    Bad("shape an object", pack({"a": entry(shape={"4": 4})}, b"1234"), NUMBERS),
    # Dtypes
    Bad("unknown dtype", pack({"a": entry("F128")}, b"1234"), "tensor 'a' has the unknown dtype 'F128'"),
    Bad("dtype in small letters", pack({"a": entry("u8")}, b"1234"), "tensor 'a' has the unknown dtype 'u8'"),
    Bad("dtype a number", pack({"a": entry(8)}, b"1234"), "tensor 'a' has the unknown dtype 8"),
    Bad("dtype a list", pack({"a": entry(["U8"])}, b"1234"), "tensor 'a' has the unknown dtype ['U8']"),
    # The entries
    Bad("no dtype", pack({"a": {"shape": [4], "data_offsets": [0, 4]}}, b"1234"), FIELDS),
    Bad("no shape", pack({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, b"1234"), FIELDS),
    Bad("no offsets", pack({"a": {"dtype": "U8", "shape": [4]}}, b"1234"), FIELDS),
    Bad("entry a list", pack({"a": ["U8", [3], [0, 4]]}, b"1234"), FIELDS),
    Bad("entry null", pack({"a": None}), FIELDS),
    # Names given twice: JSON readers keep the last, the format forbids them
    Bad(
        "tensor twice, same span",
        pack(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}'
        )
        + b"1",
        "its header is not valid JSON: 'a' is given twice",
        stricter=True,
    ),
    Bad(
        "tensor twice, other span",
        pack(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}'
        )
        + b"12",
        "its header is not valid JSON: 'a' is given twice",
    ),
    Bad(
        "tensor twice, once escaped",
        pack(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\\u0061":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}'
        )
        + b"12",
        "its header is not valid JSON: 'a' is given twice",
    ),
    Bad(
        "tensor twice, beside a colon",
        pack(
            b'{"__metadata__":{"a:":":"},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}'
        )
        + b"12",
        "its header is not valid JSON: 'a' is given twice",
    ),
    Bad(
        "field twice",
        pack(text('"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]'), b"1"),
        "its header is not valid JSON: 'dtype' is given twice",
    ),
    Bad(
        "metadata key twice",
        pack(b'{"__metadata__":{"format":"pt","format":"np"}}'),
        "its header is not valid JSON: 'format' is given twice",
        stricter=True,
    ),
    Bad(
        "metadata twice",
        pack(b'{"__metadata__":{},"__metadata__":{}}'),
        "its header is not valid JSON: '__metadata__' is given twice",
    ),
    # Metadata
    Bad("metadata with a number", pack({"__metadata__": {"n": 1}}), "`__metadata__` must map text to text"),
    Bad("metadata with null", pack({"__metadata__": {"n": None}}), "`__metadata__` must map text to text"),
    Bad("nested metadata", pack({"__metadata__": {"n": {}}}), "`__metadata__` must map text to text"),
    Bad("metadata a list", pack({"__metadata__": []}), "`__metadata__` must map text to text"),
    Bad("metadata text", pack({"__metadata__": "pt"}), "`__metadata__` must map text to text"),
    # The JSON
    Bad("a list", pack([]), "its header is not a JSON object"),
    Bad("a full list", pack([{"a": entry()}]), "its header is not a JSON object"),
    Bad("null", pack(None), "its header is not a JSON object"),
    Bad("no JSON", pack(b"\x80\x04}."), "its header is not valid JSON: 'utf-8' codec"),
    Bad("padded with NUL", pack(b"{}\0\0"), "its header is not valid JSON: Extra data"),
    Bad("byte order mark", pack(b"\xef\xbb\xbf{}"), "its header is not valid JSON: Unexpected UTF-8 BOM"),
    Bad("UTF-16", pack("{}".encode("utf-16-le")), "its header is not valid JSON: "),
    Bad("no UTF-8", pack(b'{"\xff":{}}'), "its header is not valid JSON: 'utf-8' codec can't decode byte 0xff"),
    Bad("CESU-8 surrogate", pack(b'{"\xed\xa0\x80":{}}'), "its header is not valid JSON: 'utf-8' codec"),
    Bad("control character", pack(b'{"a\x01":{}}'), "its header is not valid JSON: Invalid control character"),
    Bad("trailing comma", pack(b'{"__metadata__":{},}'), "its header is not valid JSON: "),
    Bad("cut off", pack(b'{"a":'), "its header is not valid JSON: "),
    Bad(
        "NaN", pack(text('"dtype":"U8","shape":[NaN],"data_offsets":[0,1]'), b"1"), "its header is not valid JSON: NaN"
    ),
    Bad("Infinity", pack(b'{"a":Infinity}'), "its header is not valid JSON: Infinity is no JSON number"),
    Bad("-Infinity", pack(b'{"a":-Infinity}'), "its header is not valid JSON: -Infinity is no JSON number"),
    Bad("5000 digits", pack(b'{"a":' + b"9" * 5000 + b"}"), "its header is not valid JSON: Exceeds the limit"),
    Bad("4000 digits", pack(text(f'"dtype":"U8","shape":[{"9" * 4000}],"data_offsets":[0,1]'), b"1"), NUMBERS),
    Bad("1e999", pack(text('"dtype":"U8","shape":[1e999],"data_offsets":[0,1]'), b"1"), NUMBERS),
    Bad("100,000 lists", pack(b'{"a":' + b"[" * 100_000), "its header is nested too deeply"),
    Bad("100,000 objects", pack(b'{"a":' * 100_000), "its header is nested too deeply"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_refuses_what_breaks_the_format(bad: Bad) -> None:
    with pytest.raises(SourceError) as caught:
        read(bad.data)
    assert str(caught.value).startswith(DAMAGED + bad.message)
    assert caught.value.path == PATH
    if bad.stricter:
        judge(bad.data)
    else:
        with pytest.raises(safetensors.SafetensorError):
            judge(bad.data)


def test_refuses_a_header_over_the_cap_before_reading_it() -> None:
    length = MAX_HEADER_BYTES + 1
    with pytest.raises(SourceError, match=f"{DAMAGED}a header of {length} bytes; at most {MAX_HEADER_BYTES} are read"):
        header_length(length.to_bytes(8, "little"), path=PATH, file_size=1 << 40)
    assert header_length((length - 1).to_bytes(8, "little"), path=PATH, file_size=1 << 40) == MAX_HEADER_BYTES


@pytest.mark.parametrize(
    "header",
    [
        b"{}",
        b'  \n\t{"__metadata__":null}  ',
        b'{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1],"note":"of another writer"}}',
        b'{"a":{"dtype":"F32","shape":[1152921504606846976,0],"data_offsets":[0,0]}}',
    ],
)
def test_accepts_what_the_library_accepts(header: bytes) -> None:
    data = pack(header, b"1" if b"[0,1]" in header else b"")
    assert set(read(data)[0]) == {name for name, _ in judge(data)}


ENTRIES = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    st.tuples(st.sampled_from(["U8", "BF16", "F4", "I64"]), st.lists(st.integers(0, 9), max_size=3)),
    min_size=1,
    max_size=5,
)


@given(ENTRIES, st.data())
@settings(max_examples=400)
def test_headers_as_they_are_usually_written_are_read_as_json(
    entries: Mapping[str, tuple[str, Sequence[int]]], data: st.DataObject
) -> None:
    """The library's own headers and ours, and the same with bytes changed, left out, doubled or added."""
    at, tensors = 0, []
    for name, (dtype, shape) in entries.items():
        nbytes = prod(shape) * DTYPE_BITS[dtype] // 8
        tensors.append((name, dtype, tuple(shape), nbytes))
        at += nbytes
    written = build_header(tensors)[8:]
    assert headers._as_written(written) is not None or any(json.dumps(name) != f'"{name}"' for name in entries)
    start = data.draw(st.integers(0, len(written)))
    end = data.draw(st.integers(start, min(start + 9, len(written))))
    other = data.draw(st.sampled_from([b"", b"0", b"1", b",", b'"', b" ", b"}", b"\\", b".0", written[start:end] * 2]))
    for text in (written, written[:start] + other + written[end:]):
        fast = headers._as_written(text)
        if fast is not None:
            metadata, found = headers._as_json(text)
            read_fast = [(name, dtype, tuple(json.loads(f"[{shape}]")), *at) for name, dtype, shape, *at in fast[1]]
            assert (fast[0], read_fast) == (metadata, [*found])


@pytest.mark.parametrize("name", ["", "../../x", "/etc/passwd", "a\0b", "a b", "é▁", "\u202e", "x" * 10_000])
def test_a_name_is_only_a_name(name: str) -> None:
    data = pack({name: entry()}, b"1234")
    tensors, _ = read(data)
    assert tensors == {name: TensorInfo(name, "U8", (4,), PATH, len(data) - 4, 4)}
    assert [found for found, _ in judge(data)] == [name]


def test_a_damaged_name_is_escaped_and_cut_short() -> None:
    with pytest.raises(SourceError) as caught:
        read(pack({"\x1b[2J\n" + "x" * 100_000: entry("U9")}, b"1234"))
    message = str(caught.value)
    assert message.startswith(DAMAGED + r"tensor '\x1b[2J\nxxx") and message.endswith("xxx...") and len(message) < 1100


def test_order_and_places_are_those_of_the_data() -> None:
    data = pack({"b": entry(offsets=(2, 6)), "z": entry(shape=[0, 7], offsets=(2, 2)), "a": entry("F16", [1], (0, 2))})
    tensors, metadata = read(data + b"123456")
    assert [(t.name, t.start - len(data), t.nbytes) for t in tensors.values()] == [
        ("a", 0, 2),
        ("z", 2, 0),
        ("b", 2, 4),
    ]
    assert metadata is None


# Hostile headers under the cap. CPU time, with a wide margin for a loaded machine; without the checks they test,
# the second would take hours.
BOMBS: Mapping[str, Callable[[], bytes]] = {
    "300,001 tensors": lambda: pack(
        b"{" + b",".join(b'"%d":{"dtype":"U8","shape":[],"data_offsets":[0,0]}' % i for i in range(300_001)) + b"}"
    ),
    "a million dimensions": lambda: pack(
        text(f'"dtype":"U8","shape":[{"9223372036854775807," * 1_000_000}1],"data_offsets":[0,0]')
    ),
    "a name as long as the header": lambda: pack({"x" * (8 << 20): None}),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_hostile_header_takes_seconds_at_most(bomb: str) -> None:
    data = BOMBS[bomb]()
    assert len(data) < MAX_HEADER_BYTES
    before = time.process_time()
    with pytest.raises(SourceError) as caught:
        read(data)
    assert time.process_time() - before < 15
    assert len(str(caught.value)) < 2000


# Against the library, both ways

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
SHAPES = st.lists(st.integers(0, 5), max_size=4)
Drawn = tuple[str, list[int], bytes]


@st.composite
def stored(draw: Any) -> Drawn:
    """dtype, shape and random bytes of one tensor."""
    dtype, shape = draw(st.sampled_from(sorted(DTYPES))), draw(SHAPES)
    size = prod(shape) * DTYPE_BITS[dtype] // 8
    data = draw(st.binary(min_size=size, max_size=size))
    return dtype, shape, bytes(byte & 1 for byte in data) if dtype == "BOOL" else data


def view(data: bytes, tensors: Mapping[str, TensorInfo]) -> dict[str, Drawn]:
    return {t.name: (t.dtype, list(t.shape), data[t.start : t.start + t.nbytes]) for t in tensors.values()}


# safetensors 0.8.0 writes a header that it does not read back where the metadata is an empty dict.
METADATA = st.none() | st.dictionaries(NAMES, st.text(max_size=5), min_size=1)


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(NAMES, stored(), max_size=6), METADATA)
def test_reads_what_the_library_writes(
    tmp_path_factory: pytest.TempPathFactory, drawn: dict[str, Drawn], metadata: dict[str, str] | None
) -> None:
    tensors = {
        name: torch.tensor(list(data), dtype=torch.uint8).view(DTYPES[dtype]).reshape(shape)
        for name, (dtype, shape, data) in drawn.items()
    }
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    path.write_bytes(save(tensors, metadata))
    data = path.read_bytes()
    ours, our_metadata = read(data)
    assert view(data, ours) == file_tensors(path) == drawn
    assert our_metadata == metadata


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(NAMES, stored(), max_size=6))
def test_the_library_reads_what_is_written_here(
    tmp_path_factory: pytest.TempPathFactory, drawn: dict[str, Drawn]
) -> None:
    header = build_header((name, dtype, tuple(shape), len(data)) for name, (dtype, shape, data) in drawn.items())
    path = tmp_path_factory.getbasetemp() / "built.safetensors"
    path.write_bytes(header + b"".join(data for _, _, data in drawn.values()))
    assert file_tensors(path) == drawn
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert len(header) % 4096 == 0, "the data section starts on a page"
    parsed, _ = read(path.read_bytes())
    assert list(parsed) == list(drawn) or any(not t.nbytes for t in parsed.values()), "in the order that was asked"


def test_golden_bytes() -> None:
    header = build_header([("w", "BF16", (2, 3), 12), ("é", "U8", (), 1)])
    expected = (
        b'{"__metadata__":{"format":"pt"},"w":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
        b'"\xc3\xa9":{"dtype":"U8","shape":[],"data_offsets":[12,13]}}'
    )
    assert header == (4088).to_bytes(8, "little") + expected.ljust(4088)


# Files


def short_pread(limit: int) -> Callable[[int, int, int], bytes]:
    real = os.pread
    return lambda fd, length, offset: real(fd, min(length, limit), offset)


def test_pread_all_goes_on_after_short_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    fd = os.open(path, os.O_RDONLY)
    monkeypatch.setattr(os, "pread", short_pread(7))  # Linux gives 2 GiB at most
    try:
        assert pread_all(fd, 50, 10) == bytes(range(10, 60))
        assert pread_all(fd, 50, 90) == bytes(range(90, 100))
        assert pread_all(fd, 50, 100) == pread_all(fd, 0, 0) == b""
    finally:
        os.close(fd)
    assert read_regular(path) == bytes(range(100))


def special_files(folder: Path) -> Sequence[tuple[Path, str]]:
    os.mkfifo(folder / "fifo")
    (folder / "device").symlink_to("/dev/zero")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "dangling").symlink_to(folder / "nothing")
    return [
        (folder / "fifo", "not a regular file"),
        (folder / "device", "not a regular file"),
        (folder / "folder", "not a regular file"),
        (folder / "loop", "cannot open it: Too many levels of symbolic links"),
        (folder / "dangling", "cannot open it: No such file or directory"),
        (folder / "missing", "cannot open it: No such file or directory"),
    ]


@pytest.mark.parametrize("function", [open_regular, read_regular])
def test_only_regular_files_are_opened(tmp_path: Path, function: Callable[[Path], object]) -> None:
    before = set(Path("/proc/self/fd").iterdir())
    for path, message in special_files(tmp_path):
        with at_most(30), pytest.raises(SourceError) as caught:
            function(path)
        assert str(caught.value) == f"{path}: {message}"
    assert set(Path("/proc/self/fd").iterdir()) == before
