"""Matches a parsed pattern against a name in bounded time.

A regex that backtracks can take forever on a name that almost matches. It is used only where there is one way to match,
as in what people and :func:`~.compress.compress` write; :func:`walk` matches the other patterns.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

__all__ = ["Words", "by_length", "needs_no_search", "to_regex", "walk"]


Words = tuple[str, ...]
"""One part of a pattern: the alternatives in braces, a literal text as the only one, or none for ``?``."""


def needs_no_search(segments: Sequence[Sequence[Words]]) -> bool:
    """Whether a regex need not backtrack.

    Then each segment matches in at most one way at any place, and one between two stars may stay where it matches
    first.
    """
    *before, last = segments
    return (
        all(_matches_one_way(segment, at_end=False) for segment in before)
        and _matches_one_way(last, at_end=True)
        and all(_ends_first_where_it_starts_first(segment) for segment in segments[1:-1])
    )


def _matches_one_way(segment: Sequence[Words], *, at_end: bool) -> bool:
    """Whether no alternative is the beginning of another, or the text after the braces decides between them."""
    for i, words in enumerate(segment):
        if not any(longer.startswith(word) for word, longer in pairwise(sorted(words))):
            continue
        if i + 1 == len(segment):
            return at_end
        after = segment[i + 1]
        if len(after) != 1 or any(after[0][0] in word for word in words):
            return False
    return True


def _ends_first_where_it_starts_first(segment: Sequence[Words]) -> bool:
    """Whether no match lies inside of a longer one, so that the match that begins first also ends first."""
    longest = sum(max(map(len, words), default=1) for words in segment)
    shortest = sum(min(map(len, words), default=1) for words in segment)
    head = segment[0][0][:100] if len(segment[0]) == 1 else ""
    later = next((n for n in range(1, len(head)) if head.startswith(head[n:])), max(1, len(head)))
    return longest - shortest <= later


def to_regex(segments: Sequence[Sequence[Words]]) -> str:
    first, *others = map(_segment_regex, segments)
    if not others:
        return first
    *between, last = others
    # A lookahead never backtracks. It stands in for an atomic group, which Python has only from 3.11 on.
    kept = [rf"(?=(.*?{segment}))\{number}" for number, segment in enumerate(between, start=1)]
    if between and not last:
        kept[-1] = ".*" + between[-1]  # nothing after it can fail, and this is faster
    return "".join([first, *kept, ".*", last])


def _segment_regex(segment: Sequence[Words]) -> str:
    return "".join("(?:" + "|".join(map(re.escape, words)) + ")" if words else "." for words in segment)


def by_length(words: Words) -> dict[int, set[str]]:
    groups: dict[int, set[str]] = defaultdict(set)
    for word in words:
        groups[len(word)].add(word)
    return dict(groups)


def walk(segments: Sequence[Sequence[Mapping[int, set[str]]]], name: str) -> bool | None:
    """Returns True for a match, else None. Follows all ways at once, as the set of positions where a part can end."""
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
