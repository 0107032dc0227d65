"""Recipe + sources -> :class:`Plan`: which tensor comes from where and lies where. Nothing is written here."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import NamedTuple

from .checkpoint import StoredModule, ValueReader, split_name
from .errors import RecipeError, RefusedError, SplitError
from .folding import Folding
from .formats.base import Format
from .formats.registry import ALIASES
from .header import MOST_TENSORS, TensorInfo, build_header
from .model import FAMILIES, FUSED, Role, role_by_name, role_of
from .patterns import compress, natural_key
from .presplit import Degree, Splitter
from .recipe import Recipe, Rule
from .servable import Mend, Problems, check_servable, counted, gives, half_only, some
from .sources import Source, Sources

__all__ = ["LeftOut", "Plan", "PlannedModule", "PlannedShard", "PlannedTensor", "RuleUse", "make_plan", "plan_modules"]


class PlannedTensor(NamedTuple):
    """A tensor of the output: ``info`` is where its bytes lie in ``source``."""

    source: str
    info: TensorInfo


class PlannedModule(NamedTuple):
    """A module of the output. ``rule`` is the recipe line that chose its source, None for the default.

    ``follows`` marks norms and routers that come along with the modules that a norm feeds.
    """

    name: str
    role: Role
    format: Format
    source: str
    rule: Rule | None
    shape: tuple[int, ...]
    tensors: Mapping[str, PlannedTensor]
    follows: bool = False

    @property
    def stored(self) -> StoredModule:
        return StoredModule(self.name, {leaf: tensor.info for leaf, tensor in self.tensors.items()})

    @property
    def nbytes(self) -> int:
        return sum([tensor.info.nbytes for tensor in self.tensors.values()])


@dataclass(frozen=True)
class PlannedShard:
    """One file of the output. ``link`` names the source's file where it is taken over whole."""

    file: str
    tensors: tuple[PlannedTensor, ...]
    link: tuple[str, str] | None = None
    """(source, file)"""

    @cached_property
    def header(self) -> bytes:
        """All before the data section, for a shard that is not linked."""
        return build_header((*tensor.info[:3], tensor.info.nbytes) for tensor in self.tensors)

    @property
    def data_bytes(self) -> int:
        return sum([tensor.info.nbytes for tensor in self.tensors])

    def file_bytes(self, sources: Sources) -> int:
        """The size of the file, header included."""
        if self.link is not None:
            return sources.by_name[self.link[0]].checkpoint.shards[self.link[1]].size
        return len(self.header) + self.data_bytes


