"""The multiple-choice knapsack: picks one choice of each group for the least total loss within a budget.

Lagrangian relaxation puts a price on a byte. At the price that spends just the budget, each group takes the choice of
least loss plus price, and their sum is a lower bound of any solution's loss (Kellerer, Pferschy, Pisinger, *Knapsack
Problems*, 2004, chapter 11). A choice whose reduced loss is larger than the gap between this bound and a known solution
is in no better one. Dynamic programming searches the few that remain, over states that no other state beats in both
cost and loss. The result is optimal, or the bound says how far from optimal it can be at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

__all__ = ["Frontier", "Solution", "frontier", "solve"]


_MAX_CORE = 500
"""Most groups that are searched: those whose two best choices are closest."""
_MAX_STATES = 20_000

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Solution:
    """``picks[g]`` is the choice of group ``g``. ``bound`` is a proven lower bound of the loss of any solution."""

    picks: tuple[int, ...]
    cost: int
    loss: float
    bound: float
    price: float
    """Loss that one more unit of cost saves, at the margin."""

    @property
    def gap(self) -> float:
        """The share of the loss by which it can exceed the optimum at most: 0 for a proven optimum."""
        return (self.loss - self.bound) / self.loss if self.loss > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Frontier:
    """The corners of the convex frontier, from the least cost to the least loss: ``cost [P]``, ``loss [P]``."""

    cost: _Ints
    loss: _Floats


def solve(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> Solution:
    """Picks a choice of each group, of the least total loss with a total cost of at most ``budget``.

    Args:
        costs: of each group's choices; not negative.
        losses: of the same choices; finite.

    Raises:
        ValueError: even the cheapest choices cost more than the budget.
    """
    steps = _Steps.of(costs, losses)
    cheapest = int(steps.base_cost.sum())
    if cheapest > budget:
        raise ValueError(f"the least cost is {cheapest}, the budget {budget}")
    spent = cheapest + np.cumsum(steps.cost)
    taken = int(np.searchsorted(spent, budget, side="right"))
    if taken == len(steps.cost):
        return _solution(costs, losses, steps.applied(slice(None)), bound=None, price=0.0)
    price = float(steps.ratio[taken])
    greedy = _solution(costs, losses, steps.filled(taken, budget - cheapest), bound=None, price=price)
    table_cost, table_loss = _table(costs, losses)
    at_price = table_loss + price * table_cost
    least = at_price.min(axis=1)
    bound = float(least.sum() - price * budget)
    picks, bound = _Core(table_cost, table_loss, at_price - least[:, None], price, budget, bound, greedy).search()
    best = _solution(costs, losses, picks, bound=bound, price=price)
    return best if best.bound < best.loss else _solution(costs, losses, picks, bound=None, price=price)


def frontier(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]) -> Frontier:
    """The frontier of the relaxation: no solution lies below the line through its points."""
    steps = _Steps.of(costs, losses)
    cost = np.concatenate([[0], np.cumsum(steps.cost)]) + steps.base_cost.sum()
    # Added up from the least loss backwards: small losses are not lost in a large sum.
    saved = np.concatenate([np.cumsum((steps.ratio * steps.cost)[::-1])[::-1], [0.0]])
    return Frontier(cost.astype(np.int64), saved + steps.last_loss.sum())


def _solution(
    costs: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    picks: Sequence[int],
    bound: float | None,
    price: float,
) -> Solution:
    cost = sum(int(row[pick]) for row, pick in zip(costs, picks, strict=True))
    loss = float(np.sum([row[pick] for row, pick in zip(losses, picks, strict=True)]))
    return Solution(tuple(map(int, picks)), cost, loss, loss if bound is None else min(bound, loss), price)


@dataclass(frozen=True, slots=True)
class _Steps:
    """Steps along each group's lower convex hull, those that save most loss for their cost first.

    Within a group the ratio falls from step to step, so the first steps of the list take each group's steps in order.
    """

    groups: int
    base_pick: _Ints
    base_cost: _Ints
    last_loss: _Floats
    group: _Ints
    pick: _Ints
    """The choice that a step leads to."""
    cost: _Ints
    ratio: _Floats

    @classmethod
    def of(cls, costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]) -> _Steps:
        base_pick, base_cost, last_loss = [], [], []
        rows: list[tuple[int, int, int, float]] = []
        for g, (cost, loss) in enumerate(zip(costs, losses, strict=True)):
            hull = _hull(cost, loss)
            base_pick.append(hull[0])
            base_cost.append(cost[hull[0]])
            last_loss.append(loss[hull[-1]])
            for a, b in pairwise(hull):
                more = cost[b] - cost[a]
                rows.append((g, b, more, (loss[a] - loss[b]) / more))
        group, pick, more_cost, ratio = zip(*rows, strict=True) if rows else ((), (), (), ())
        order = np.argsort(-np.array(ratio, np.float64), kind="stable")
        return cls(
            len(base_pick),
            np.array(base_pick, np.int64),
            np.array(base_cost, np.int64),
            np.array(last_loss, np.float64),
            np.array(group, np.int64)[order],
            np.array(pick, np.int64)[order],
            np.array(more_cost, np.int64)[order],
            np.array(ratio, np.float64)[order],
        )

    def applied(self, which: slice) -> list[int]:
        picks = self.base_pick.copy()
        picks[self.group[which]] = self.pick[which]  # of several steps of a group the last stays
        return [int(pick) for pick in picks]

    def filled(self, taken: int, room: int) -> list[int]:
        """The picks after the first ``taken`` steps and those of the others that still fit."""
        picks = self.applied(slice(taken))
        room -= int(self.cost[:taken].sum())
        closed: set[int] = set()
        for g, pick, cost in zip(self.group[taken:], self.pick[taken:], self.cost[taken:], strict=True):
            if g in closed or cost > room:
                closed.add(int(g))
                continue
            picks[g] = int(pick)
            room -= int(cost)
        return picks


def _hull(cost: Sequence[int], loss: Sequence[float]) -> list[int]:
    """The choices on the lower convex hull, from the cheapest to the one of least loss."""
    hull: list[int] = []
    for j in sorted(range(len(cost)), key=lambda j: (cost[j], loss[j])):
        if hull and loss[j] >= loss[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (loss[a] - loss[b]) * (cost[j] - cost[b]) > (loss[b] - loss[j]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(j)
    return hull


def _table(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]) -> tuple[_Ints, _Floats]:
    """Costs and losses, ``[G, C]``; the loss is infinite where a group has fewer choices."""
    wide = max(map(len, costs))
    cost = np.zeros((len(costs), wide), np.int64)
    loss = np.full((len(costs), wide), np.inf)
    for g, (some, other) in enumerate(zip(costs, losses, strict=True)):
        cost[g, : len(some)], loss[g, : len(other)] = some, other
    return cost, loss


class _Core:
    """The search among the choices that can be in a better solution than the greedy one."""

    def __init__(
        self,
        cost: _Ints,
        loss: _Floats,
        reduced: _Floats,
        price: float,
        budget: int,
        bound: float,
        known: Solution,
    ):
        self._cost, self._loss, self._price, self._budget = cost, loss, price, budget
        self._bound, self._known = bound, known
        self._picks = reduced.argmin(axis=1)
        room = known.loss - bound
        # The closest rivals first. A solution with a rival that is left out exceeds the bound by its reduced loss.
        rival = np.where(np.arange(reduced.shape[1]) == self._picks[:, None], np.inf, reduced).min(axis=1)
        order = np.argsort(rival, kind="stable")
        order = order[: int(np.searchsorted(rival[order], room))]
        self._core = order[:_MAX_CORE]
        self._proven = float(min([known.loss, *(bound + rival[order[_MAX_CORE : _MAX_CORE + 1]])]))
        self._options = [np.flatnonzero(reduced[g] < room) for g in self._core]

    def search(self) -> tuple[list[int], float]:
        """The best picks found, and a lower bound of any solution's loss."""
        rows = np.arange(len(self._picks))
        fixed = np.setdiff1d(rows, self._core)
        cost = np.array([self._cost[fixed, self._picks[fixed]].sum()], np.int64)
        loss = np.array([self._loss[fixed, self._picks[fixed]].sum()], np.float64)
        lows = [int(self._cost[g, options].min()) for g, options in zip(self._core, self._options, strict=True)]
        highs = [int(self._cost[g, options].max()) for g, options in zip(self._core, self._options, strict=True)]
        low, high = sum(lows), sum(highs)
        at_price = [
            float((self._loss[g, options] + self._price * self._cost[g, options]).min())
            for g, options in zip(self._core, self._options, strict=True)
        ]
        to_come = sum(at_price)
        trail: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.int16]]] = []
        for g, options, least, lowest, highest in zip(self._core, self._options, at_price, lows, highs, strict=True):
            low, high, to_come = low - lowest, high - highest, to_come - least
            parent = np.tile(np.arange(len(cost), dtype=np.int32), len(options))
            choice = np.repeat(options.astype(np.int16), len(cost))
            cost = (self._cost[g, options][:, None] + cost).reshape(-1)
            loss = (self._loss[g, options][:, None] + loss).reshape(-1)
            unspent = np.maximum(0, self._budget - cost - high)
            # Lower bound of a state's solutions: the groups to come at the price, and that of budget left unspent.
            least_loss = loss + self._price * (cost + unspent - self._budget) + to_come
            keep = np.flatnonzero((cost + low <= self._budget) & (least_loss < self._known.loss))
            keep = keep[np.lexsort((loss[keep], cost[keep]))]
            if len(keep):
                before = np.concatenate([[np.inf], np.minimum.accumulate(loss[keep])[:-1]])
                keep = keep[loss[keep] < before]
            if len(keep) > _MAX_STATES:
                ranked = keep[np.argsort(least_loss[keep], kind="stable")]
                self._proven = min(self._proven, float(least_loss[ranked[_MAX_STATES]]))
                keep = np.sort(ranked[:_MAX_STATES])
            cost, loss = cost[keep], loss[keep]
            trail.append((parent[keep], choice[keep]))
            if not len(keep):
                break
        # Nothing was left to search, or no better solution was found.
        if not trail or len(trail) < len(self._core) or not len(cost):
            return list(self._known.picks), max(self._bound, self._proven)
        at = int(loss.argmin())
        best = float(loss[at])
        for g, (parent, choice) in zip(self._core[::-1], trail[::-1], strict=True):
            self._picks[g] = choice[at]
            at = int(parent[at])
        return [int(pick) for pick in self._picks], max(self._bound, min(self._proven, best))
