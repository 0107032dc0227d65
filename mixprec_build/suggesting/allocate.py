"""Chooses a source for every module: the least expected loss within a budget of bytes.

A choice is one fused group (q/k/v, gate/up, the three projections of one expert) from one source, listed by
:mod:`.choices`. Its loss is what :mod:`.distortion` measured, in the unit of an :class:`~.objective.Objective`, times
how often the module runs; :mod:`.knapsack` then picks one choice of each group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from ..checkpoint.typed import Source
from ..errors import BudgetError, SourceError, StatsError
from ..formats.registry import bits_of
from ..planning.planner import make_plan
from ..planning.types import Plan
from ..recipe.recipe import Recipe, Rule
from ..recipe.sources import Sources
from ..text import human, some
from .activity import Activity
from .choices import Choices, Group, Option, Request
from .distortion import Distortion, DistortionCache, comparer_on, measure
from .knapsack import Frontier, Solution, frontier, solve
from .lines import recipe_lines
from .measured import scaled
from .objective import Objective

if TYPE_CHECKING:
    from ..storage.threads import Progress
    from .comparing import Comparer

__all__ = ["Suggestion", "Uniform", "suggest"]


@dataclass(frozen=True, slots=True)
class Uniform:
    """A mix that is all from one source where possible; elsewhere from the base recipe's, or from the best one."""

    source: str
    nbytes: int
    loss: float
    elsewhere: int
    """Number of groups that the source does not have."""


@dataclass(frozen=True, slots=True, eq=False)
class Suggestion:
    """The mix that was chosen, and its alternatives. Bytes are those of files, headers included."""

    plan: Plan
    request: Request
    objective: Objective
    groups: tuple[Group, ...]
    solution: Solution
    nbytes: int
    frontier: Frontier
    uniform: tuple[Uniform, ...]
    lines: tuple[tuple[str, tuple[Rule, ...]], ...]
    """Blocks of the recipe's ``weights:``: a comment and its rules."""
    notes: tuple[str, ...]
    exponent: float
    """Losses of swaps count to this power, see :meth:`.Swaps.exponent`; 1 for other objectives."""

    def picked(self) -> Iterable[tuple[Group, Option]]:
        """Yields each group with the option that was chosen for it."""
        for group, pick in zip(self.groups, self.solution.picks, strict=True):
            yield group, group.options[group.allowed[pick]]


