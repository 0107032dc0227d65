"""Shares of columns, the projections of experts, and the sizes that linears can be cut in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from typing import NamedTuple

from ..errors import SplitError
from ..families.base import Family
from ..formats.base import Format
from ..storage.module import StoredModule

__all__ = ["Expert", "Share", "known", "projections", "step_of"]


@dataclass(frozen=True, slots=True)
class Share:
    """The number of an MLP's ``total`` columns that each of ``ranks`` stores: ``columns``, with zeros added."""

    total: int
    ranks: int
    columns: int
    step: int = 1
    """``columns`` is a multiple of this."""

    @property
    def native(self) -> int:
        """A rank's columns without added zeros."""
        return self.total // self.ranks

    @property
    def padding(self) -> float:
        """Added columns, as a share of ``total``."""
        return self.columns * self.ranks / self.total - 1

    def of(self, rank: int) -> tuple[int, int]:
        """A rank's columns among ``total``: ``(start, stop)``."""
        return min(rank * self.columns, self.total), min((rank + 1) * self.columns, self.total)


class Expert(NamedTuple):
    """Names of the projections of one expert."""

    ups: tuple[str, ...]
    """Gate and up, or up alone, in the order of SGLang's ``w13``."""
    down: str


def step_of(fmt: Format, stored: StoredModule, *, inputs: bool) -> int:
    """The inputs or outputs of a linear that its tensors cannot be cut within."""
    axes = [fmt.axes(leaf) for leaf in stored.tensors]
    return lcm(*(axis.per for axis in ((a.k if inputs else a.n) for a in axes) if axis is not None))


def known(number: int | None, key: str) -> int:
    """``number``, which is ``key`` of ``config.json``; raises :class:`SplitError` where that has none."""
    if number is None:
        raise SplitError(f"config.json has no {key}, which says how attention is cut")
    return number


def projections(expert: str, parts: Mapping[str, str], family: Family) -> Expert:
    """The projections of an expert; ``parts``: last word -> name."""
    words = family.projections_among(parts)
    lacking = [word for word in words.words if word not in parts]
    if lacking:
        raise SplitError(f"{expert}: has no {' and no '.join(lacking)}; take the whole expert from one model")
    return Expert(tuple(parts[word] for word in words.ups), parts[words.down])
