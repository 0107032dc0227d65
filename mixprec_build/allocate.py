"""Chooses a source for every module: the least expected loss within a budget of bytes.

A choice is one fused group (q/k/v, gate/up, the three projections of one expert) from one source. Its loss is what
:mod:`mixprec_build.distortion` measured, in the unit of an :class:`~mixprec_build.objective.Objective`, times how
often the module runs; :mod:`mixprec_build.knapsack` then picks one choice of each group.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from .activity import Activity
from .checkpoint import ValueReader
from .distortion import Distortion, DistortionCache, Moments, measure
from .errors import BudgetError, RecipeError, RefusedError, SourceError, SplitError, StatsError
from .folding import Folding
from .formats.registry import ALIASES
from .knapsack import Frontier, Solution, frontier, solve
from .model import Role, fused_groups, is_expert, layer_prefix, place_of
from .objective import Objective
from .patterns import Pattern, PatternError, compress
from .plan import Plan, PlannedModule, make_plan, plan_modules
from .presplit import Degree, Splitter
from .recipe import Recipe, Rule
from .report import human
from .servable import Problems, check_same_weights, check_servable, decided_groups, fuse, gives, group_limits, some
from .sources import Source, Sources

if TYPE_CHECKING:
    from .copier import Progress

__all__ = ["Group", "Option", "Request", "Suggestion", "Uniform", "suggest"]


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of :func:`suggest`. ``budget`` is the bytes of the files to be written, headers included."""

    budget: int
    objective: Objective | None = None
    """None for ``relative-output`` with moments and ``relative`` without."""
    activity: Activity | None = None
    moments: Moments | None = None
    pins: Sequence[tuple[str, str]] = ()
    """``(pattern, source)``; as in recipes an exact name beats a glob, and of globs the last. One that matches a part
    of a group means all of it."""
    floors: Sequence[tuple[str, str]] = ()
    """``(pattern, format)``: no format of fewer bits. A pin below one is refused."""
    allow_unservable: bool = False


@dataclass(frozen=True, slots=True)
class Option:
    """One source for a group."""

    source: str
    kind: str
    nbytes: int
    loss: float = 0.0
    error: float = 0.0
    """‖Δ‖² of the group's weights."""


@dataclass(frozen=True, slots=True)
class Group:
    """Modules that are decided together."""

    name: str
    members: tuple[str, ...]
    column: str
    """The same for all groups of one place in the layers: ``self_attn.qkv_proj``, ``experts``."""
    layer: int | None
    options: tuple[Option, ...]
    allowed: tuple[int, ...]
    """Numbers of the options that pins, floors and ``output: {tp}`` leave."""
    reason: str = ""
    """Why there is no choice; empty where there is."""
    frequency: float = 1.0
    power: float = 0.0
    """‖W‖² of the group's weights."""


@dataclass(frozen=True, slots=True)
class Uniform:
    """All from one source, where it can be; elsewhere what the base has, or loses least."""

    source: str
    nbytes: int
    loss: float
    elsewhere: int
    """Groups that it cannot give."""


@dataclass(frozen=True, slots=True, eq=False)
class Suggestion:
    """The mix that was chosen, and what it was chosen from. Bytes are those of files, headers included."""

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

    def picked(self) -> Iterable[tuple[Group, Option]]:
        for group, pick in zip(self.groups, self.solution.picks, strict=True):
            yield group, group.options[group.allowed[pick]]