def suggest(
    recipe: Recipe,
    sources: Sources,
    request: Request,
    cache: DistortionCache,
    *,
    device: str = "auto",
    jobs: int | None = None,
    watch: Callable[[int], Progress] | None = None,
) -> Suggestion:
    """Measures what each choice loses, and picks the mix of least loss within the budget.

    Args:
        device: where errors are measured, as :func:`~.distortion.comparer_on` has it.
        jobs: measuring threads.
        watch: called with the bytes to be measured; returns the function that is called with bytes as they are done.

    Raises:
        BudgetError: the smallest mix is larger than the budget.
        DeviceError: there is no GPU for the ``device`` that was asked for.
        RecipeError: a pin or floor matches nothing or cannot be met.
        SourceError, StatsError, RefusedError: see their docstrings.
    """
    comparer = partial(comparer_on, device)
    if device == "cuda":
        comparer()  # refuses at once; else the GPU is looked for when there is something to measure
    unscaled = Objective.RELATIVE_OUTPUT if request.moments else Objective.RELATIVE
    objective = request.objective or (Objective.MEASURED if request.swaps else unscaled)
    if objective.needs_moments and request.moments is None:
        raise SourceError(
            f"--objective {objective.value} weighs errors by the inputs' second moments; give --moments FILE, or take "
            "`relative` or `weight`"
        )
    if objective is Objective.MEASURED and request.swaps is None:
        raise SourceError(
            "--objective measured needs the losses of measured swaps; give --swaps FILE, which recipes/swaps.py "
            "writes, or take another objective"
        )
    choices = Choices(recipe, sources, request)
    frequencies = _frequencies(choices, request.activity)
    costs = [[group.options[i].nbytes for i in group.allowed] for group in choices.groups]

    def planned(
        groups: Sequence[Group], solution: Solution
    ) -> tuple[Plan, int, tuple[tuple[str, tuple[Rule, ...]], ...]]:
        lines = recipe_lines(groups, solution, choices)
        rules = tuple(rule for _, block in lines for rule in block)
        plan = make_plan(replace(recipe, rules=rules), sources, allow_unservable=request.allow_unservable)
        return plan, sum(shard.file_bytes(sources) for shard in plan.shards), lines

    least = sum(map(min, costs))
    if choices.fixed_bytes + least > request.budget:  # known before anything is measured
        raise _over_budget(planned(choices.groups, solve(costs, costs, least))[1], request.budget)
    weighed_by = unscaled if objective is Objective.MEASURED else objective
    groups = _weighed(choices, frequencies, request, weighed_by, cache, comparer, jobs, watch)
    notes, exponent = list(choices.notes), 1.0
    if objective is Objective.MEASURED and request.swaps is not None:
        exponent = request.swaps.exponent()
        groups, more = scaled(groups, request.swaps, list(sources.by_name), exponent)
        notes += more
    losses = [[group.options[i].loss for i in group.allowed] for group in groups]
    overhead = 0  # of headers, known once there is a plan
    while True:
        room = request.budget - choices.fixed_bytes - overhead
        solution = solve(costs, losses, max(room, least))
        plan, total, lines = planned(groups, solution)
        exact = total - solution.cost - choices.fixed_bytes
        if total <= request.budget:
            break
        if room <= least:
            raise _over_budget(total, request.budget)
        overhead = max(exact, overhead + 1)
    if all(row[pick] == min(row) for row, pick in zip(losses, solution.picks, strict=True)) and total < request.budget:
        notes.append(
            f"the budget of {human(request.budget)} is more than is of use: this mix, of {human(total)}, already loses "
            "least at every module"
        )
    line = frontier(costs, losses)
    beside = choices.fixed_bytes + exact
    return Suggestion(
        plan=plan,
        request=request,
        objective=objective,
        groups=tuple(groups),
        solution=solution,
        nbytes=total,
        frontier=Frontier(line.cost + beside, line.loss),
        uniform=tuple(_uniform(source, groups, choices, beside) for source in sources.by_name),
        lines=lines,
        notes=tuple(notes),
        exponent=exponent,
    )


def _over_budget(smallest: int, budget: int) -> BudgetError:
    return BudgetError(
        f"the smallest mix that these sources, pins and floors allow is {smallest:,} bytes ({human(smallest)}), the "
        f"budget {budget:,} ({human(budget)}); give --budget {smallest} or more, or a source with fewer bits"
    )


