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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import pairwise
from time import thread_time
from typing import TypeVar

__all__ = ["MAX_NAME", "Patience", "Pattern", "PatternError", "PatternReader", "compress", "natural_key"]

_T = TypeVar("_T")
_SPECIAL = re.compile(r"[*?{}\[\]]")
_TOKEN = re.compile(r"\*+|\?|\{[^}]*\}|[^*?{}\[\]]+|.")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_RANGE = re.compile(r"(\d{1,6})\.\.(\d{1,6})")
_NUMBER = re.compile(r"(\d{1,15})")  # int() refuses digits without end

MAX_NAME = 256
"""Longer names are refused where they are read: none is ever matched."""

# Bounds for patterns that come from strangers; sizes are in characters, braces written out.
_MAX_STARS = 4
_MAX_ALTERNATIVES = 10_000
_MAX_SIZE = 200_000
_MAX_FILE_GLOBS = 2_000
_MAX_FILE_SIZE = 1_000_000
_MAX_FOLDED_NUMBERS = 8

_Words = tuple[str, ...]
"""A part of a pattern: the words of a pair of braces, a text as the only word, none for ``?``."""


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
    size: int = field(init=False, repr=False, compare=False)
    """In characters, with its braces written out."""
    _match: Callable[[str], object] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        segments = _parse(self.text)
        match: Callable[[str], object]
        exact = _SPECIAL.search(self.text) is None
        if exact:
            match = self.text.__eq__
        elif _needs_no_search(segments):
            match = re.compile(_to_regex(segments), re.DOTALL).fullmatch
        else:
            match = partial(_walk, [[_by_length(words) for words in segment] for segment in segments])
        object.__setattr__(self, "exact", exact)
        object.__setattr__(self, "size", _size(segments))
        object.__setattr__(self, "_match", match)

    def matches(self, name: str) -> bool:
        return name == self.text if self.exact else self._match(name) is not None

    def greatest(self) -> Iterator[tuple[str, Pattern]]:
        """The greatest number of each range or list of numbers, and the pattern for that one alone."""
        tokens = _TOKEN.findall(self.text)
        for i, token in enumerate(tokens):
            words = _alternatives(token[1:-1], self.text) if token[0] == "{" else ()
            if len(words) > 1 and all(map(str.isdecimal, words)):
                number = max(words, key=int)
                yield number, Pattern("".join([*tokens[:i], number, *tokens[i + 1 :]]))


class PatternReader:
    """Parses the patterns of one file, a stranger's perhaps, and bounds what they are together."""

    def __init__(self) -> None:
        self._globs = self._size = 0

    def read(self, text: str) -> Pattern:
        """Raises :class:`PatternError` for a malformed pattern, and for one too many."""
        pattern = Pattern(text)
        if not pattern.exact:
            self._globs += 1
            self._size += pattern.size
        if self._globs > _MAX_FILE_GLOBS:
            raise PatternError(f"more than {_MAX_FILE_GLOBS} patterns in one file")
        if self._size > _MAX_FILE_SIZE:
            raise PatternError(f"the patterns of one file, written out, have more than {_MAX_FILE_SIZE} characters")
        return pattern


class Patience:
    """The time that matching may take in all, where patterns and names are a stranger's: ``with patience: ...``.

    Many thousands of names against a few patterns take a tenth of a second.
    """

    SECONDS = 20.0

    def __init__(self) -> None:
        self._spent = self._began = 0.0

    def __enter__(self) -> None:
        """Raises :class:`PatternError` once the time is spent."""
        if self._spent > self.SECONDS:
            raise PatternError(f"takes more than {self.SECONDS:.0f} seconds to match")
        self._began = thread_time()

    def __exit__(self, *_: object) -> None:
        self._spent += thread_time() - self._began


# Parsing


def _parse(text: str) -> list[list[_Words]]:
    """What is between the stars: ``"a.*.{b,c}?"`` -> ``[[("a.",)], [(".",), ("b", "c"), ()]]``."""
    if not text:
        raise PatternError("an empty name matches nothing")
    if _UNPRINTABLE.search(text):
        raise PatternError(f"{_short(text)} has characters that no name has")
    segments: list[list[_Words]] = [[]]
    for token in _TOKEN.findall(text):
        if token[0] == "*":
            segments.append([])
        elif token == "?":
            segments[-1].append(())
        elif token in ("{", "}", "[", "]"):
            hints = {"{": "'{' without a closing '}'", "}": "unexpected '}'; '}' without an opening '{'"}
            hint = hints.get(token, f"unexpected {token!r}; write ranges as {{0..15}}")
            raise PatternError(f"{_short(text)}: {hint}")
        else:
            words = _alternatives(token[1:-1], text) if token[0] == "{" else (token,)
            segments[-1].append(words)
    stars = len(segments) - 1
    if stars > _MAX_STARS:
        raise PatternError(f"{_short(text)} has {stars} wildcards '*'; at most {_MAX_STARS} are allowed")
    if _size(segments) > _MAX_SIZE:
        raise PatternError(f"{_short(text)}, written out, has more than {_MAX_SIZE} characters")
    return segments