def suggest(
    recipe: Recipe,
    sources: Sources,
    request: Request,
    cache: DistortionCache,
    *,
    jobs: int | None = None,
    watch: Callable[[int], Progress] | None = None,
) -> Suggestion:
    """Measures, weighs and chooses. ``watch`` is told the bytes to be measured and gives what to call on the way.

    Raises:
        BudgetError: the smallest mix is larger than the budget; with its bytes.
        RecipeError: a pin or floor that matches nothing or cannot be.
        SourceError, StatsError, RefusedError: see their docstrings.
    """
    objective = request.objective or (Objective.RELATIVE_OUTPUT if request.moments else Objective.RELATIVE)
    if objective.needs_moments and request.moments is None:
        raise SourceError(
            f"--objective {objective.value} weighs errors by the inputs' second moments; give --moments FILE, or take "
            "`relative` or `weight`"
        )
    choices = _Choices(recipe, sources, request)
    groups = _weighed(choices, request, objective, cache, jobs, watch)
    notes = list(choices.notes)
    costs = [[group.options[i].nbytes for i in group.allowed] for group in groups]
    losses = [[group.options[i].loss for i in group.allowed] for group in groups]

    def planned(solution: Solution) -> tuple[Plan, int, tuple[tuple[str, tuple[Rule, ...]], ...]]:
        lines = _lines(groups, solution, choices)
        rules = tuple(rule for _, block in lines for rule in block)
        plan = make_plan(replace(recipe, rules=rules), sources, allow_unservable=request.allow_unservable)
        return plan, sum(shard.file_bytes(sources) for shard in plan.shards), lines

    least = sum(map(min, costs))
    overhead = 0  # of headers, known once there is a plan
    while True:
        room = request.budget - choices.fixed_bytes - overhead
        solution = solve(costs, losses, max(room, least))
        plan, total, lines = planned(solution)
        exact = total - solution.cost - choices.fixed_bytes
        if total <= request.budget:
            break
        if room <= least:
            raise BudgetError(
                f"the smallest mix that these sources, pins and floors allow is {total:,} bytes ({human(total)}), the "
                f"budget {request.budget:,} ({human(request.budget)}); give --budget {total} or more, or a source with "
                "fewer bits"
            )
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
    )


# What there is to choose from


_ALTERNATIVES = (Role.LINEAR, Role.EXPERT)


