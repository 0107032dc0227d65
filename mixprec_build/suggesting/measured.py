"""Measured swaps: what the whole model loses when modules come from another source.

Errors of weights and of outputs are not comparable between kinds of modules and between layers: an error of the same
size does more harm in one place than in another. A swap measures it at the end of the model, and its loss is shared
out over the modules that were swapped together, in proportion to their errors. Modules that no swap measured have
their errors scaled as swaps of the same column were in the layers around them.

Two things were seen on a trained mixture of experts (``tests/benchmarks/README.md``). Losses of swaps do not add up,
powers of them do, see :meth:`.Swaps.exponent`. And a swap of small errors loses more than its share, because some token
is always about to go to another expert: its loss does not say what these errors add to those of a mix.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..errors import StatsError
from ..patterns.index import PatternIndex
from .choices import Group
from .swaps import Swaps

__all__ = ["scaled"]

_LEAST = 1e-30
"""Stands for a loss of zero, where a logarithm is taken."""
_SMALL = 1 / 4
"""A swap of smaller errors than this share of another's, of the same modules, counts by its errors."""


def scaled(
    groups: Sequence[Group], swaps: Swaps, sources: Sequence[str], exponent: float
) -> tuple[list[Group], list[str]]:
    """Groups whose options' losses are nats a token to the power of ``exponent``, and notes.

    ``groups`` have losses of another objective, in proportion to which a swap's loss is shared out. A group that
    several swaps of one source cover has the loss of the one that covers the fewest groups. Of swaps of the same
    modules from several sources, those of much smaller errors than the greatest lose as much less than it.

    Raises:
        StatsError: a swap is of a source or of modules that the recipe does not have, or has only a part of a group;
            two swaps measure the same; or no swap measures anything in a column.
    """
    unknown = next((swap.source for swap in swaps.swaps if swap.source not in sources), None)
    if unknown is not None:
        raise StatsError(
            f"{swaps.path}: swaps are from `{unknown}`, and the recipe has no source of that name; it has "
            f"{', '.join(f'`{name}`' for name in sources)}"
        )
    covered = _covered(groups, swaps)
    powers, small = _powers(groups, swaps, covered, exponent)
    measured: dict[tuple[int, str], tuple[int, float]] = {}
    """Group, source -> how many groups were swapped together, and the loss."""
    ratios: dict[tuple[str, str], dict[int | None, list[float]]] = defaultdict(lambda: defaultdict(list))
    for swap, power, mine in zip(swaps.swaps, powers, covered, strict=True):
        losses = {at: _loss_of(groups[at], swap.source) for at in mine}
        mine = [at for at in mine if losses[at] is not None]
        if not mine:
            raise StatsError(
                f"{swaps.path}: `{swap.patterns[0].text}` from `{swap.source}` matches no module that has this choice: "
                "the swaps are another model's, or of other sources"
            )
        total = sum(losses[at] or 0.0 for at in mine)
        for at in mine:
            loss = power * (losses[at] or 0.0) / total if total else power / len(mine)
            before = measured.get((at, swap.source))
            if before is not None and before[0] == len(mine):
                raise StatsError(f"{swaps.path}: {groups[at].name} from `{swap.source}` was measured twice")
            if before is None or len(mine) < before[0]:
                measured[at, swap.source] = (len(mine), loss)
        if total:
            for column, layer in {(groups[at].column, groups[at].layer) for at in mine}:
                ratios[column, swap.source][layer].append(max(power / total, _LEAST))
    out, notes = _filled(groups, swaps, measured, ratios)
    if small:
        notes.append(
            f"{small:,} of the swaps count by their errors, which are far smaller than other swaps' of the same modules"
        )
    return out, [*notes, _on_additivity(swaps, exponent)]


def _powers(
    groups: Sequence[Group], swaps: Swaps, covered: Sequence[Sequence[int]], exponent: float
) -> tuple[list[float], int]:
    """The loss of each swap to the power of ``exponent``; of how many swaps it was replaced, see :func:`scaled`."""
    errors = [
        sum(_loss_of(groups[at], swap.source) or 0.0 for at in mine)
        for swap, mine in zip(swaps.swaps, covered, strict=True)
    ]
    greatest: dict[tuple[int, ...], int] = {}
    for number, mine in enumerate(map(tuple, covered)):
        if errors[number] > errors[greatest.setdefault(mine, number)]:
            greatest[mine] = number
    powers, small = [], 0
    for number, mine in enumerate(map(tuple, covered)):
        most = greatest[mine]
        share = errors[number] / errors[most] if errors[most] else 1.0
        if share < _SMALL:
            small += 1
            powers.append(swaps.swaps[most].loss ** exponent * share)
        else:
            powers.append(swaps.swaps[number].loss ** exponent)
    return powers, small


