"""Names with wildcards, as recipes and ``quantization_config`` write them.

A pattern is a module name in which

- ``*`` stands for any run of characters, dots included (as in :mod:`fnmatch`),
- ``?`` stands for one character,
- ``{0..15}``, ``{3,7,64}`` and ``{0..3,8}`` stand for any of these numbers or words.

A pattern without any of them is an *exact* name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

__all__ = ["Pattern", "PatternError", "compress", "natural_key"]

_T = TypeVar("_T")
_SPECIAL = re.compile(r"[*?{}\[\]]")
_RANGE = re.compile(r"(\d{1,6})\.\.(\d{1,6})")
_NUMBER = re.compile(r"(\d{1,15})")  # int() refuses digits without end

# Bounds for patterns that come from strangers: a `.*` each, tried against every module name. The time that a
# hostile pair of them takes grows with the name's length to the power of the stars.
_MAX_STARS = 4
_MAX_ALTERNATIVES = 10_000


class PatternError(ValueError):
    """A pattern that does not parse; the message says where it goes wrong."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """One parsed pattern. Raises :class:`PatternError` when ``text`` is malformed.

    >>> Pattern("model.layers.{0..3}.mlp.*").matches("model.layers.2.mlp.up_proj")
    True
    """

    text: str
    exact: bool = field(init=False)
    _match: Callable[[str], object] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "exact", _SPECIAL.search(self.text) is None)
        regex = re.compile(_to_regex(self.text), re.DOTALL)
        object.__setattr__(self, "_match", regex.fullmatch)

    def matches(self, name: str) -> bool:
        return name == self.text if self.exact else self._match(name) is not None


def _to_regex(text: str) -> str:
    if not text:
        raise PatternError("an empty name matches nothing")
    out, at = [], 0
    stars = len(re.findall(r"\*+", text))
    if stars > _MAX_STARS:
        raise PatternError(f"{text!r} has {stars} wildcards '*'; at most {_MAX_STARS} are allowed")
    while at < len(text):
        char = text[at]
        if char == "*":
            while text[at + 1 : at + 2] == "*":
                at += 1
            out.append(".*")
        elif char == "?":
            out.append(".")
        elif char == "{":
            end = text.find("}", at)
            if end < 0:
                raise PatternError(f"{text!r}: '{{' without a closing '}}'")
            words = _alternatives(text[at + 1 : end], text)
            out.append("(?:" + "|".join(map(re.escape, words)) + ")")
            at = end
        elif char in "}[]":
            hint = "write ranges as {0..15}" if char != "}" else "'}' without an opening '{'"
            raise PatternError(f"{text!r}: unexpected {char!r}; {hint}")
        else:
            out.append(re.escape(char))
        at += 1
    return "".join(out)


def _alternatives(body: str, text: str) -> list[str]:
    words: dict[str, None] = {}
    for item in (part.strip() for part in body.split(",")):
        span = _RANGE.fullmatch(item)
        if span:
            low, high = int(span[1]), int(span[2])
            if low > high:
                raise PatternError(f"{text!r}: the range {item} is empty; write {{{high}..{low}}}")
            if high - low >= _MAX_ALTERNATIVES:
                raise PatternError(f"{text!r}: the range {item} is longer than {_MAX_ALTERNATIVES}")
            words.update(dict.fromkeys(map(str, range(low, high + 1))))
        elif not item or ".." in item or _SPECIAL.search(item):
            raise PatternError(f"{text!r}: {item!r} is no number, word or range like 0..15")
        else:
            words[item] = None
    if len(words) > _MAX_ALTERNATIVES:
        raise PatternError(f"{text!r}: more than {_MAX_ALTERNATIVES} alternatives")
    return list(words)


def natural_key(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key that puts ``layers.2`` before ``layers.10``."""
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in _NUMBER.split(name) if part)


def compress(names: Iterable[str]) -> list[str]:
    """Patterns that together match exactly ``names``: last words, then numbers innermost first, are folded.

    So 4,512 names become ``model.layers.{0..93}.mlp.experts.{0..15}.{down_proj,gate_proj,up_proj}``.
    """
    by_width: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    for name in names:
        head, dot, word = name.rpartition(".")
        row = (*_NUMBER.split(head + dot), word)
        by_width[len(row)].add(row)
    patterns: list[str] = []
    for width, rows in by_width.items():
        # Columns: text, number, text, ..., text, last word.
        for column in [width - 1, *range(width - 3, 0, -2)]:
            rows = _fold(rows, column)
        patterns += ["".join(row) for row in rows]
    return sorted(patterns, key=natural_key)


def _fold(rows: set[tuple[str, ...]], column: int) -> set[tuple[str, ...]]:
    """Merges rows that differ in ``column`` alone."""
    merged: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for row in rows:
        merged[(*row[:column], *row[column + 1 :])].append(row[column])
    return {(*rest[:column], text, *rest[column:]) for rest, values in merged.items() for text in _braces(values)}


def _braces(values: Sequence[str]) -> list[str]:
    """``values`` as one brace expression, or unchanged where braces cannot say them."""
    if len(values) == 1:
        return list(values)
    # '007' and '7' are different names: only plain numbers, as long as _RANGE reads them, become ranges.
    if all(re.fullmatch(r"0|[1-9][0-9]{0,5}", v) for v in values):
        numbers = sorted(map(int, values))
        return ["{" + ",".join(_spans(some)) + "}" for some in _chunks(numbers)]
    if all(re.fullmatch(r"\w+", v) for v in values):
        return ["{" + ",".join(some) + "}" for some in _chunks(sorted(values))]
    return list(values)


def _chunks(values: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """As many at a time as one pattern may hold."""
    return (values[at : at + _MAX_ALTERNATIVES] for at in range(0, len(values), _MAX_ALTERNATIVES))


def _spans(numbers: Sequence[int]) -> list[str]:
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return [str(a) if a == b else f"{a}..{b}" for a, b in spans]