def _weighed(
    choices: Choices,
    frequencies: Mapping[str, float],
    request: Request,
    objective: Objective,
    cache: DistortionCache,
    comparer: Callable[[], Comparer],
    jobs: int | None,
    watch: Callable[[int], Progress] | None,
) -> list[Group]:
    """The groups with losses, errors, frequencies and powers filled in."""
    references: dict[str, Source] = {}
    wanted: dict[str, tuple[Source, list[Source]]] = {}
    lowered: Counter[tuple[str, str]] = Counter()
    for group in choices.groups:
        for member in group.members:
            references[member] = reference = choices.reference(member)
            kind = reference.format_of(member).kind
            if bits_of(kind) < 16:
                lowered[reference.name, kind] += 1
            others = [choices.sources.by_name[option.source] for option in group.options]
            wanted[member] = (reference, [s for s in others if s.checkpoint is not reference.checkpoint])
    for (source, kind), count in lowered.items():
        choices.notes.append(
            f"no source holds {count} modules in 16 bits: their errors are measured against `{source}` ({kind}), which "
            "counts as exact"
        )
    total = sum(s.checkpoint.modules[name].nbytes for name, (_, others) in wanted.items() for s in others)
    progress = None if watch is None else watch(total)
    measured = measure(wanted, cache, moments=request.moments, jobs=jobs, progress=progress, comparer=comparer)
    powers = {name: distortion for (name, _), distortion in measured.items()}
    # The signal of an expert's projection is summed over all experts of its layer.
    signal: Counter[tuple[int | None, str]] = Counter()
    for group in choices.groups:
        for member in group.members:
            if member in powers:
                _, power = _error_and_power(powers[member], objective)
                signal[_place(group, member)] += frequencies[group.name] * power  # type: ignore[assignment]
    out = []
    for group in choices.groups:
        frequency = frequencies[group.name]
        options = []
        for option in group.options:
            loss = error = 0.0
            for member in group.members:
                distortion = measured.get((member, option.source))
                if distortion is None:  # the reference itself
                    continue
                lost, _ = _error_and_power(distortion, objective)
                share = signal[_place(group, member)] if objective.relative else 1.0
                loss += frequency * lost / share if share else lost
                error += distortion.error
            options.append(replace(option, loss=loss, error=error))
        power = sum(powers[member].power for member in group.members if member in powers)
        out.append(replace(group, options=tuple(options), frequency=frequency, power=power))
    return out


def _place(group: Group, member: str) -> tuple[int | None, str]:
    return (group.layer, f"experts.{member.rpartition('.')[2]}") if group.column == "experts" else (None, member)


def _error_and_power(distortion: Distortion, objective: Objective) -> tuple[float, float]:
    if objective.needs_moments:
        assert distortion.output_error is not None and distortion.output_power is not None
        return distortion.output_error, distortion.output_power
    return distortion.error, distortion.power


def _frequencies(choices: Choices, activity: Activity | None) -> dict[str, float]:
    """Group -> the share of tokens that it runs for."""
    experts: Counter[int | None] = Counter(group.layer for group in choices.groups if group.column == "experts")
    top_k = choices.sources.model.facts.experts_per_token
    if experts and top_k is None:
        choices.notes.append("config.json has no num_experts_per_tok: a token is taken to go to one expert")
    k = top_k or 1
    if activity is not None:
        _check_activity(activity, experts, choices)
    out = {}
    for group in choices.groups:
        frequency = 1.0
        if group.column == "experts" and group.layer is not None:
            number = int(group.name.rpartition(".")[2])
            known = activity is not None and group.layer in activity.counts
            frequency = (
                activity.frequency(group.layer, number, k)
                if activity is not None and known
                else min(1.0, k / experts[group.layer])
            )
        out[group.name] = frequency
    return out


def _check_activity(activity: Activity, experts: Mapping[int | None, int], choices: Choices) -> None:
    layers = {layer for layer in experts if layer is not None}
    unknown_layers = sorted(activity.counts.keys() - layers)
    for layer, counts in activity.counts.items():
        if layer in layers and counts[experts[layer] :].any():
            raise StatsError(
                f"the activity counts expert {len(counts) - 1} of layer {layer}, and the model has {experts[layer]} "
                "there: it is another model's"
            )
    if unknown_layers:
        raise StatsError(
            f"the activity counts experts of layer {unknown_layers[0]}, where the model has none: it is another model's"
        )
    missing = sorted(layers - activity.counts.keys())
    if missing:
        choices.notes.append(
            f"the activity does not cover layers {some(list(map(str, missing)))}: their experts count alike"
        )


def _uniform(source: str, groups: Sequence[Group], choices: Choices, beside: int) -> Uniform:
    nbytes, loss, elsewhere = beside, 0.0, 0
    for group in groups:
        by_source = {option.source: option for option in group.options}
        option = by_source.get(source)
        if option is None:
            elsewhere += 1
            base = choices.base[group.members[0]].source
            option = by_source.get(base) or min(group.options, key=lambda option: option.loss)
        nbytes += option.nbytes
        loss += option.loss
    return Uniform(source, nbytes, loss, elsewhere)
