"""Untrusted regular expressions: those in the configurations of quantizers.

Python's ``re`` can backtrack for hours. The expressions in use are plain, so one that could take long is refused: the
ways in which it can match are counted before it is tried, which bounds a match to seconds.
"""

from __future__ import annotations

import math
import re
import warnings
from functools import lru_cache

from .pattern import MAX_NAME, PatternError

__all__ = ["plain_regex"]


_MAX_REGEX = 1000
_MAX_WAYS = 600_000_000  # at most 20 seconds
_REGEX_TOKEN = re.compile(
    r"(?P<repeat>(?:[*+]|\{\d{1,3}(?:,\d{0,3})?\})\??)|(?P<maybe>\?\??)|(?P<or>\|)"
    r"|(?P<open>\((?:\?[:=!])?(?!\?))|(?P<close>\))"
    r"|\\[^0-9]|\[\^?\]?(?:\\.|[^\]\\\[])*\]|[^\\\[{(]",  # an escape, a set, any other character
    re.DOTALL,
)


@lru_cache(maxsize=8192)
def plain_regex(pattern: str, regex: str) -> re.Pattern[str]:
    """Compiles ``regex``, which messages quote as ``pattern``.

    Raises:
        PatternError: it is no regular expression, or may take too long.
    """
    shown = repr(pattern if len(pattern) <= 200 else f"{pattern[:200]}...")
    if len(regex) > _MAX_REGEX or _ways(regex) > _MAX_WAYS:
        raise PatternError(
            f"holds {shown}: a regular expression that repeats or names a group, or has too many ways to match, is "
            "not read"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return re.compile(regex)
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise PatternError(f"holds {shown}, which is no regular expression: {error}") from error


def _ways(pattern: str) -> float:
    """Bounds the ways in which a regex can match a name; infinite where it repeats groups or refers back to one."""
    pattern = pattern.removesuffix("$").removesuffix(".*")  # both match in one way
    ways, repeats, branches = 1, 0, [1]
    at, before = 0, None
    while at < len(pattern):
        token = _REGEX_TOKEN.match(pattern, at)
        if token is None or (token.lastgroup == "repeat" and before == "close"):
            return math.inf
        at, before = token.end(), token.lastgroup
        if before == "repeat":
            repeats += 1
        elif before == "maybe":
            ways *= 2
        elif before == "or":
            branches[-1] += 1
        elif before == "open":
            branches.append(1)
        elif before == "close" and len(branches) > 1:
            ways *= branches.pop()
    return ways * math.prod(branches) * math.comb(MAX_NAME + repeats, repeats)
