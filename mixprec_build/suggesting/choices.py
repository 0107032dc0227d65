"""Lists the choices of a suggested mix: groups of modules, and the sources that each group could come from.

An option is left out, with the reason, if SGLang could not run it, if it could not be cut for the ranks of the base
recipe, or if a pin or a floor excludes it. Modules without options stay as in the base recipe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..checkpoint.checkpoint import ValueReader
from ..checkpoint.degree import Degree
from ..checkpoint.typed import Source
from ..errors import RecipeError, RefusedError, SplitError
from ..families.base import EXPERTS_COLUMN
from ..families.names import last_word, layer_prefix
from ..families.parts import Role
from ..formats.registry import bits_of, kinds_of_word
from ..patterns.compress import compress
from ..patterns.pattern import Pattern, PatternError
from ..planning.choose import Chosen, choose
from ..planning.drafts import check_draft_formats, check_drafts
from ..planning.folding import Folding
from ..planning.planner import plan_modules
from ..planning.problems import Problems
from ..planning.rules import decided_groups, group_limits, offers, share_one_format
from ..planning.servable import check_same_weights, check_servable
from ..planning.stacked import why_kept
from ..planning.types import PlannedModule
from ..ranks.splitter import Splitter
from ..recipe.recipe import Recipe, Rule
from ..recipe.sources import Sources
from ..text import human, some
from .activity import Activity
from .distortion import Moments
from .objective import Objective
from .swaps import Swaps

__all__ = ["Choices", "Group", "Option", "Request"]


@dataclass(frozen=True, slots=True)
class Request:
    """Arguments of :func:`~.allocate.suggest`. ``budget`` is in bytes of the files to be written, headers included."""

    budget: int
    objective: Objective | None = None
    """None for ``measured`` with swaps, else ``relative-output`` with moments and ``relative`` without."""
    activity: Activity | None = None
    moments: Moments | None = None
    swaps: Swaps | None = None
    pins: Sequence[tuple[str, str]] = ()
    """``(pattern, source)``. As in recipes, an exact name beats a glob and the last matching glob decides. A pin that
    matches one member of a group applies to all."""
    floors: Sequence[tuple[str, str]] = ()
    """``(pattern, format)``: no format of fewer bits. A pin below a floor is refused."""
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
    """Modules that get one source."""

    name: str
    members: tuple[str, ...]
    column: str
    """Its place within a layer, the same in all layers: ``self_attn.qkv_proj``, ``experts``."""
    layer: int | None
    options: tuple[Option, ...]
    allowed: tuple[int, ...]
    """Indices of the options that pins, floors and ``output: {tp}`` allow."""
    reason: str = ""
    """The reason why only one option is allowed; empty if several are."""
    frequency: float = 1.0
    power: float = 0.0
    """‖W‖² of the group's weights."""


_ALTERNATIVES = (Role.LINEAR, Role.EXPERT)


