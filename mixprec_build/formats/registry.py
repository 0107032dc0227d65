"""The list of supported formats, and tables made from it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from . import unread
from .awq import Awq
from .base import Format, FormatError, Kind
from .dense import Dense
from .fp8 import Fp8
from .gptq import Gptq
from .int8 import Int8
from .keys import check_keys
from .mxfp4 import Mxfp4
from .nvfp4 import Nvfp4
from .packed import Packed
from .quantization import Quantization
from .w4afp8 import W4afp8

if TYPE_CHECKING:
    from ..storage.module import StoredModule

__all__ = [
    "FORMATS",
    "bits_of",
    "format_from_json",
    "kind_named",
    "kinds",
    "kinds_of_word",
    "leaves",
    "recognise",
    "settings_by_name",
    "with_format",
]


FORMATS: tuple[type[Format], ...] = (Dense, Fp8, W4afp8, Int8, Gptq, Awq, Packed, Nvfp4, Mxfp4)
"""In the order in which they are tried on a module."""


@contextmanager
def with_format(fmt: type[Format]) -> Iterator[None]:
    """Supports a format from outside this package in its body, where it is tried before the others."""
    global FORMATS
    before = FORMATS
    FORMATS = (fmt, *before)
    try:
        yield
    finally:
        FORMATS = before


@dataclass(frozen=True, slots=True)
class _Table:
    """Tables made from a list of formats."""

    formats: Mapping[str, type[Format]]
    """Kind -> its format."""
    words: Mapping[str, frozenset[str]]
    """A word for a format in a recipe -> the kinds that it may stand for."""
    leaves: frozenset[str]
    name_keys: tuple[Callable[[str, Quantization], Hashable], ...]
    keys: Mapping[str, frozenset[str]]
    """``quant_method`` -> the keys of its configuration that are understood."""
    keys_of_any: frozenset[str]


@lru_cache(maxsize=8)
def _table(formats: tuple[type[Format], ...]) -> _Table:
    words: dict[str, set[str]] = {}
    for fmt in formats:
        for name, kind in fmt.kinds.items():
            for word in () if kind.words is None else (name, *kind.words):
                words.setdefault(word, set()).add(name)
    keys: dict[str, set[str]] = {}
    for fmt in formats:
        for method, understood in fmt.methods.items():
            keys.setdefault(method, set()).update(understood or ())
    of_any = frozenset().union(*keys.values())
    return _Table(
        {name: fmt for fmt in formats for name in fmt.kinds},
        {word: frozenset(names) for word, names in words.items()},
        frozenset(unread.LEAVES.union(*(fmt.leaves for fmt in formats)) - {""}),
        tuple(dict.fromkeys(key for fmt in formats for key in fmt.name_keys)),
        {method: frozenset(understood or of_any) for method, understood in keys.items()},
        of_any,
    )


def recognise(module: StoredModule, quantization: Mapping[str, object]) -> Format:
    """The format that a source stores a module in.

    ``quantization`` is its ``quantization_config``; one :class:`Quantization` for all modules saves time.

    Raises:
        FormatError: it is not supported, or contradicts itself.
    """
    declared = Quantization.of(quantization)
    table = _table(FORMATS)
    unread.refuse_first(module, declared, table.keys.keys())
    try:
        return _recognised(module, declared, table)
    except FormatError as error:
        raise unread.by_its_name(error, module, declared, table.keys.keys()) from error


def _recognised(module: StoredModule, declared: Quantization, table: _Table) -> Format:
    for candidate in FORMATS:
        found = candidate.recognise(module, declared)
        if found is not None:
            if found.quantized:
                method = declared.get("quant_method")
                known = table.keys.get(method) if isinstance(method, str) else None
                check_keys(declared, table.keys_of_any if known is None else known)
            return found
    unread.refuse_unknown(module)


def settings_by_name(name: str, quantization: Quantization) -> Hashable:
    """A configuration's settings of a module by its name: modules stored alike with equal ones are in one format."""
    return tuple([key(name, quantization) for key in _table(FORMATS).name_keys])


def format_from_json(data: Mapping[str, Any]) -> Format:
    """Inverse of ``Format.to_json``. Raises ``KeyError``, ``TypeError`` or ``ValueError`` if ``data`` is malformed."""
    return _table(FORMATS).formats[data["kind"]].from_json(data)


def kinds() -> Iterator[tuple[str, Kind]]:
    """Yields every kind of every format by name, in their order."""
    for fmt in FORMATS:
        yield from fmt.kinds.items()


def kind_named(name: str) -> Kind:
    """The properties of a kind such as ``fp8_block``."""
    return _table(FORMATS).formats[name].kinds[name]


def bits_of(kind: str) -> int:
    """Bits of a weight: 8 for ``fp8_block``."""
    return kind_named(kind).bits


def kinds_of_word(word: str) -> frozenset[str]:
    """The kinds that a word of a recipe may mean, as ``int4`` means ``gptq_int4`` and others; empty for other words."""
    return _table(FORMATS).words.get(word, frozenset())


def leaves() -> frozenset[str]:
    """The last words of names of tensors that belong to modules; tensors of other names are bare parameters."""
    return _table(FORMATS).leaves