def _covered(groups: Sequence[Group], swaps: Swaps) -> list[list[int]]:
    """The groups that each swap covers, by index."""
    flat = [(number, pattern) for number, swap in enumerate(swaps.swaps) for pattern in swap.patterns]
    index = PatternIndex([pattern for _, pattern in flat])
    covered: list[list[int]] = [[] for _ in swaps.swaps]
    for at, group in enumerate(groups):
        hits = [{flat[i][0] for i in index.matching(member)} for member in group.members]
        for number in sorted(set.union(*hits)):
            if not all(number in hit for hit in hits):
                raise StatsError(
                    f"{swaps.path}: `{swaps.swaps[number].patterns[0].text}` matches a part of {group.name}, whose "
                    f"{len(group.members)} modules come from one source; swap all of them"
                )
            covered[number].append(at)
    return covered


def _loss_of(group: Group, source: str) -> float | None:
    return next((option.loss for option in group.options if option.source == source), None)


def _filled(
    groups: Sequence[Group],
    swaps: Swaps,
    measured: Mapping[tuple[int, str], tuple[int, float]],
    ratios: Mapping[tuple[str, str], Mapping[int | None, Sequence[float]]],
) -> tuple[list[Group], list[str]]:
    out, estimated, borrowed = [], 0, set()
    for at, group in enumerate(groups):
        options = []
        for option in group.options:
            known = measured.get((at, option.source))
            loss = option.loss
            if known is not None:
                loss = known[1]
            elif loss > 0:
                estimated += 1
                own = ratios.get((group.column, option.source))
                if own is None:
                    borrowed.add((group.column, option.source))
                loss *= _ratio(own or _of_column(ratios, group, swaps), group.layer)
            options.append(replace(option, loss=loss))
        out.append(replace(group, options=tuple(options)))
    return out, list(_notes(swaps, estimated, borrowed))


def _of_column(
    ratios: Mapping[tuple[str, str], Mapping[int | None, Sequence[float]]], group: Group, swaps: Swaps
) -> Mapping[int | None, Sequence[float]]:
    """The ratios of swaps of a group's column from any source."""
    found: dict[int | None, list[float]] = defaultdict(list)
    for (column, _), by_layer in ratios.items():
        if column == group.column:
            for layer, values in by_layer.items():
                found[layer] += values
    if not found:
        raise StatsError(
            f"{swaps.path}: no swap measures {group.column}, so its errors cannot be compared with others'; measure "
            f"one, of {group.name} for example"
        )
    return found


def _ratio(by_layer: Mapping[int | None, Sequence[float]], layer: int | None) -> float:
    """Nats for a unit of the other objective: between measured layers interpolated, in logarithms."""
    logs = {at: float(np.mean(np.log(values))) for at, values in by_layer.items()}
    places = sorted(at for at in logs if at is not None)
    if layer is None or not places:
        return math.exp(float(np.mean(list(logs.values()))))
    return math.exp(float(np.interp(layer, places, [logs[at] for at in places])))


def _notes(swaps: Swaps, estimated: int, borrowed: set[tuple[str, str]]) -> Iterator[str]:
    if estimated:
        yield f"{estimated:,} choices were not swapped: their errors are scaled as those of their column were elsewhere"
    for column, source in sorted(borrowed):
        yield f"{column} was not swapped from `{source}`: its errors are scaled as other sources' were"


def _on_additivity(swaps: Swaps, exponent: float) -> str:
    found = swaps.additivity(exponent)
    if found is None:
        return "no sets of swaps were measured at once, so how far their losses add up is not known"
    least, most = found
    parts = "the sum of their parts" if exponent == 1 else f"(Σ lossᵖ)^(1/p) of their parts, p = {exponent:.2f}"
    return f"{len(swaps.together)} sets of swaps, measured at once, lose {least:.2f} to {most:.2f} times {parts}" + (
        ": swaps interact, and this mix may lose more or less than is said" if most > 2 * least else ""
    )