def _alternatives(body: str, text: str) -> _Words:
    words: dict[str, None] = {}
    for item in (part.strip() for part in body.split(",")):
        span = _RANGE.fullmatch(item)
        if span:
            low, high = int(span[1]), int(span[2])
            if low > high:
                raise PatternError(f"{_short(text)}: the range {item} is empty; write {{{high}..{low}}}")
            if high - low >= _MAX_ALTERNATIVES:
                raise PatternError(f"{_short(text)}: the range {item} is longer than {_MAX_ALTERNATIVES}")
            words.update(dict.fromkeys(map(str, range(low, high + 1))))
        elif not item or ".." in item or _SPECIAL.search(item):
            raise PatternError(f"{_short(text)}: {_short(item)} is no number, word or range like 0..15")
        else:
            words[item] = None
        if len(words) > _MAX_ALTERNATIVES:
            raise PatternError(f"{_short(text)}: more than {_MAX_ALTERNATIVES} alternatives")
    return tuple(words)


def _size(segments: Sequence[Sequence[_Words]]) -> int:
    return sum(sum(map(len, words)) or 1 for segment in segments for words in segment)


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:200]}...")


# Matching. A regex that tries one way after another can take forever on a name that almost matches: it is used
# where there is one way only, which is the case for what people and `compress` write.


def _needs_no_search(segments: Sequence[Sequence[_Words]]) -> bool:
    """Whether each segment matches in one way at most at any place, and those between two stars can be kept where
    they match first."""
    *before, last = segments
    return (
        all(_matches_one_way(segment, at_end=False) for segment in before)
        and _matches_one_way(last, at_end=True)
        and all(_ends_first_where_it_starts_first(segment) for segment in segments[1:-1])
    )


def _matches_one_way(segment: Sequence[_Words], *, at_end: bool) -> bool:
    """No word begins another, or what follows the braces decides between them."""
    for i, words in enumerate(segment):
        if not any(longer.startswith(word) for word, longer in pairwise(sorted(words))):
            continue
        if i + 1 == len(segment):
            return at_end
        after = segment[i + 1]
        if len(after) != 1 or any(after[0][0] in word for word in words):
            return False
    return True


def _ends_first_where_it_starts_first(segment: Sequence[_Words]) -> bool:
    """No match lies within a longer one: to begin later and end earlier it would have to be too short."""
    longest = sum(max(map(len, words), default=1) for words in segment)
    shortest = sum(min(map(len, words), default=1) for words in segment)
    head = segment[0][0][:100] if len(segment[0]) == 1 else ""
    later = next((n for n in range(1, len(head)) if head.startswith(head[n:])), max(1, len(head)))
    return longest - shortest <= later


def _to_regex(segments: Sequence[Sequence[_Words]]) -> str:
    first, *others = map(_segment_regex, segments)
    if not others:
        return first
    *between, last = others
    # What a lookahead has found is not tried again elsewhere; Python has atomic groups from 3.11 on only.
    kept = [rf"(?=(.*?{segment}))\{number}" for number, segment in enumerate(between, start=1)]
    if between and not last:
        kept[-1] = ".*" + between[-1]  # nothing after it can fail, and this is faster
    return "".join([first, *kept, ".*", last])


def _segment_regex(segment: Sequence[_Words]) -> str:
    return "".join("(?:" + "|".join(map(re.escape, words)) + ")" if words else "." for words in segment)


def _by_length(words: _Words) -> dict[int, set[str]]:
    groups: dict[int, set[str]] = defaultdict(set)
    for word in words:
        groups[len(word)].add(word)
    return dict(groups)


def _walk(segments: Sequence[Sequence[Mapping[int, set[str]]]], name: str) -> bool | None:
    """True for a match, else None. Looks for all ways at once: every place where each part can end."""
    ends = {0}
    for number, segment in enumerate(segments):
        if number:  # after a star
            ends = set(range(min(ends), len(name) + 1))
        for part in segment:
            if part:
                ends = {end + n for end in ends for n, words in part.items() if name[end : end + n] in words}
            else:
                ends = {end + 1 for end in ends if end < len(name)}
            if not ends:
                return None
    return True if len(name) in ends else None


# Folding


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
        for column in [width - 1, *range(width - 3, 0, -2)[:_MAX_FOLDED_NUMBERS]]:
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