@dataclass(frozen=True, slots=True)
class RuleUse:
    """How many modules a line of the recipe matches, and how many it decides."""

    rule: Rule
    matched: int
    won: int


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Tensors of a source that the output does not hold, and why."""

    source: str
    reason: str
    tensors: int
    nbytes: int
    modules: tuple[str, ...]
    """Patterns."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """All that a build will do."""

    recipe: Recipe
    sources: Sources
    modules: Mapping[str, PlannedModule]
    shards: tuple[PlannedShard, ...]
    rules: tuple[RuleUse, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    unservable: tuple[str, ...] = field(default=())
    """What SGLang could not serve, allowed by the user."""
    presplit: Mapping[str, int] = field(default_factory=dict)
    """Degree that files are cut for, as ``tp4-ep1`` -> their bytes."""

    @property
    def tensor_bytes(self) -> int:
        return sum(shard.data_bytes for shard in self.shards)

    @property
    def written_bytes(self) -> int:
        """Of tensors, in the files cut for ranks as well."""
        return self.tensor_bytes + sum(self.presplit.values())


def make_plan(recipe: Recipe, sources: Sources, *, allow_unservable: bool = False, link: bool = False) -> Plan:
    """Decides everything and checks it.

    Raises:
        RecipeError: a name that no source has, a word that no source answers to.
        SourceError: a module that is needed is damaged or in a format that is not read.
        RefusedError: the mix cannot be, or SGLang could not serve it and ``allow_unservable`` is not set.
    """
    planner = _Planner(recipe, sources)
    planner.choose()
    planner.check_same_model()
    with ValueReader({s.name: s.checkpoint for s in sources.by_name.values()}) as reader:
        folding = Folding(planner.chosen, sources, reader)
        planner.follow(folding)
        modules = planner.collect()
        problems = planner.problems
        if not problems.found():
            planner.check_biases(modules, reader)
            check_servable(modules, sources, reader, folding, problems)
    found = problems.found()
    if any(p.hard for p in found) or (found and not allow_unservable):
        raise RefusedError([p.text for p in found])
    quantized = {name: (m.format, m.stored) for name, m in modules.items() if m.format.quantized}
    planner.notes += half_only(quantized, sources.model.config)
    presplit = {}
    for splitter, nbytes in _splitters(recipe, sources, modules):
        presplit[str(splitter.degree)] = nbytes
        planner.notes += splitter.remarks()
    return Plan(
        recipe=recipe,
        sources=sources,
        modules=modules,
        shards=tuple(_lay_out(modules, recipe.shard_size, sources if link else None)),
        rules=tuple(planner.rule_uses()),
        left_out=tuple(planner.left_out(modules)),
        notes=tuple(planner.notes),
        unservable=tuple(p.text for p in found),
        presplit=presplit,
    )


def _splitters(
    recipe: Recipe, sources: Sources, modules: Mapping[str, PlannedModule]
) -> Iterator[tuple[Splitter, int]]:
    """The cuts that a recipe asks for, and the bytes of each."""
    stored = {name: (module.format, module.stored) for name, module in modules.items()} if recipe.tp else {}
    for tp in recipe.tp:
        try:
            splitter = Splitter(stored, sources.model.config, Degree(tp))
            yield splitter, splitter.total_bytes()
        except SplitError as error:
            raise RecipeError(f"tp {tp}: {error}", path=recipe.path, line=recipe.tp_line) from error


def plan_modules(recipe: Recipe, sources: Sources) -> dict[str, PlannedModule]:
    """The modules of :func:`make_plan`, whether SGLang could serve them or not.

    Raises:
        RecipeError, SourceError: as there.
        RefusedError: for what no server could overcome.
    """
    planner = _Planner(recipe, sources)
    planner.choose()
    planner.check_same_model()
    modules = planner.collect()
    if not planner.problems.found():
        with ValueReader({s.name: s.checkpoint for s in sources.by_name.values()}) as reader:
            planner.check_biases(modules, reader)
    found = planner.problems.found()
    if found:
        raise RefusedError([problem.text for problem in found])
    return modules


class _Planner:
    """The steps of :func:`make_plan` and what they share."""

    def __init__(self, recipe: Recipe, sources: Sources):
        self.recipe, self.sources = recipe, sources
        self.default = sources.by_name[recipe.default]
        self.default_first = [self.default, *sources.by_name.values()]
        self.problems = Problems(recipe)
        self.notes: list[str] = []
        self.sources_of_rules = [sources.resolve(rule.source, recipe, rule.line) for rule in recipe.rules]
        self.matched: Counter[int] = Counter()
        self.won: Counter[int] = Counter()
        self.roles: dict[str, Role] = {}
        self.chosen: dict[str, tuple[Source, int | None]] = {}
        """Module -> its source and the number of the rule that chose it."""
        self.followers: set[str] = set()
        """Norms and routers that come along with what a norm feeds."""
        self.dropped_biases: set[tuple[str, str]] = set()
        for source in sources.by_name.values():
            if source.checkpoint.offline is not None:
                self.notes.append(f"`{source.name}` is read from the cache: {source.checkpoint.offline}")
        if self.default.model.model_type not in FAMILIES:
            self.notes.append(
                f"model_type {self.default.model.model_type!r} is not among the families checked against SGLang "
                f"({', '.join(sorted(FAMILIES))}); the common rules for fused projections are used"
            )

    # Which source each module comes from

    def choose(self) -> None:
        exact = self._exact_rules()
        names = sorted({*self.default.checkpoint.modules, *exact}, key=natural_key)
        globs = [(i, rule.pattern) for i, rule in enumerate(self.recipe.rules) if not rule.pattern.exact]
        hits = {name: [i for i, pattern in globs if pattern.matches(name)] for name in names}
        self.roles = {name: role_by_name(name) or self._role(name) for name in names}
        fixed = {name for name, role in self.roles.items() if role.never_quantized}
        # A glob that covers nothing but norms, routers and the like means them; another one does not.
        means_fixed = {i for i, _ in globs} - {i for name in names if name not in fixed for i in hits[name]}
        for i in means_fixed:
            covered = sum(i in hits[name] for name in fixed)
            if covered:
                self.notes.append(
                    f"{self.recipe.rules[i]} covers only tensors that are never quantized (norms, routers, "
                    f"parameters): {covered} are copied as they are there"
                )
        self.matched.update(chain.from_iterable(hits.values()))
        for name, found in hits.items():
            candidates = [i for i in found if i in means_fixed] if name in fixed else found
            winner = exact.get(name, candidates[-1] if candidates else None)
            if winner is not None:
                self.won[winner] += 1
            self.chosen[name] = (self.default if winner is None else self.sources_of_rules[winner], winner)

    def _exact_rules(self) -> dict[str, int]:
        """Module -> the rule that names it; each such name is a promise that must hold."""
        exact: dict[str, int] = {}
        for i, (rule, source) in enumerate(zip(self.recipe.rules, self.sources_of_rules, strict=True)):
            if not rule.pattern.exact:
                continue
            name = rule.pattern.text
            holders = [s for s in self.sources.by_name.values() if name in s.checkpoint.modules]
            module, leaf = split_name(name)
            if not holders and leaf:
                if leaf == "bias" and any(module in s.checkpoint.modules for s in self.sources.by_name.values()):
                    raise self._error(rule, f"a bias is never quantized and comes with its module; name {module}")
                name = module
                holders = [s for s in self.sources.by_name.values() if name in s.checkpoint.modules]
            if not holders:
                raise self._error(rule, f"no source has a module {rule.pattern.text}; {self._nearest(name)}")
            self.matched[i] += 1
            exact[name] = i
            if name not in source.checkpoint.modules:
                continue  # collect() reports it with the others that are missing
            fmt = source.format_of(name)
            asked = ALIASES.get(rule.source, frozenset())
            if asked and fmt.kind not in asked and not fmt.quantized:
                held = ", ".join(f"`{s.name}`" for s in holders if gives(s, [name])) or "no source"
                raise self._error(
                    rule,
                    f"{name} is not quantized in `{source.name}`: it is stored as {fmt.kind} there; "
                    f"remove the line or name another source ({held} has it so)",
                )
        return exact

    def _why_nothing(self, glob: str) -> str:
        if glob.endswith(".bias"):
            return "a bias comes with its module"
        dashed = re.search(r"{(\d+)-(\d+)}", glob)
        if dashed:
            return f"a range is written {{{dashed[1]}..{dashed[2]}}}"
        names = chain.from_iterable(source.checkpoint.modules for source in self.sources.by_name.values())
        words = {word for name in names for word in name.split(".")}
        for word in re.split(r"\.+", glob):
            near = difflib.get_close_matches(word, words, n=1)
            if near and word not in words and not re.search(r"[*?{}]", word):
                return f"no name has a part `{word}`: did you mean `{near[0]}`?"
        return ""

    def _nearest(self, name: str) -> str:
        parent, _, last = name.rpartition(".")
        parts = [part for part, joined in FUSED.items() if joined == last]
        if parts:
            return f"checkpoints store its parts: write {parent}.{{{','.join(parts)}}}"
        names = sorted({n for s in self.sources.by_name.values() for n in s.checkpoint.modules})
        alike = [n for n in names if n.endswith(last) and n.count(".") == name.count(".")] or names
        near = difflib.get_close_matches(name, alike[:5000], n=1, cutoff=0.3)
        return f"did you mean {near[0]}?" if near else "see `mixprec inspect` for the names it has"

    def _error(self, rule: Rule, message: str) -> RecipeError:
        return RecipeError(message, path=self.recipe.path, line=rule.line)

    def _role(self, name: str) -> Role:
        for source in self.default_first:
            fmt = source.known_format(name)
            if fmt is not None:
                stored = source.checkpoint.modules[name]
                return role_of(name, fmt.shape(stored), stored.tensors)
        return role_of(name, (0, 0), ())

    # Whether the sources are one model

    def check_same_model(self) -> None:
        used = {id(source): source for source, _ in self.chosen.values()}
        for source in used.values():
            for difference in self.default.model.differences(source.model):
                self.problems.hard(
                    f"`{self.default.name}` and `{source.name}` are different models: {difference} in their "
                    f"config.json; point `{source.name}` (line {source.line}) to a checkpoint of the same model"
                )

    # Norms that scales were folded into

    def follow(self, folding: Folding) -> None:
        """A norm that no line names has the values that what it feeds was quantized with; its router comes along."""
        moved: dict[str, list[str]] = {}
        for norm, fed in folding.fed.items():
            free = [name for name in (norm, *fed) if self.chosen[name][1] is None and self.roles[name].never_quantized]
            voters = [self.chosen[name][0].name for name in fed if name not in free]
            if norm in free:
                source = folding.follow(norm, self.chosen[norm][0].name, voters)
                self._move([norm], source, moved)
            home = self.chosen[norm][0].name
            routers = [name for name in free if name != norm]
            away = [n for n in routers if folding.differ(norm, self.chosen[n][0].name, home)]
            self._move(away, home, moved)
        for name, names in moved.items():
            self.notes.append(
                f"{some(compress(names))}: from `{name}`, as what these norms feed: it has scales of activations "
                "folded into them"
            )

    def _move(self, names: Iterable[str], source: str | None, moved: dict[str, list[str]]) -> None:
        for name in names if source is not None else ():
            assert source is not None
            fmt = self.sources.by_name[source].known_format(name)
            if fmt is not None and not fmt.quantized:
                self.chosen[name] = (self.sources.by_name[source], None)
                self.followers.add(name)
                moved.setdefault(source, []).append(name)

    # The modules, with the tensors they are made of

    def collect(self) -> dict[str, PlannedModule]:
        modules = {}
        missing: dict[tuple[str, int | None], list[str]] = {}
        downgraded: dict[tuple[str, int], list[str]] = {}
        clashes: dict[tuple[tuple[int, ...], tuple[int, ...], str], list[str]] = {}
        for name, (source, winner) in self.chosen.items():
            stored = source.module(name)
            if stored is None:
                missing.setdefault((source.name, winner), []).append(name)
                continue
            fmt = source.format_of(name)
            shape = fmt.shape(stored)
            rule = None if winner is None else self.recipe.rules[winner]
            if rule is not None and winner is not None and not self.roles[name].never_quantized:
                asked = ALIASES.get(rule.source, frozenset())
                if asked and fmt.kind not in asked:
                    downgraded.setdefault((fmt.kind, winner), []).append(name)
            tensors = {leaf: PlannedTensor(source.name, stored.tensors[leaf]) for leaf in sorted(stored.tensors)}
            base = stored if source is self.default else self.default.module(name)
            if base is not None and base is not stored:
                due = self._shape_clash(name, shape)
                if due is not None:
                    clashes.setdefault((due, shape, source.name), []).append(name)
                if "bias" in base.tensors and "bias" not in tensors and "" not in tensors:
                    tensors["bias"] = PlannedTensor(self.default.name, base.tensors["bias"])
            follows = name in self.followers
            modules[name] = PlannedModule(name, self.roles[name], fmt, source.name, rule, shape, tensors, follows)
        for (source_name, winner), names in missing.items():
            self._report_missing(source_name, None if winner is None else self.recipe.rules[winner], names)
        for (due, shape, source_name), names in clashes.items():
            self.problems.hard(
                f"{some(compress(names))}: {list(due)} in `{self.default.name}` and {list(shape)} in `{source_name}`, "
                f"these are different models; point `{source_name}` (line {self.sources.by_name[source_name].line}) "
                "to a checkpoint of the same model"
            )
        for (kind, winner), names in downgraded.items():
            self.notes.append(
                f"{self.recipe.rules[winner]}: {len(names)} of its modules are stored as {kind} there "
                f"({some(compress(names))})"
            )
        return modules

    def _shape_clash(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape a module has in the default source, where it is another one."""
        base = self.default.known_format(name)
        due = base.shape(self.default.checkpoint.modules[name]) if base is not None else shape
        return due if due != shape else None

    def _report_missing(self, source_name: str, rule: Rule | None, names: list[str]) -> None:
        source = self.sources.by_name[source_name]
        patterns = compress(names)
        absent = sorted({source.checkpoint.absent[n] for n in names if n in source.checkpoint.absent})
        if absent:
            self.problems.hard(
                f"`{source_name}` is read from the cache, which lacks {some(absent)} with {some(patterns)}; "
                "run once with the hub in reach"
            )
            return
        holders = [s.name for s in self.sources.by_name.values() if gives(s, names)]
        mend = self.problems.mended(*Mend.of(holders[0] if holders else None, [(name, rule) for name in names]))
        by = f"by {rule}" if rule is not None else "by default"
        count = counted(len(names), "module")
        self.problems.hard(f"`{source_name}` has no {some(patterns)} ({count}), which come from there {by}{mend}")

    # Biases that only a quantized source has

    def check_biases(self, modules: dict[str, PlannedModule], reader: ValueReader) -> None:
        """GPTQ packers write zero biases for linears that have none; such ones are left out."""
        for name, module in modules.items():
            bias = module.tensors.get("bias")
            if bias is None or module.source == self.default.name:
                continue
            base = self.default.module(name)
            if base is None or "bias" in base.tensors:
                continue
            values = reader.read(bias.source, bias.info)
            if values is not None and values.any():
                self.problems.hard(
                    f"{name} has a bias in `{bias.source}` that is not zero, and none in `{self.default.name}`: "
                    f"these are different models; point `{bias.source}` "
                    f"(line {self.sources.by_name[bias.source].line}) to a checkpoint of the same model"
                )
                continue
            tensors = {leaf: tensor for leaf, tensor in module.tensors.items() if leaf != "bias"}
            modules[name] = module._replace(tensors=tensors)
            self.dropped_biases.add((bias.source, bias.info.name))

    # Accounts

    def rule_uses(self) -> Iterable[RuleUse]:
        for i, rule in enumerate(self.recipe.rules):
            yield RuleUse(rule, self.matched[i], self.won[i])
            if not self.matched[i]:
                hint = self._why_nothing(rule.pattern.text)
                self.notes.append(f"{rule} matches nothing{hint and f' ({hint})'}")
            elif not self.won[i]:
                self.notes.append(f"{rule} never wins: later or exact lines decide all it matches")
            for number, pattern in rule.pattern.greatest() if self.matched[i] else ():
                if not any(map(pattern.matches, reversed(self.roles))):  # great numbers are at the end
                    self.notes.append(f"{rule}: nothing there has the number {number}")

    def left_out(self, modules: Mapping[str, PlannedModule]) -> Iterable[LeftOut]:
        kept: dict[str, set[str]] = {name: set() for name in self.sources.by_name}
        for module in modules.values():
            for planned in module.tensors.values():
                kept[planned.source].add(planned.info.name)
        for source in self.sources.by_name.values():
            groups: dict[str, list[TensorInfo]] = {}
            for name, tensor in source.checkpoint.tensors.items():
                if name not in kept[source.name]:
                    groups.setdefault(self._why_left_out(source, tensor, modules), []).append(tensor)
            for reason, tensors in groups.items():
                names = {split_name(tensor.name)[0] for tensor in tensors}
                nbytes = sum(tensor.nbytes for tensor in tensors)
                yield LeftOut(source.name, reason, len(tensors), nbytes, tuple(compress(names)))

    def _why_left_out(self, source: Source, tensor: TensorInfo, modules: Mapping[str, PlannedModule]) -> str:
        module = modules.get(split_name(tensor.name)[0])
        if (source.name, tensor.name) in self.dropped_biases:
            return f"zero biases that `{self.default.name}` does not have"
        if module is not None:
            return f"taken from `{module.source}`"
        if self.default.model.tied_embeddings and tensor.name.startswith("lm_head."):
            return "tied to the embedding"
        return f"not in the model as `{self.default.name}` has it"


