"""The solver against trying everything, and at the size of Qwen3-235B-A22B."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixprec_build.suggesting import knapsack
from mixprec_build.suggesting.knapsack import frontier, solve

CHOICE = st.tuples(st.integers(0, 50), st.floats(0, 100))
GROUPS = st.lists(st.lists(CHOICE, min_size=1, max_size=4), min_size=1, max_size=6)


def split(groups: list[list[tuple[int, float]]]) -> tuple[list[list[int]], list[list[float]]]:
    return [[c for c, _ in g] for g in groups], [[e for _, e in g] for g in groups]


def brute_force(costs: list[list[int]], losses: list[list[float]], budget: int) -> float | None:
    """The least loss within the budget, from all combinations."""
    found = [
        sum(losses[g][j] for g, j in enumerate(picks))
        for picks in itertools.product(*(range(len(row)) for row in costs))
        if sum(costs[g][j] for g, j in enumerate(picks)) <= budget
    ]
    return min(found, default=None)


@settings(max_examples=400, deadline=None)
@given(GROUPS, st.integers(0, 200))
def test_it_finds_what_trying_everything_finds(groups: list[list[tuple[int, float]]], budget: int) -> None:
    costs, losses = split(groups)
    best = brute_force(costs, losses, budget)
    if best is None:
        with pytest.raises(ValueError, match=f"the least cost is {sum(map(min, costs))}, the budget {budget}"):
            solve(costs, losses, budget)
        return
    found = solve(costs, losses, budget)
    assert found.cost == sum(costs[g][j] for g, j in enumerate(found.picks)) <= budget
    assert found.loss == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert found.bound <= best * (1 + 1e-9) + 1e-9
    assert found.gap < 1e-9


@settings(max_examples=150, deadline=None)
@given(GROUPS, st.integers(0, 200))
def test_the_bound_holds_where_the_search_is_cut_short(groups: list[list[tuple[int, float]]], budget: int) -> None:
    costs, losses = split(groups)
    best = brute_force(costs, losses, budget)
    if best is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knapsack, "_MAX_CORE", 2)
        patch.setattr(knapsack, "_MAX_STATES", 2)
        found = solve(costs, losses, budget)
    assert found.cost <= budget
    assert found.bound <= best * (1 + 1e-9) + 1e-9
    assert found.loss >= best * (1 - 1e-9)


@settings(max_examples=100, deadline=None)
@given(GROUPS, st.integers(0, 200))
def test_no_solution_lies_below_the_frontier(groups: list[list[tuple[int, float]]], budget: int) -> None:
    costs, losses = split(groups)
    if brute_force(costs, losses, budget) is None:
        return
    found, line = solve(costs, losses, budget), frontier(costs, losses)
    assert line.cost[0] == sum(map(min, costs))
    assert line.loss[-1] == pytest.approx(sum(map(min, losses)), abs=1e-9)
    assert found.loss >= np.interp(found.cost, line.cost, line.loss) - 1e-7


def test_qwen3_235b_in_seconds() -> None:
    """94 layers of 128 experts and attention in three formats each: 36,096 choices for experts alone."""
    random = np.random.default_rng(0)
    parameters = np.repeat([3 * 4096 * 1536, 4096 * 9216, 4096 * 8192], [94 * 128, 94, 94])
    spread = random.lognormal(0, 1.5, len(parameters)) * parameters
    costs = [[n // 2 + n // 64 + 7, n + n // 4096, 2 * n] for n in map(int, parameters)]
    losses = [[s * 1e-2, s * 7e-4 * random.uniform(0.5, 2), 0.0] for s in spread]
    low, high = sum(row[0] for row in costs), sum(row[2] for row in costs)
    started = time.monotonic()
    for budget in (low + 12_345_678, 140_000_000_000, (low + high) // 2):
        found = solve(costs, losses, budget)
        assert budget - 10_000_000 < found.cost <= budget
        assert found.gap < 1e-3
    assert time.monotonic() - started < 60
