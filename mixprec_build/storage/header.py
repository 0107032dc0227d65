"""The safetensors header: read with every rule of the format checked, and written page-aligned.

A file is ``N`` (8 bytes, little-endian), ``N`` bytes of JSON, and the data section. The JSON maps each tensor
to ``dtype``, ``shape`` and ``data_offsets`` relative to the data section, which they must cover without
holes or overlaps. See https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from itertools import starmap
from operator import itemgetter
from pathlib import Path
from sys import intern
from typing import Any, NamedTuple, NoReturn

from ..errors import SourceError
from .disk import opened, pread_all
from .dtypes import DTYPE_BITS
from .limits import load_json

__all__ = [
    "MAX_HEADER_BYTES",
    "MOST_TENSORS",
    "TensorInfo",
    "build_header",
    "header_length",
    "json_text",
    "parse_header",
    "read_header",
]


# The library's own cap is 100 MB; a million one-byte tensors fit in 69 MB and cost it seconds and a GiB.
MAX_HEADER_BYTES = 32 << 20
_MAX_TENSORS = 300_000
_MAX_METADATA = 100_000
MOST_TENSORS = 150_000
"""Most tensors that are written to one file, whose header then has some 26 MB."""
_MAX_JSON_VALUES = 4_000_000  # a tensor takes 13
_PAGE = 4096
_NOT_WHOLE = "`shape` and `data_offsets` must be whole numbers, zero or more"
_NUMBER = "(?:0|[1-9][0-9]{0,17})"
# As the library writes them, without spaces and escapes; all other headers are read as JSON.
_HEAD = re.compile(r'\{(?:"__metadata__":\{"format":"pt"\},)?')
_ENTRY = re.compile(
    r'"([^"\\\x00-\x1f]*)":\{"dtype":"([A-Z0-9_]+)","shape":\[((?:N(?:,N)*)?)\],"data_offsets":\[(N),(N)\]\}'.replace(
        "N", _NUMBER
    )
)
_by_place = itemgetter(4, 5)  # `start` and `nbytes`; attrgetter takes twice as long
json_text = json.JSONEncoder(ensure_ascii=False).encode


class TensorInfo(NamedTuple):
    """One tensor of a safetensors file. ``start`` and ``nbytes`` are bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    nbytes: int
    columns: tuple[int, int] | None = None
    """Of a tensor ``[N, K]`` that is columns of a matrix ``[K, width]``, whose first byte is ``start``: the first of
    these columns, and ``width``."""
    step: int = 1
    """Of a tensor that is every ``step``-th row of a larger one with rows of the same size, from ``start`` on; or, of
    the matrix of ``columns``, every ``step``-th column."""

    @property
    def contiguous(self) -> bool:
        """Whether its bytes lie in the file one after the other, in its own order."""
        return self.columns is None and self.step == 1

    @property
    def span(self) -> int:
        """Bytes of the file, from ``start`` on, that have all of it."""
        if self.columns is not None:
            return self.shape[1] * self.columns[1] * (DTYPE_BITS[self.dtype] // 8)
        return self.nbytes if self.step == 1 else (self.nbytes // self.shape[0]) * ((self.shape[0] - 1) * self.step + 1)


def read_header(path: Path) -> tuple[bytes, int]:
    """Reads what :func:`parse_header` needs: the first ``8 + N`` bytes of a file, and its size in bytes.

    Raises:
        SourceError: it is not a regular file, or not a safetensors file.
    """
    with opened(path) as fd:
        size = os.fstat(fd).st_size
        return pread_all(fd, 8 + header_length(pread_all(fd, 8, 0), path=path, file_size=size), 0), size


def parse_header(data: bytes, *, path: Path | str, file: str, file_size: int) -> tuple[dict[str, TensorInfo], object]:
    """Parses the first ``8 + N`` bytes of a file. Returns tensors in the order of their data, and ``__metadata__``.

    Raises:
        SourceError: naming ``path`` and, where one is at fault, the tensor.
    """

    def bad(message: str) -> NoReturn:
        # A name or shape may be as long as the header.
        short = message if len(message) <= 1000 else f"{message[:1000]}..."
        raise SourceError(f"damaged safetensors file: {short}", path=path)

    start, text, tensors = len(data), data[8:], []
    try:
        metadata, entries = _as_written(text) or _as_json(text)
        # One dtype, shape and size for all tensors that have the same ones, not for each of 100,000.
        known: dict[tuple[str, object], tuple[str, tuple[int, ...], int | None]] = {}
        for name, dtype, shape, begin, end in entries:
            layout = known.get((dtype, shape)) or known.setdefault((dtype, shape), _layout(name, dtype, shape))
            dtype, sizes, nbytes = layout
            if nbytes != end - begin:
                bad(f"tensor {name!r}: {dtype} {[*sizes]} does not take the {end - begin} bytes it is given")
            tensors.append(TensorInfo(name, dtype, sizes, file, start + begin, nbytes))
    except RecursionError:
        bad("its header is nested too deeply")
    except ValueError as error:
        bad(str(error))

    tensors.sort(key=_by_place)
    at = start
    for tensor in tensors:
        if tensor.start != at:
            bad(f"tensor {tensor.name!r} starts at {tensor.start - start} where {at - start} was due (hole or overlap)")
        at += tensor.nbytes
    if at != file_size:
        bad(f"{file_size} bytes long, but its tensors end at {at}; fetch the file again")
    return {tensor.name: tensor for tensor in tensors}, metadata


def _layout(name: str, dtype: str, shape: str | tuple[int, ...]) -> tuple[str, tuple[int, ...], int | None]:
    """A tensor's dtype, sizes, and bytes, which are None where they are not whole.

    Raises:
        ValueError: no file has such sizes.
    """
    sizes = tuple(map(int, filter(None, shape.split(",")))) if isinstance(shape, str) else shape
    bits = DTYPE_BITS[dtype]
    for n in sizes:
        if not 0 <= n < 1 << 63:
            raise ValueError(f"tensor {name!r}: {_NOT_WHOLE}")
        bits *= n
        if bits >= 1 << 67:  # checked here: the product of a million dimensions takes hours
            raise ValueError(f"tensor {name!r}: {dtype} {[*sizes]} overflows")
    return intern(dtype), sizes, None if bits % 8 else bits // 8


def header_length(first8: bytes, *, path: Path | str, file_size: int) -> int:
    """``N`` of a file from its first eight bytes. Raises :class:`SourceError` if it does not fit the file's size."""
    length = int.from_bytes(first8, "little")
    if first8 == b"version ":
        raise SourceError("a Git LFS pointer, not the file that it stands for; fetch it with `git lfs pull`", path=path)
    if len(first8) < 8 or length < 2 or 8 + length > file_size:
        raise SourceError("damaged safetensors file: too short for its header; fetch the file again", path=path)
    if length > MAX_HEADER_BYTES:
        raise SourceError(
            f"damaged safetensors file: a header of {length} bytes; at most {MAX_HEADER_BYTES} are read",
            path=path,
        )
    return length


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """The bytes before the data section for ``(name, dtype, shape, nbytes)`` in the order of their data.

    Padded with spaces so that the data section starts on a page boundary, as the format allows.
    """
    # Joined as text: a dictionary of all entries would take many times the memory.
    out = bytearray(8) + b'{"__metadata__":{"format":"pt"}'
    at = 0
    layouts: dict[tuple[str, tuple[int, ...]], str] = {}
    for name, dtype, shape, nbytes in tensors:
        if (layout := layouts.get((dtype, shape))) is None:
            sizes = ",".join(map(str, shape))
            layout = layouts[dtype, shape] = f'{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":'
        out += f",{json_text(name)}:{layout}[{at},{at + nbytes}]}}".encode()
        at += nbytes
    out += b"}"
    out += b" " * (-len(out) % _PAGE)
    out[:8] = (len(out) - 8).to_bytes(8, "little")
    return bytes(out)


Entry = tuple[str, str, str | tuple[int, ...], int, int]
"""Name, dtype, shape (its sizes, or their text), and offsets of a tensor."""


def _as_written(text: bytes) -> tuple[object, Iterable[Entry]] | None:
    """``__metadata__`` and entries of a header as safetensors and :func:`build_header` write it, in half the time that
    JSON takes; None for one that is written in another way, or has a mistake."""
    if text.count(b'"dtype":') > _MAX_TENSORS:
        return None
    try:
        parts = _ENTRY.split(text.decode())
    except UnicodeDecodeError:
        return None
    head, names, dtypes = _HEAD.fullmatch(parts[0]), parts[1::6], parts[2::6]
    written = head is not None and {*parts[6:-1:6]} <= {","} and parts[-1].rstrip() == "}"
    if not written or len({*names, "__metadata__"}) <= len(names) or not DTYPE_BITS.keys() >= {*dtypes}:
        return None
    metadata = {"format": "pt"} if parts[0] != "{" else None
    return metadata, zip(names, dtypes, parts[3::6], map(int, parts[4::6]), map(int, parts[5::6]), strict=True)


def _as_json(text: bytes) -> tuple[object, Iterable[Entry]]:
    """``__metadata__`` and entries of any header; the latter are checked as they are taken.

    Raises:
        ValueError: naming the tensor that is at fault, if it is one.
    """
    try:
        header = _load_header(text)
    except ValueError as error:
        raise ValueError(f"its header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise ValueError("`__metadata__` must map text to text")
    if metadata is not None and len(metadata) > _MAX_METADATA:
        raise ValueError(f"`__metadata__` has {len(metadata)} entries; at most {_MAX_METADATA} are read")
    if len(header) > _MAX_TENSORS:
        raise ValueError(f"it declares {len(header)} tensors; at most {_MAX_TENSORS} are read")
    return metadata, starmap(_entry, header.items())


def _entry(name: str, entry: Any) -> Entry:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"tensor {name!r} needs `dtype`, `shape` and two `data_offsets`") from None
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
    # By type: 1, 1.0 and true are the same key of a dictionary.
    if not isinstance(shape, list) or {*map(type, shape), type(begin), type(end)} != {int}:
        raise ValueError(f"tensor {name!r}: {_NOT_WHOLE}")
    if not (0 <= begin < 1 << 63 and 0 <= end < 1 << 63):
        raise ValueError(f"tensor {name!r}: {_NOT_WHOLE}")
    return name, dtype, tuple(shape), begin, end


def _load_header(data: bytes) -> object:
    """Parses the JSON of a header. Raises as :func:`load_json`, also where a key is given twice."""
    header = load_json(data, _MAX_JSON_VALUES, parse_constant=_no_constants)
    if not isinstance(header, dict):
        return header
    # A colon follows each key: as many keys as colons means that none was given twice. Looking at each object as it is
    # parsed takes twice as long, and is left for text with a colon in it.
    keys = len(header) + sum([len(entry) for entry in header.values() if isinstance(entry, dict)])
    if keys == data.count(b":"):
        return header
    del header
    return load_json(data, _MAX_JSON_VALUES, object_pairs_hook=_no_duplicates, parse_constant=_no_constants)


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r} is given twice")
    return out


def _no_constants(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")
