"""Writes many names as few patterns, and sorts names as people do."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

from .pattern import MAX_ALTERNATIVES

__all__ = ["compress", "natural_key"]


_T = TypeVar("_T")
_NUMBER = re.compile(r"(\d{1,15})")  # int() refuses digits without end
_MAX_FOLDED_NUMBERS = 8
_RANGED = re.compile(r"0|[1-9][0-9]{0,5}")
_WORD = re.compile(r"\w+")


def natural_key(name: str) -> str:
    """Sort key that puts ``layers.2`` before ``layers.10``: numbers go by their length, then by their digits."""
    return ".".join(map(_word_key, name.split(".")))


@lru_cache(maxsize=4096)
def _word_key(word: str) -> str:
    parts = _NUMBER.split(word)
    parts[1::2] = map(_number_key, parts[1::2])
    return "".join(parts)


def _number_key(number: str) -> str:
    digits = number.lstrip("0") or "0"
    # The length as one character, below all that names are made of; leading zeros make 07 differ from 7.
    return chr(min(len(digits), 31)) + digits + "\x00" * (len(number) - len(digits))


def compress(names: Iterable[str]) -> list[str]:
    """Returns patterns that together match exactly ``names``.

    Merges last words, then numbers from the last to the first, so that 4,512 names become
    ``model.layers.{0..93}.mlp.experts.{0..15}.{down_proj,gate_proj,up_proj}``.
    """
    words: dict[str, list[str]] = defaultdict(list)
    for name in {*names}:
        head, dot, word = name.rpartition(".")
        words[head + dot].append(word)
    by_width: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    for head, last_words in words.items():
        before = _NUMBER.split(head)
        by_width[len(before)].update((*before, word) for word in _braces(last_words))
    patterns: list[str] = []
    for width, rows in by_width.items():
        # Columns: text, number, text, ..., text, last word.
        for column in range(width - 2, 0, -2)[:_MAX_FOLDED_NUMBERS]:
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
    """``values`` as brace expressions, or unchanged where braces cannot express them."""
    if len(values) == 1:
        return list(values)
    # '007' and '7' are different names: only numbers without leading zeros that RANGE can read become ranges.
    if all(map(_RANGED.fullmatch, values)):
        numbers = sorted(map(int, values))
        return ["{" + ",".join(_spans(some)) + "}" for some in _chunks(numbers)]
    if all(map(_WORD.fullmatch, values)):
        return ["{" + ",".join(some) + "}" for some in _chunks(sorted(values))]
    return list(values)


def _chunks(values: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """Cuts ``values`` into pieces that fit into one pattern."""
    return (values[at : at + MAX_ALTERNATIVES] for at in range(0, len(values), MAX_ALTERNATIVES))


def _spans(numbers: Sequence[int]) -> list[str]:
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return [str(a) if a == b else f"{a}..{b}" for a, b in spans]