class _Choices:
    """The groups with their options, and the modules that stay as the base has them."""

    def __init__(self, recipe: Recipe, sources: Sources, request: Request):
        self.recipe, self.sources = recipe, sources
        self.notes: list[str] = []
        self.base = plan_modules(recipe, sources)
        # A line for what the default source lacks has to name it, and a choice is written in globs.
        held = sources.by_name[recipe.default].checkpoint.modules
        names = [n for n, m in self.base.items() if m.role in _ALTERNATIVES and len(m.shape) == 2 and n in held]
        self.by_source: dict[str, dict[str, PlannedModule]] = {}
        for name, source in sources.by_name.items():
            mine = [n for n in names if gives(source, [n])]
            rules = tuple(Rule(Pattern(pattern), name, source.line) for pattern in compress(mine))
            planned = plan_modules(replace(recipe, rules=rules, default=recipe.default), sources)
            self.by_source[name] = {n: planned[n] for n in mine}
        self.groups: list[Group] = []
        self.kept: dict[str, list[str]] = {}
        """Why no source can be chosen -> linears that stay as the base has them for it."""
        self._cuttable: set[object] = set()
        with ValueReader({s.name: s.checkpoint for s in sources.by_name.values()}) as reader:
            if not request.allow_unservable:
                self._check_same_weights(reader)
            for name, members in decided_groups(names).items():
                self._add_group(name, tuple(members), request, reader)
            free = {n for group in self.groups for n in group.members}
            self.fixed = {name: module for name, module in self.base.items() if name not in free}
            self._check_fixed(request, reader)
        self.notes += [
            f"{some(compress(kept))}: as in {recipe.path.name}, for no source can be chosen: {why}"
            for why, kept in self.kept.items()
        ]
        if not self.groups:
            raise RecipeError("there are no linears to choose sources for", path=recipe.path)
        self.fixed_bytes = sum(module.nbytes for module in self.fixed.values())
        self.rules = self._fixed_rules(free)
        self._limit(request)
        self._keep_dtypes_apart()

    def _check_same_weights(self, reader: ValueReader) -> None:
        """Before hours of measuring: are all sources that can be chosen one model's?"""
        problems = Problems(self.recipe)
        # Asked of no modules: where sources are mixed module by module, norms must not even hold folded scales.
        folding = Folding((), self.sources, reader)
        norms = {n: m for n, m in self.base.items() if m.role is Role.NORM}
        for mine in self.by_source.values():
            check_same_weights({**norms, **mine}, self.sources, folding, problems)
        found = problems.found()
        if found:
            raise RefusedError([problem.text for problem in found])

    def _add_group(self, name: str, members: tuple[str, ...], request: Request, reader: ValueReader) -> None:
        options, reasons = [], []
        for source, modules in self.by_source.items():
            if not all(member in modules for member in members):
                reasons.append(self._why_not(source, [member for member in members if member not in modules]))
                continue
            parts = [modules[member] for member in members]
            limits = group_limits(parts, reader)
            if limits and (not request.allow_unservable or not fuse(parts)):
                reasons.append(f"from `{source}`: {limits[0]}")
                continue
            limit = self._cut_limit(parts)
            if limit is not None:
                reasons.append(f"from `{source}`: {limit.replace(layer_prefix(name), '')}")  # the same in all layers
                continue
            kind = min((part.format.kind for part in parts), key=_bits)
            options.append(Option(source, kind, sum(part.nbytes for part in parts)))
        if not options:
            self.kept.setdefault("; ".join(reasons), []).extend(members)
            return
        reason = "no other source can give it: " + "; ".join(reasons) if len(options) == 1 and reasons else ""
        layer, column = place_of(name)
        column = "experts" if is_expert(name) else column
        self.groups.append(Group(name, members, column, layer, tuple(options), tuple(range(len(options))), reason))

    def _why_not(self, source: str, members: Sequence[str]) -> str:
        formats = [self.sources.by_name[source].known_format(member) for member in members]
        kinds = sorted({fmt.kind for fmt in formats if fmt is not None})
        return f"`{source}` does not hold it" if None in formats else f"`{source}` holds it as {', '.join(kinds)}"

    # What stays as the base has it

    def _check_fixed(self, request: Request, reader: ValueReader) -> None:
        """Before hours of measuring: can it be served, and cut for the ranks that the base asks for?"""
        problems = Problems(self.recipe)
        if not request.allow_unservable:
            check_servable(self.fixed, self.sources, reader, Folding((), self.sources, reader), problems)
        found = problems.found()
        if found:
            raise RefusedError([problem.text for problem in found])
        limit = self._cut_limit(self.fixed.values())
        if limit is not None:
            raise RecipeError(limit, path=self.recipe.path, line=self.recipe.tp_line)

    def _fixed_rules(self, free: Collection[str]) -> tuple[Rule, ...]:
        """The base's lines for it; of a line that also matches what is chosen here, what is left."""
        decided: dict[Rule, list[str]] = {}
        for name, module in self.fixed.items():
            if module.rule is not None:
                decided.setdefault(module.rule, []).append(name)
        rules: list[Rule] = []
        for rule in self.recipe.rules:
            names = decided.get(rule)
            if not names:
                continue
            if rule.pattern.exact or not any(map(rule.pattern.matches, free)):
                rules.append(rule)
                continue
            source = self.sources.by_name[self.fixed[names[0]].source]
            if source.name == self.recipe.default:
                # What comes from there anyway needs a line only below one that says otherwise.
                names = [name for name in names if any(other.pattern.matches(name) for other in rules)]
            rules += [Rule(_promising(pattern, source), source.name, rule.line) for pattern in compress(names)]
        return tuple(rules)

    # Files cut for ranks

    def _cut_limit(self, modules: Iterable[PlannedModule]) -> str | None:
        """Why they cannot be cut for all degrees of the base's ``output: {tp}``."""
        if not self.recipe.tp:
            return None
        stored = {module.name: (module.format, module.stored) for module in modules}
        # Experts are many and alike.
        key = tuple(
            (name.rpartition(".")[2], is_expert(name.rpartition(".")[0]), fmt, leaf, tensor.dtype, tensor.shape)
            for name, (fmt, module) in stored.items()
            for leaf, tensor in module.tensors.items()
        )
        if key in self._cuttable:
            return None
        for tp in self.recipe.tp:
            try:
                Splitter(stored, self.sources.model.config, Degree(tp), part=True).total_bytes()
            except SplitError as error:
                return f"tp {tp}: {error}"
        self._cuttable.add(key)
        return None

    def _keep_dtypes_apart(self) -> None:
        """A rank's file holds a layer's experts of one format in one tensor: leaves no options that differ in dtype."""
        if not self.recipe.tp:
            return
        homes: dict[tuple[str, object], tuple[str, object]] = {}
        fixed = fused_groups(name for name, module in self.fixed.items() if module.role is Role.EXPERT)
        for name, members in fixed.items():
            self._dtypes_beside(homes, name, [self.fixed[member] for member in members])
        # Those with the least choice first: pins have their say.
        for at in sorted(range(len(self.groups)), key=lambda at: len(self.groups[at].allowed)):
            group = self.groups[at]
            if group.column != "experts":
                continue
            sources = {i: group.options[i].source for i in group.allowed}
            default_first = sorted(sources.items(), key=lambda item: item[1] != self.recipe.default)
            beside = {
                i: self._dtypes_beside(homes, group.name, [self.by_source[source][member] for member in group.members])
                for i, source in default_first
            }
            allowed = tuple(i for i in group.allowed if beside[i] is None)
            others = ", ".join(
                f"`{sources[i]}` has other dtypes than `{other}`" for i, other in beside.items() if other
            )
            why = f"{others} for experts beside it, and a rank's file holds those of one format as one tensor"
            if not allowed:
                experts = f"{group.name.rpartition('.')[0]}.*"
                raise RecipeError(
                    f"{group.name}: {why}; pin all of {experts} to one of them, those that a pin names by name, too, "
                    "or leave out tp",
                    path=self.recipe.path,
                    line=self.recipe.tp_line,
                )
            if others:
                reason = why if len(allowed) == 1 else group.reason
                self.groups[at] = replace(group, allowed=allowed, reason=reason)

    @staticmethod
    def _dtypes_beside(
        homes: dict[tuple[str, object], tuple[str, object]], name: str, parts: Sequence[PlannedModule]
    ) -> str | None:
        """The source of an expert in the same layer and format with other dtypes; ``homes`` has the first of each."""
        dtypes = frozenset((p.format.held_as(leaf), t.info.dtype) for p in parts for leaf, t in p.tensors.items())
        key = (name.rpartition(".")[0], parts[0].format.fuses_as)
        source, taken = homes.setdefault(key, (parts[0].source, dtypes))
        return None if taken == dtypes else source

    # Pins and floors

    def _limit(self, request: Request) -> None:
        pins = [_Wish(pattern, word, "--pin", self) for pattern, word in request.pins]
        pins.sort(key=lambda pin: pin.pattern.exact)  # the last one that matches decides
        floors = [_Wish(pattern, word, "--min-format", self) for pattern, word in request.floors]
        self.groups = [self._limited(group, pins, floors) for group in self.groups]
        kept = {name for names in self.kept.values() for name in names}
        for wish in (*pins, *floors):
            if wish.used:
                if wish in pins and not wish.won:
                    self.notes.append(f"{wish} never wins: later or exact ones decide all it matches")
                continue
            covered = [name for name in self.base if wish.pattern.matches(name)]
            hint = "; see `mixprec inspect` for names"
            if covered:
                what = (
                    "among them linears that no source can give" if kept & {*covered} else "norms, routers, embeddings"
                )
                hint = f"; the {len(covered)} it matches ({what}) stay as the base has them"
            raise RecipeError(f"{wish} matches no module that has a choice{hint}")

    def _limited(self, group: Group, pins: Sequence[_Wish], floors: Sequence[_Wish]) -> Group:
        allowed, reason = list(group.allowed), group.reason
        below: dict[int, _Wish] = {}
        for floor in filter(lambda floor: floor.matches(group), floors):
            bits = min(map(_bits, ALIASES[floor.word]))
            below |= {i: floor for i in allowed if _bits(group.options[i].kind) < bits}
            allowed = [i for i in allowed if i not in below]
            if not allowed:
                raise RecipeError(f"{floor}: no source gives {group.name} in as many bits; {_offers(group)}")
            if len(allowed) == 1 and len(group.options) > 1:
                reason = f"asked for by {floor}"
        matching = [pin for pin in pins if pin.matches(group)]
        if not matching:
            return replace(group, allowed=tuple(allowed), reason=reason)
        pin = matching[-1]
        pin.won = True
        for other in matching:
            if other.pattern.exact and other.word != pin.word:
                together = f"{some(compress(group.members))} are decided together, for SGLang runs them as one"
                raise RecipeError(f"{other} and {pin}: {together}; pin them to one source")
        mine = [i for i, option in enumerate(group.options) if option.source == pin.word]
        if not mine:
            why = f". {group.reason}" if group.reason else ""
            raise RecipeError(f"{pin}: `{pin.word}` cannot give {group.name}; {_offers(group)}{why}")
        if mine[0] in below:
            kind = group.options[mine[0]].kind
            raise RecipeError(
                f"{pin} and {below[mine[0]]}: {group.name} is {kind} in `{pin.word}`, which has fewer bits; leave "
                "one of them out, or narrow its pattern"
            )
        return replace(group, allowed=tuple(mine), reason=f"asked for by {pin}")

    # References

    def reference(self, name: str) -> Source:
        """The unquantized source of a module, the base's default before others; else the one of the most bits."""
        default = self.sources.by_name[self.recipe.default]
        holders = [s for s in (default, *self.sources.by_name.values()) if s.known_format(name) is not None]
        return max(holders, key=lambda source: min(16, _bits(source.format_of(name).kind)))


