"""Reads measured swaps: what the whole model loses when some of its modules come from another source."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as brief
from typing import Any

import numpy as np

from ..errors import SourceError, StatsError
from ..patterns.pattern import Pattern, PatternError
from ..storage.disk import read_regular
from ..storage.limits import readable_json

__all__ = ["Swap", "Swaps", "Together", "read_swaps"]

_MAX_BYTES = 1 << 28
_MAX_VALUES = 4_000_000
_MOST_NATS = 1_000_000
"""More than any loss of a token: a vocabulary of a million words has 14 nats. Sums of its powers stay numbers."""


@dataclass(frozen=True, slots=True)
class Swap:
    """Modules that came from ``source`` together, all others from the reference."""

    patterns: tuple[Pattern, ...]
    source: str
    loss: float
    """Nats a token."""


@dataclass(frozen=True, slots=True)
class Together:
    """Swaps, by index, that were measured at once."""

    swaps: tuple[int, ...]
    loss: float


@dataclass(frozen=True, slots=True)
class Swaps:
    """The contents of a file that ``recipes/swaps.py`` writes."""

    path: Path
    swaps: tuple[Swap, ...]
    together: tuple[Together, ...]

    def exponent(self) -> float:
        """The ``p`` from 1 to 2 by whose powers losses add up: ``(Σ lossᵖ)^(1/p)`` is nearest, in logarithms, to what
        sets lose at once; 1 where none was measured.

        What a dense model loses goes with the square of small errors, so that losses of independent ones add up.
        Where errors change which experts a router takes, the loss goes with the errors themselves, and a second one
        adds less to it.
        """
        sets = self._sets()
        if not sets:
            return 1.0
        powers = np.linspace(1, 2, 101)
        misses = [sum(math.log(_at_once(parts, p) / loss) ** 2 for parts, loss in sets) for p in powers]
        return float(powers[int(np.argmin(misses))])

    def additivity(self, exponent: float) -> tuple[float, float] | None:
        """The least and the greatest ratio of what sets lose at once to ``(Σ lossᵖ)^(1/p)`` of their swaps."""
        ratios = [loss / _at_once(parts, exponent) for parts, loss in self._sets()]
        return (min(ratios), max(ratios)) if ratios else None

    def _sets(self) -> list[tuple[list[float], float]]:
        """What the swaps of each set lose one by one, and at once."""
        found = [([self.swaps[i].loss for i in one.swaps], one.loss) for one in self.together]
        return [(parts, loss) for parts, loss in found if loss > 0 and sum(parts) > 0]


def _at_once(parts: list[float], exponent: float) -> float:
    return float(np.sum(np.array(parts) ** exponent) ** (1 / exponent))


def read_swaps(path: Path) -> Swaps:
    """Reads a file of swaps.

    Raises:
        StatsError: naming the file and the entry, for one that is damaged or of another kind.
    """
    try:
        data = read_regular(path, _MAX_BYTES)
    except SourceError as error:
        raise StatsError(str(error)) from error
    try:
        found = readable_json(data, _MAX_VALUES)
        if not isinstance(found, dict) or not isinstance(found.get("swaps"), list):
            raise ValueError("`swaps` is missing, a list of objects with modules, source and loss")
        swaps = tuple(_swap(entry, f"entry {at} of `swaps`") for at, entry in enumerate(found["swaps"]))
        if not swaps:
            raise ValueError("`swaps` is empty: nothing was measured")
        sets = found.get("together", [])
        if not isinstance(sets, list):
            raise ValueError("`together` must be a list of objects with swaps and loss")
        together = tuple(_together(entry, len(swaps), f"entry {at} of `together`") for at, entry in enumerate(sets))
    except ValueError as error:
        raise StatsError(f"{path}: no measured swaps: {error!s:.300}") from error
    return Swaps(path, swaps, together)


def _swap(entry: Any, where: str) -> Swap:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {brief(entry)}, an object with modules, source and loss was expected")
    modules, source = entry.get("modules"), entry.get("source")
    if not isinstance(modules, list) or not modules or not all(isinstance(name, str) for name in modules):
        raise ValueError(f"{where}: `modules` is {brief(modules)}, a list of patterns was expected")
    if not isinstance(source, str):
        raise ValueError(f"{where}: `source` is {brief(source)}, the name of a source was expected")
    try:
        patterns = tuple(map(Pattern, modules))
    except PatternError as error:
        raise ValueError(f"{where}: {error}") from error
    return Swap(patterns, source, _loss(entry, where))


def _together(entry: Any, count: int, where: str) -> Together:
    if not isinstance(entry, dict):
        raise ValueError(f"{where} is {brief(entry)}, an object with swaps and loss was expected")
    numbers = entry.get("swaps")
    if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < count for n in numbers):
        raise ValueError(f"{where}: `swaps` is {brief(numbers)}, a list of indices below {count} was expected")
    return Together(tuple(numbers), _loss(entry, where))


def _loss(entry: Mapping[str, Any], where: str) -> float:
    loss = entry.get("loss")
    # Compared as it is: an integer may be too large for a float. Comparisons with NaN are false.
    if not isinstance(loss, (int, float)) or isinstance(loss, bool) or not 0 <= loss <= _MOST_NATS:
        raise ValueError(f"{where}: `loss` is {brief(loss)}, a number of nats from 0 to {_MOST_NATS:,} was expected")
    return float(loss)
