"""Finds which of many patterns match a name, without trying each of them on it.

Most patterns contain complete words between dots: ``model.layers.{0..3}.mlp.*`` the first four,
``*.experts.*.up_proj`` the last one and another somewhere. Tables of these words leave few candidates for a name, and
only those are tried. 2,000 patterns on 48,000 names take half a second instead of more than a minute.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice

from .budget import MatchBudget
from .match import Words
from .pattern import Pattern, segments_of

__all__ = ["PatternIndex"]

_Word = Collection[str] | None
"""The texts that one word of a name may have; None for any."""


class PatternIndex:
    """Matches names against many patterns at once. Results are indices into ``patterns``."""

    def __init__(self, patterns: Sequence[Pattern]):
        self._exact: dict[str, list[int]] = defaultdict(list)
        self._globs: list[tuple[int, Pattern]] = []
        places: dict[int, dict[int, _Word]] = defaultdict(dict)
        inner: list[list[Collection[str]]] = []
        for number, pattern in enumerate(patterns):
            if pattern.exact:
                self._exact[pattern.text].append(number)
                continue
            at = len(self._globs)
            self._globs.append((number, pattern))
            first, last, between = _words_of(pattern)
            inner.append([word for word in between if word is not None])
            for place, word in enumerate(first):
                places[place][at] = word
            for place, word in enumerate(last):
                places[-1 - place][at] = word
        # One word is enough to look a glob up by: the one that the fewest globs contain.
        often = Counter(choice for words in inner for word in words for choice in word)
        somewhere: dict[int, _Word] = {
            at: min(words, key=lambda word: sum(often[choice] for choice in word), default=None)
            for at, words in enumerate(inner)
        }
        self._places = {place: self._table(words) for place, words in places.items()}
        self._somewhere = self._table(somewhere)

    def _table(self, words: Mapping[int, _Word]) -> tuple[int, dict[str, int]]:
        """Bit masks of globs: of those that allow any word, and for each word of those that ask for it."""
        table: dict[str, int] = defaultdict(int)
        free = (1 << len(self._globs)) - 1
        for at, choices in words.items():
            if choices is not None:
                free ^= 1 << at
                for word in choices:
                    table[word] |= 1 << at
        return free, dict(table)

    def matching(self, name: str) -> list[int]:
        """The indices of all patterns that match a name, in ascending order."""
        found = [number for number, pattern in self._candidates(name) if pattern.matches(name)]
        return sorted([*self._exact.get(name, ()), *found])

    def hits(self, names: Iterable[str]) -> dict[str, list[int]]:
        """:meth:`matching` of each name.

        Raises:
            PatternError: matching takes too long, see :class:`MatchBudget`.
        """
        budget, found = MatchBudget(), {}
        for name in names:
            with budget:
                found[name] = self.matching(name)
        return found

    def last(self, name: str) -> int | None:
        """The index of the last pattern that matches a name; None where none does."""
        exact = self._exact.get(name, (-1,))[-1]
        for number, pattern in self._candidates(name):
            if number < exact:
                break
            if pattern.matches(name):
                return number
        return exact if exact >= 0 else None

    def lasts(self, names: Iterable[str], budget: MatchBudget) -> Iterator[tuple[str, int | None]]:
        """Yields each name with :meth:`last` of it.

        Raises:
            PatternError: matching takes more than is left of ``budget``.
        """
        rest, count = iter(names), 1
        while some := [*islice(rest, count)]:
            with budget:
                found = [*map(self.last, some)]
            yield from zip(some, found, strict=True)
            count = min(2 * count, 64)  # looking at the clock takes as long as matching a name does

    def _candidates(self, name: str) -> Iterator[tuple[int, Pattern]]:
        """Yields the globs that may match, the last one first."""
        if not self._globs:
            return
        words = name.split(".")
        free, table = self._somewhere
        left = free
        for word in {*words}:
            left |= table.get(word, 0)
        count = len(words)
        for place, (free, table) in self._places.items():
            if not left:
                return
            there = -count <= place < count
            left &= free | (table.get(words[place], 0) if there else 0)
        while left:
            at = left.bit_length() - 1
            left ^= 1 << at
            yield self._globs[at]


def _words_of(pattern: Pattern) -> tuple[list[_Word], list[_Word], list[_Word]]:
    """The words that a matching name begins with, those that it ends with (last first), and those anywhere between.

    Where the first words are all there are, the last ones say nothing more: none.
    """
    segments = [_runs(segment) for segment in segments_of(pattern.text)]
    between = [word for runs in segments for run in runs for word in run[1:-1]]
    first, last = segments[0][0], segments[-1][-1]
    if len(segments) == len(segments[0]) == 1:
        return first, [], between
    # A word beside a wildcard is only a part of a name's word.
    return first[:-1], last[:0:-1], between


def _runs(segment: Sequence[Words]) -> list[list[_Word]]:
    """Splits a segment into runs of words between dots; a new run begins where the number of words is open."""
    runs: list[list[_Word]] = [[("",)]]
    for choices in segment:
        if not choices or (len(choices) > 1 and any("." in choice for choice in choices)):
            runs.append([("",)])
            continue
        begins, *words = choices[0].split(".") if len(choices) == 1 else (choices,)
        begins = (begins,) if isinstance(begins, str) else begins
        run = runs[-1]
        run[-1] = _joined(run[-1], begins)
        run += [(word,) for word in words]
    return runs


def _joined(first: _Word, then: Collection[str]) -> _Word:
    """Joins two parts of a word. Two lists of choices are not multiplied out, which may make millions: None instead."""
    if first is None or (len(first) > 1 and len(then) > 1):
        return None
    return [a + b for a in first for b in then]