class _Wish:
    """``--pin`` or ``--min-format``, one of them."""

    def __init__(self, pattern: str, word: str, flag: str, choices: _Choices):
        self.word, self._flag = word, flag
        self.used = self.won = False
        try:
            self.pattern = Pattern(pattern.removesuffix(".weight"))
        except PatternError as error:
            raise RecipeError(f"{flag}: {error}") from error
        if flag == "--pin":
            if word not in choices.sources.by_name and word not in ALIASES:
                known = ", ".join(f"`{name}`" for name in choices.sources.by_name)
                raise RecipeError(f"{self}: no source is called `{word}`; there are {known}")
            self.word = choices.sources.resolve(word, choices.recipe, 0).name
        elif word not in ALIASES:
            raise RecipeError(f"{self}: `{word}` is no format; write int4, int8, fp8, fp16 or one of their kinds")

    def __str__(self) -> str:
        text = getattr(self, "pattern", None)
        return f'{self._flag} "{text.text if text else "?"}: {self.word}"'

    def matches(self, group: Group) -> bool:
        found = any(map(self.pattern.matches, group.members)) or self.pattern.matches(group.name)
        self.used |= found
        return found


def _promising(pattern: str, source: Source) -> Pattern:
    """``pattern`` for a line; a name that ``source`` does not hold as what it is called, as a glob: an exact name would
    promise that."""
    parsed = Pattern(pattern)
    if not parsed.exact or gives(source, [pattern]):
        return parsed
    head, dot, last = pattern.rpartition(".")
    return Pattern(f"{head}{dot}{{{last}}}")