class Choices:
    """The groups with their options, and the modules that stay as in the base recipe."""

    def __init__(self, recipe: Recipe, sources: Sources, request: Request):
        self.recipe, self.sources, self._family = recipe, sources, sources.family
        self.notes: list[str] = []
        chosen = choose(recipe, sources)
        self.base = plan_modules(chosen, recipe, sources)
        self._check_drafts(chosen)
        # Choices are written as globs, which apply only to modules that the default source has.
        in_default = sources.by_name[recipe.default].checkpoint.modules
        names = [
            name
            for name, module in self.base.items()
            if module.role in _ALTERNATIVES and len(module.shape) == 2 and name in in_default and not module.draft
        ]
        self.by_source: dict[str, Mapping[str, PlannedModule]] = {}
        for name, source in sources.by_name.items():
            mine = [n for n in names if offers(source, [n])]
            self.by_source[name] = plan_modules(chosen.assigned(dict.fromkeys(mine, source)), recipe, sources)
        self.groups: list[Group] = []
        self.kept: dict[str, list[str]] = {}
        """Reason why no source can be chosen -> linears that therefore stay as in the base recipe."""
        why, stacked = why_kept(sources.by_name[recipe.default], self.base, sources)
        if stacked:
            self.kept[why] = stacked
        self._cuttable: set[object] = set()
        with ValueReader({s.name: s.checkpoint for s in sources.by_name.values()}) as reader:
            if not request.allow_unservable:
                self._check_same_weights(reader)
            for name, members in decided_groups(names, self._family).items():
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

    def _check_drafts(self, chosen: Chosen) -> None:
        """Notes what draft layers come from, which is never chosen; refuses lost ones before hours of measuring."""
        problems = Problems(self.recipe)
        self.notes += check_drafts(self.base, chosen, self.recipe, self.sources, problems)
        found = problems.found()
        if found:
            raise RefusedError(found)
        self.notes += map(str, problems.warnings())
        drafts = [module for module in self.base.values() if module.draft]
        if drafts:
            by_source = Counter[str]()
            for module in drafts:
                by_source[module.source] += module.nbytes
            where = ", ".join(f"{human(nbytes)} from `{name}`" for name, nbytes in by_source.most_common())
            self.notes.append(f"draft layers (MTP): as in {self.recipe.path.name}, {where}, counted in the budget")

    def _check_same_weights(self, reader: ValueReader) -> None:
        """Refuses sources of different weights before hours of measuring."""
        problems = Problems(self.recipe)
        # Without modules no difference counts as folded scales: sources with these cannot be mixed module by module.
        folding = Folding((), self.sources, reader)
        norms = {n: m for n, m in self.base.items() if m.role is Role.NORM}
        for mine in self.by_source.values():
            check_same_weights({**norms, **mine}, self.sources, folding, problems)
        found = problems.found()
        if found:
            raise RefusedError(found)

    def _add_group(self, name: str, members: tuple[str, ...], request: Request, reader: ValueReader) -> None:
        options, reasons = [], []
        for source, modules in self.by_source.items():
            if not all(member in modules for member in members):
                reasons.append(self._why_not(source, [member for member in members if member not in modules]))
                continue
            parts = [modules[member] for member in members]
            limits = group_limits(parts, reader, self._family)
            if limits and (not request.allow_unservable or not share_one_format(parts, self._family)):
                reasons.append(f"from `{source}`: {limits[0]}")
                continue
            limit = self._cut_limit(parts)
            if limit is not None:
                reasons.append(f"from `{source}`: {limit.replace(layer_prefix(name), '')}")  # one reason for all layers
                continue
            kind = min((part.format.kind for part in parts), key=bits_of)
            options.append(Option(source, kind, sum(part.nbytes for part in parts)))
        if not options:
            self.kept.setdefault("; ".join(reasons), []).extend(members)
            return
        reason = "no other source can be chosen: " + "; ".join(reasons) if len(options) == 1 and reasons else ""
        layer, column = self._family.place_of(name)
        column = EXPERTS_COLUMN if self._family.is_expert(name) else column
        self.groups.append(Group(name, members, column, layer, tuple(options), tuple(range(len(options))), reason))

    def _why_not(self, source: str, members: Sequence[str]) -> str:
        formats = [self.sources.by_name[source].known_format(member) for member in members]
        kinds = sorted({fmt.kind for fmt in formats if fmt is not None})
        return f"`{source}` does not hold it" if None in formats else f"`{source}` holds it as {', '.join(kinds)}"

    def _check_fixed(self, request: Request, reader: ValueReader) -> None:
        """Refuses fixed modules that cannot be served, or cut for the recipe's ranks, before hours of measuring."""
        problems = Problems(self.recipe)
        if not request.allow_unservable:
            check_servable(self.fixed, self.sources, reader, Folding((), self.sources, reader), problems)
            check_draft_formats(self.fixed, self.sources, problems)
        found = problems.found()
        if found:
            raise RefusedError(found)
        limit = self._cut_limit(self.fixed.values())
        if limit is not None:
            raise RecipeError(limit, path=self.recipe.path, line=self.recipe.tp_line)

    def _fixed_rules(self, free: Collection[str]) -> tuple[Rule, ...]:
        """The base recipe's lines for fixed modules. A line that also matches others is narrowed to the fixed ones."""
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
                # Modules of the default source need a line only below another one that matches them.
                names = [name for name in names if any(other.pattern.matches(name) for other in rules)]
            rules += [
                Rule(_as_glob_unless_offered(pattern, source), source.name, rule.line) for pattern in compress(names)
            ]
        return tuple(rules)

    def _cut_limit(self, modules: Iterable[PlannedModule]) -> str | None:
        """The reason why modules cannot be cut for all degrees of ``output: {tp}``; None if they can."""
        if not self.recipe.tp:
            return None
        stored = {module.name: (module.format, module.stored) for module in modules}
        # Thousands of experts are alike: one of each kind is checked.
        key = tuple(
            (last_word(name), self._family.is_expert(name.rpartition(".")[0]), fmt, leaf, tensor.dtype, tensor.shape)
            for name, (fmt, module) in stored.items()
            for leaf, tensor in module.tensors.items()
        )
        if key in self._cuttable:
            return None
        for tp in self.recipe.tp:
            try:
                Splitter(stored, self.sources.model.facts, Degree(tp), part=True).total_bytes()
            except SplitError as error:
                return f"tp {tp}: {error}"
        self._cuttable.add(key)
        return None

    def _keep_dtypes_apart(self) -> None:
        """Leaves out options that differ in dtype from other experts of their layer and format.

        A rank's file stores these experts in one tensor.
        """
        if not self.recipe.tp:
            return
        homes: dict[tuple[str, object], tuple[str, object]] = {}
        fixed = self._family.fused_groups(name for name, module in self.fixed.items() if module.role is Role.EXPERT)
        for name, members in fixed.items():
            self._dtypes_beside(homes, name, [self.fixed[member] for member in members])
        # Groups with the fewest options first, so that pins decide.
        for at in sorted(range(len(self.groups)), key=lambda at: len(self.groups[at].allowed)):
            group = self.groups[at]
            if group.column != EXPERTS_COLUMN:
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

    def _dtypes_beside(
        self, homes: dict[tuple[str, object], tuple[str, object]], name: str, parts: Sequence[PlannedModule]
    ) -> str | None:
        """The source of an expert of the same layer and format with other dtypes; None if there is none.

        Records in ``homes`` the first expert of each layer and format.
        """
        by_name, found = {part.name: part for part in parts}, {}
        for gemm, members in self._family.gemms(by_name).items():
            mine = [by_name[member] for member in members]
            dtypes = frozenset(
                (p.format.sglang_name(leaf), t.info.dtype) for p in mine for leaf, t in p.tensors.items()
            )
            key = (f"{name.rpartition('.')[0]}.{gemm.rpartition('.')[2]}", mine[0].format.fuses_as)
            found[key] = (mine[0].source, dtypes)
            if homes.get(key, found[key])[1] != dtypes:
                return homes[key][0]
        homes |= {key: home for key, home in found.items() if key not in homes}
        return None

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
                what = "among them linears that have no choice" if kept & {*covered} else "norms, routers, embeddings"
                hint = f"; the {len(covered)} it matches ({what}) stay as the base has them"
            raise RecipeError(f"{wish} matches no module that has a choice{hint}")

    def _limited(self, group: Group, pins: Sequence[_Wish], floors: Sequence[_Wish]) -> Group:
        allowed, reason = list(group.allowed), group.reason
        below: dict[int, _Wish] = {}
        for floor in filter(lambda floor: floor.matches(group), floors):
            bits = min(map(bits_of, kinds_of_word(floor.word)))
            below |= {i: floor for i in allowed if bits_of(group.options[i].kind) < bits}
            allowed = [i for i in allowed if i not in below]
            if not allowed:
                raise RecipeError(f"{floor}: no source has {group.name} in as many bits; {_offers(group)}")
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
            raise RecipeError(f"{pin}: `{pin.word}` cannot be chosen for {group.name}; {_offers(group)}{why}")
        if mine[0] in below:
            kind = group.options[mine[0]].kind
            raise RecipeError(
                f"{pin} and {below[mine[0]]}: {group.name} is {kind} in `{pin.word}`, which has fewer bits; leave "
                "one of them out, or narrow its pattern"
            )
        return replace(group, allowed=tuple(mine), reason=f"asked for by {pin}")

    def reference(self, name: str) -> Source:
        """The source whose weights of a module count as exact: unquantized if possible, else of the most bits.

        Prefers the default source.
        """
        default = self.sources.by_name[self.recipe.default]
        holders = [s for s in (default, *self.sources.by_name.values()) if s.known_format(name) is not None]
        return max(holders, key=lambda source: min(16, bits_of(source.format_of(name).kind)))


