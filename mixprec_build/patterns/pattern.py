"""Names with wildcards, as recipes and ``quantization_config`` write them.

A pattern is a module name in which

- ``*`` stands for any run of characters, dots included (as in :mod:`fnmatch`),
- ``?`` stands for one character,
- ``{0..15}``, ``{3,7,64}`` and ``{0..3,8}`` stand for any of these numbers or words.

A pattern without any of them is an *exact* name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from .match import Words, by_length, needs_no_search, to_regex, walk

__all__ = ["MAX_ALTERNATIVES", "MAX_NAME", "RANGE", "Pattern", "PatternError", "PatternReader", "segments_of"]

_SPECIAL = re.compile(r"[*?{}\[\]]")
_TOKEN = re.compile(r"\*+|\?|\{[^}]*\}|[^*?{}\[\]]+|.")
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
RANGE = re.compile(r"(\d{1,6})\.\.(\d{1,6})")

MAX_NAME = 256
"""Most characters of a name. Longer ones are refused where they are read, so that none is ever matched."""

# Bounds for untrusted patterns; sizes are in characters, with braces written out.
_MAX_STARS = 4
MAX_ALTERNATIVES = 10_000
_MAX_SIZE = 200_000
_MAX_FILE_GLOBS = 2_000
_MAX_FILE_SIZE = 1_000_000


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
    """Its length in characters, with braces written out."""
    _match: Callable[[str], object] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        segments = segments_of(self.text)
        match: Callable[[str], object]
        exact = _SPECIAL.search(self.text) is None
        if exact:
            match = self.text.__eq__
        elif needs_no_search(segments):
            match = re.compile(to_regex(segments), re.DOTALL).fullmatch
        else:
            match = partial(walk, [[by_length(words) for words in segment] for segment in segments])
        object.__setattr__(self, "exact", exact)
        object.__setattr__(self, "size", _size(segments))
        object.__setattr__(self, "_match", match)

    @property
    def lists(self) -> bool:
        """Whether it writes out every name that it matches, with braces at most."""
        return not {"*", "?"} & {*self.text}

    def matches(self, name: str) -> bool:
        return name == self.text if self.exact else self._match(name) is not None

    def greatest(self) -> Iterator[tuple[str, Pattern]]:
        """Yields the greatest number of each range or list of numbers, and the pattern with that number only."""
        tokens = _TOKEN.findall(self.text)
        for i, token in enumerate(tokens):
            words = _alternatives(token[1:-1], self.text) if token[0] == "{" else ()
            if len(words) > 1 and all(map(str.isdecimal, words)):
                number = max(words, key=int)
                yield number, Pattern("".join([*tokens[:i], number, *tokens[i + 1 :]]))


class PatternReader:
    """Parses the patterns of one untrusted file, and bounds their number and total size."""

    def __init__(self) -> None:
        self._globs = self._size = 0

    def read(self, text: str) -> Pattern:
        """Parses one pattern. Raises :class:`PatternError` if it is malformed or exceeds the file's bounds."""
        pattern = Pattern(text)
        if not pattern.exact:
            self._globs += 1
            self._size += pattern.size
        if self._globs > _MAX_FILE_GLOBS:
            raise PatternError(f"more than {_MAX_FILE_GLOBS} patterns in one file")
        if self._size > _MAX_FILE_SIZE:
            raise PatternError(f"the patterns of one file, written out, have more than {_MAX_FILE_SIZE} characters")
        return pattern


def segments_of(text: str) -> list[list[Words]]:
    """Splits a pattern at its stars: ``"a.*.{b,c}?"`` -> ``[[("a.",)], [(".",), ("b", "c"), ()]]``.

    Raises:
        PatternError: ``text`` is malformed.
    """
    if not text:
        raise PatternError("an empty name matches nothing")
    if _UNPRINTABLE.search(text):
        raise PatternError(f"{_short(text)} has characters that no name has")
    segments: list[list[Words]] = [[]]
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


def _alternatives(body: str, text: str) -> Words:
    words: dict[str, None] = {}
    for item in (part.strip() for part in body.split(",")):
        span = RANGE.fullmatch(item)
        if span:
            low, high = int(span[1]), int(span[2])
            if low > high:
                raise PatternError(f"{_short(text)}: the range {item} is empty; write {{{high}..{low}}}")
            if high - low >= MAX_ALTERNATIVES:
                raise PatternError(f"{_short(text)}: the range {item} is longer than {MAX_ALTERNATIVES}")
            words.update(dict.fromkeys(map(str, range(low, high + 1))))
        elif not item or ".." in item or _SPECIAL.search(item):
            raise PatternError(f"{_short(text)}: {_short(item)} is no number, word or range like 0..15")
        else:
            words[item] = None
        if len(words) > MAX_ALTERNATIVES:
            raise PatternError(f"{_short(text)}: more than {MAX_ALTERNATIVES} alternatives")
    return tuple(words)


def _size(segments: Sequence[Sequence[Words]]) -> int:
    return sum(sum(map(len, words)) or 1 for segment in segments for words in segment)


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:200]}...")