# Files


def _lay_out(modules: Mapping[str, PlannedModule], shard_size: int, link: Sources | None) -> list[PlannedShard]:
    """Shards of at most ``shard_size`` bytes and so many tensors, in checkpoint order; a module is not torn apart.

    With ``link``, source files that are taken over whole become shards of their own.
    """
    linked: list[tuple[tuple[str, str], list[PlannedTensor]]] = []
    taken: set[tuple[str, str]] = set()
    if link is not None:
        linked = list(_whole_files(modules, link))
        taken = {(t.source, t.info.name) for _, tensors in linked for t in tensors}
    bins: list[list[PlannedTensor]] = []
    room = 0
    for module in modules.values():
        tensors = list(module.tensors.values())
        if taken:
            tensors = [t for t in tensors if (t.source, t.info.name) not in taken]
        if not tensors:
            continue
        need = sum([tensor.info.nbytes for tensor in tensors])
        if not bins or need > room or len(bins[-1]) + len(tensors) > MOST_TENSORS:
            bins.append([])
            room = shard_size
        bins[-1] += tensors
        room -= need
    count = len(bins) + len(linked)
    parts: list[tuple[list[PlannedTensor], tuple[str, str] | None]] = [(_aligned(tensors), None) for tensors in bins]
    parts += [(tensors, origin) for origin, tensors in linked]
    return [
        PlannedShard(f"model-{i:05d}-of-{count:05d}.safetensors", tuple(tensors), origin)
        for i, (tensors, origin) in enumerate(parts, start=1)
    ]