class _Wish:
    """One ``--pin`` or ``--min-format``."""

    def __init__(self, pattern: str, word: str, flag: str, choices: Choices):
        self.word, self._flag = word, flag
        self.used = self.won = False
        try:
            self.pattern = Pattern(pattern.removesuffix(".weight"))
        except PatternError as error:
            raise RecipeError(f"{flag}: {error}") from error
        if flag == "--pin":
            if word not in choices.sources.by_name and not kinds_of_word(word):
                known = ", ".join(f"`{name}`" for name in choices.sources.by_name)
                raise RecipeError(f"{self}: no source is called `{word}`; there are {known}")
            self.word = choices.sources.resolve(word, choices.recipe, 0).name
        elif not kinds_of_word(word):
            raise RecipeError(f"{self}: `{word}` is no format; write int4, int8, fp8, fp16 or one of their kinds")

    def __str__(self) -> str:
        text = getattr(self, "pattern", None)
        return f'{self._flag} "{text.text if text else "?"}: {self.word}"'

    def matches(self, group: Group) -> bool:
        found = any(map(self.pattern.matches, group.members)) or self.pattern.matches(group.name)
        self.used |= found
        return found


def _as_glob_unless_offered(pattern: str, source: Source) -> Pattern:
    """``pattern`` for a line. A name that ``source`` does not offer becomes a glob, since a line with it is refused."""
    parsed = Pattern(pattern)
    if not parsed.exact or offers(source, [pattern]):
        return parsed
    head, dot, last = pattern.rpartition(".")
    return Pattern(f"{head}{dot}{{{last}}}")


def _offers(group: Group) -> str:
    return "it can be " + ", ".join(f"{option.kind} from `{option.source}`" for option in group.options)