def _offers(group: Group) -> str:
    return "it can be " + ", ".join(f"{option.kind} from `{option.source}`" for option in group.options)


def _bits(kind: str) -> int:
    """``fp8_block`` -> 8."""
    found = re.search(r"\d+", kind)
    return int(found[0]) if found else 32


# What each choice loses


def _weighed(
    choices: _Choices,
    request: Request,
    objective: Objective,
    cache: DistortionCache,
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
            if _bits(kind) < 16:
                lowered[reference.name, kind] += 1
            others = [choices.sources.by_name[option.source] for option in group.options]
            wanted[member] = (reference, [s for s in others if s.checkpoint is not reference.checkpoint])
    for (source, kind), count in lowered.items():
        choices.notes.append(
            f"no source holds {count} modules in 16 bits: their errors are measured against `{source}` ({kind}), which "
            "counts as exact"
        )
    total = sum(s.checkpoint.modules[name].nbytes for name, (_, others) in wanted.items() for s in others)
    measured = measure(
        wanted, cache, moments=request.moments, jobs=jobs, progress=None if watch is None else watch(total)
    )
    powers = {name: distortion for (name, _), distortion in measured.items()}
    frequencies = _frequencies(choices, request.activity)
    # Signal: of one dense module, and of a projection over all experts of its layer.
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


def _frequencies(choices: _Choices, activity: Activity | None) -> dict[str, float]:
    """Group -> the share of tokens that it runs for."""
    experts: Counter[int | None] = Counter(group.layer for group in choices.groups if group.column == "experts")
    config = choices.sources.model.config
    text = config.get("text_config")
    top_k = (
        {**config, **text}.get("num_experts_per_tok") if isinstance(text, dict) else config.get("num_experts_per_tok")
    )
    if experts and not (isinstance(top_k, int) and top_k > 0):
        choices.notes.append("config.json has no num_experts_per_tok: a token is taken to go to one expert")
    k = top_k if isinstance(top_k, int) and top_k > 0 else 1
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


def _check_activity(activity: Activity, experts: Mapping[int | None, int], choices: _Choices) -> None:
    layers = {layer for layer in experts if layer is not None}
    strangers = sorted(activity.counts.keys() - layers)
    for layer, counts in activity.counts.items():
        if layer in layers and counts[experts[layer] :].any():
            raise StatsError(
                f"the activity counts expert {len(counts) - 1} of layer {layer}, and the model has {experts[layer]} "
                "there: it is another model's"
            )
    if strangers:
        raise StatsError(
            f"the activity counts experts of layer {strangers[0]}, where the model has none: it is another model's"
        )
    missing = sorted(layers - activity.counts.keys())
    if missing:
        choices.notes.append(
            f"the activity does not cover layers {some(list(map(str, missing)))}: their experts count alike"
        )


# The lines of the recipe


def _lines(groups: Sequence[Group], solution: Solution, choices: _Choices) -> tuple[tuple[str, tuple[Rule, ...]], ...]:
    """For each column what most of it is, in one line, then the others; every line matches what it means only."""
    default = choices.recipe.default
    blocks: list[tuple[str, tuple[Rule, ...]]] = []
    if choices.rules:
        blocks.append((f"as in {choices.recipe.path.name}", choices.rules))
    columns: dict[str, list[tuple[Group, Option]]] = {}
    for group, pick in zip(groups, solution.picks, strict=True):
        columns.setdefault(group.column, []).append((group, group.options[group.allowed[pick]]))
    for column, picked in columns.items():
        counts = Counter(option.source for _, option in picked)
        # Ties go to the default, which needs no line.
        usual = max(counts, key=lambda source: (counts[source], source == default))
        order = [usual, *(source for source in counts if source != usual)]
        for source in order:
            mine = [(group, option) for group, option in picked if option.source == source]
            covers = picked if source == usual else mine
            if source == default and source == usual:
                rules = []
            else:
                rules = [Rule(Pattern(p), source, 0) for p in _patterns(column, [group for group, _ in covers])]
            blocks.append((_comment(column, mine, len(picked), solution), tuple(rules)))
    return tuple(blocks)


def _patterns(column: str, groups: Sequence[Group]) -> list[str]:
    if column == "experts":
        return [f"{pattern}.*" for pattern in compress(group.name for group in groups)]
    return compress(member for group in groups for member in group.members)


def _comment(column: str, mine: Sequence[tuple[Group, Option]], of: int, solution: Solution) -> str:
    """What a block holds and why."""
    options = [option for _, option in mine]
    kinds = ", ".join(sorted({option.kind for option in options}))
    nbytes = sum(option.nbytes for option in options)
    loss = sum(option.loss for option in options)
    share = loss / solution.loss if solution.loss else 0.0
    power = sum(group.power for group, _ in mine)
    relative = (sum(option.error for option in options) / power) ** 0.5 if power else 0.0
    text = (
        f"{column}: {len(mine):,} of {of:,} {kinds} from {options[0].source}, {human(nbytes)}, "
        f"{share:.1%} of the loss, ‖Ŵ−W‖/‖W‖ {relative:.4f}"
    )
    if column == "experts":
        text += f"; {sum(g.frequency for g, _ in mine) / len(mine):.2%} of the tokens each"
    reasons = Counter(group.reason or _why(group, option) for group, option in mine)
    return text + "".join(f"\n{count:,} of them: {reason}" for reason, count in reasons.most_common(4))


def _why(group: Group, option: Option) -> str:
    losses = [group.options[i].loss for i in group.allowed]
    sizes = [group.options[i].nbytes for i in group.allowed]
    if len(losses) == 1:
        return "there is no other source"
    smallest = option.nbytes <= min(sizes)
    if option.loss <= min(losses):
        return (
            "no other source loses less here, and none is smaller"
            if smallest
            else "the source that loses least; its bytes save more loss here than they would elsewhere"
        )
    return (
        "the smallest source; a larger one would save more loss elsewhere for the same bytes"
        if smallest
        else "a source in between; a smaller one would lose too much for the bytes it frees, a larger one would save "
        "too little loss for the bytes it takes"
    )


# What else there would be


def _uniform(source: str, groups: Sequence[Group], choices: _Choices, beside: int) -> Uniform:
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