def _aligned(tensors: list[PlannedTensor]) -> list[PlannedTensor]:
    """Moves tensors of odd sizes to the end, wide dtypes first, so that each starts at a multiple of its dtype."""

    def odd(tensor: PlannedTensor) -> int:
        if tensor.info.nbytes % 8 == 0:
            return 0
        dtype = tensor.info.dtype
        return 16 - {"F32": 4, "I32": 4, "U32": 4}.get(dtype, 2 if "16" in dtype else 1)

    return sorted(tensors, key=odd)


def _whole_files(
    modules: Mapping[str, PlannedModule], sources: Sources
) -> Iterable[tuple[tuple[str, str], list[PlannedTensor]]]:
    """Source files every tensor of which is in the output, and which readers that want ``pt`` metadata accept."""
    wanted: dict[tuple[str, str], list[PlannedTensor]] = {}
    for module in modules.values():
        for tensor in module.tensors.values():
            wanted.setdefault((tensor.source, tensor.info.file), []).append(tensor)
    for (source, file), tensors in wanted.items():
        checkpoint = sources.by_name[source].checkpoint
        held = sum(info.file == file for info in checkpoint.tensors.values())
        metadata = checkpoint.shards[file].metadata
        if held == len(tensors) and isinstance(metadata, dict) and metadata.get("format") == "pt":
            yield (source, file), sorted(tensors, key=lambda tensor: tensor.info.start)
