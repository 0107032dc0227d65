"""Recipe + sources -> :class:`Plan`: which tensor comes from where and lies where. Nothing is written here."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

from ..checkpoint.checkpoint import INDEX, ValueReader
from ..checkpoint.degree import Degree
from ..checkpoint.typed import Source
from ..errors import RecipeError, RefusedError, SplitError
from ..families.expected import left_out_of_builds
from ..families.parts import Role
from ..families.registry import checked_types
from ..formats.registry import kinds_of_word, leaves
from ..patterns.compress import compress, natural_key
from ..ranks.splitter import Splitter
from ..recipe.recipe import Recipe, Rule
from ..recipe.sources import Sources
from ..storage.header import TensorInfo
from ..storage.module import split_name
from ..text import counted, some
from .cache_scales import with_cache_scales
from .companions import companion_files
from .complete import check_complete, check_tied_head
from .folding import Folding
from .moved import check_moved
from .probe import WeightProbe, check_weights
from .problems import Problems, Replacement
from .rules import half_only, offers
from .servable import check_servable
from .shards import lay_out
from .stacked import check_stacked, why_missing
from .types import LeftOut, Plan, PlannedModule, PlannedTensor, RuleUse

__all__ = ["make_plan", "plan_modules"]


def make_plan(
    recipe: Recipe,
    sources: Sources,
    *,
    allow_unservable: bool = False,
    link: bool = False,
    check_all: bool = False,
) -> Plan:
    """Decides everything and checks it; with ``check_all`` also the weights of every quantized module.

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
        check_stacked(planner.chosen, planner.rules, sources, problems)
        planner.check_complete(modules)
        if not problems:
            planner.check_biases(modules, reader)
            check_tied_head(modules, sources, reader, problems)
            check_servable(modules, sources, reader, folding, problems)
            check_moved(modules, sources, problems)
            planner.notes += folding.unseen()
    companion_files(sources.model)  # refuses what a build could not copy
    found = problems.found()
    if any(p.hard for p in found) or (found and not allow_unservable):
        raise RefusedError(found)
    planner.notes += check_weights(modules, sources, WeightProbe(sources), full=check_all)
    quantized = {name: (m.format, m.stored) for name, m in modules.items() if m.format.quantized}
    planner.notes += half_only(quantized, sources.model.facts)
    presplit = {}
    for splitter, nbytes in _splitters(recipe, sources, modules):
        presplit[str(splitter.degree)] = nbytes
        planner.notes += splitter.remarks()
    return Plan(
        recipe=recipe,
        sources=sources,
        modules=modules,
        shards=tuple(lay_out(modules, recipe.shard_size, sources if link else None)),
        rules=tuple(planner.rule_uses()),
        left_out=tuple(planner.left_out(modules)),
        notes=tuple(planner.notes),
        problems=tuple(found),
        presplit=presplit,
    )


def _splitters(
    recipe: Recipe, sources: Sources, modules: Mapping[str, PlannedModule]
) -> Iterator[tuple[Splitter, int]]:
    """The cuts that a recipe asks for, and the bytes of each."""
    stored = {name: (module.format, module.stored) for name, module in modules.items()} if recipe.tp else {}
    for tp in recipe.tp:
        try:
            splitter = Splitter(stored, sources.model.facts, Degree(tp))
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
    if not planner.problems:
        with ValueReader({s.name: s.checkpoint for s in sources.by_name.values()}) as reader:
            planner.check_biases(modules, reader)
    found = planner.problems.found()
    if found:
        raise RefusedError(found)
    return modules


class _Planner:
    """The steps of :func:`make_plan` and what they share."""

    def __init__(self, recipe: Recipe, sources: Sources):
        self.recipe, self.sources, self.family = recipe, sources, sources.family
        self.default = sources.by_name[recipe.default]
        self.default_first = [self.default, *sources.by_name.values()]
        self.problems = Problems(recipe)
        self.notes: list[str] = []
        self.sources_of_rules = [sources.resolve(rule.source, recipe, rule.line) for rule in recipe.rules]
        self.rules = list(zip(recipe.rules, self.sources_of_rules, strict=True))
        self.names_of: dict[int, list[str]] = {i: [] for i in range(len(recipe.rules))}
        """The modules that each rule matches."""
        self.won: Counter[int] = Counter()
        self.roles: dict[str, Role] = {}
        self.chosen: dict[str, tuple[Source, int | None]] = {}
        """Module -> its source and the number of the rule that chose it."""
        self.followers: set[str] = set()
        """Norms and routers that come along with what a norm feeds."""
        self.dropped_biases: set[tuple[str, str]] = set()
        for source in sources.by_name.values():
            index = source.checkpoint.path_of(INDEX)
            self.notes += [f"`{source.name}`: {index} {remark}" for remark in source.checkpoint.remarks]
            if source.checkpoint.offline is not None:
                self.notes.append(f"`{source.name}` is read from the cache: {source.checkpoint.offline}")
        if not self.default.facts.family.checked:
            self.notes.append(
                f"model_type {self.default.facts.model_type!r} is not among the families checked against SGLang "
                f"({', '.join(checked_types())}); the common rules for fused projections are used"
            )

    # Which source each module comes from

    def choose(self) -> None:
        exact = self._exact_rules()
        taken = (name for name in self.default.checkpoint.modules if left_out_of_builds(name) is None)
        names = sorted({*taken, *exact}, key=natural_key)
        hits = self.recipe.globs_matching(names)
        for name, i in ((name, i) for name, found in hits.items() for i in found):
            self.names_of[i].append(name)
        self.roles = {name: self.family.role_by_name(name) or self._role(name) for name in names}
        fixed = {name for name, role in self.roles.items() if role.never_quantized}
        # A glob that covers nothing but norms, routers and the like means them; another one does not.
        globs = {i for i in self.names_of if self.names_of[i] and not self.recipe.rules[i].pattern.exact}
        means_fixed = {i for i in globs if fixed.issuperset(self.names_of[i])}
        for i in means_fixed:
            self.notes.append(
                f"{self.recipe.rules[i]} covers only tensors that are never quantized (norms, routers, "
                f"parameters): {len(self.names_of[i])} are copied as they are there"
            )
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
            module, leaf = split_name(name, leaves())
            if not holders and leaf:
                if leaf == "bias" and any(module in s.checkpoint.modules for s in self.sources.by_name.values()):
                    raise self._error(rule, f"a bias is never quantized and comes with its module; name {module}")
                name = module
                holders = [s for s in self.sources.by_name.values() if name in s.checkpoint.modules]
            if not holders:
                raise self._error(rule, f"no source has a module {rule.pattern.text}; {self._nearest(name)}")
            self.names_of[i].append(name)
            exact[name] = i
            if name not in source.checkpoint.modules:
                continue  # collect() reports it with the others that are missing
            fmt = source.format_of(name)
            asked = kinds_of_word(rule.source)
            if asked and fmt.kind not in asked and not fmt.quantized:
                held = ", ".join(f"`{s.name}`" for s in holders if offers(s, [name])) or "no source"
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
        parts = self.family.members_of(last)
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
                return self.family.role_of(name, fmt.shape(stored), stored.tensors)
        return self.family.role_of(name, (0, 0), ())

    # Whether the sources are one model

    def check_same_model(self) -> None:
        """The config.json that the output is served with, and those of all sources that are used, are of one model."""
        used = {id(source): source for source, _ in self.chosen.values()}
        names = {id(s.checkpoint): f"`{name}`" for name, s in self.sources.by_name.items()}
        ours = names.get(id(self.sources.model), f"`model:` ({self.sources.model.location})")
        for source in used.values():
            for difference in self.sources.model.facts.differences(source.facts):
                if difference.counts:
                    self.problems.hard(
                        f"{ours} and `{source.name}` are different models: {difference} in their config.json; point "
                        f"`{source.name}` (line {source.line}) to a checkpoint of the same model",
                        code="different_models",
                    )
                else:
                    self.notes.append(
                        f"{ours} and `{source.name}` differ in their config.json: {difference}; the output is served "
                        "with the first"
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
                asked = kinds_of_word(rule.source)
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
                "to a checkpoint of the same model",
                code="different_models",
                modules=names,
            )
        for (kind, winner), names in downgraded.items():
            self.notes.append(
                f"{self.recipe.rules[winner]}: {len(names)} of its modules are stored as {kind} there "
                f"({some(compress(names))})"
            )
        return with_cache_scales(modules, self.sources, self.notes)

    def check_complete(self, modules: Mapping[str, PlannedModule]) -> None:
        """Whether ``modules`` are all that the model needs; see :mod:`.complete`."""
        if self.problems:
            return  # what is missing has been said
        offered = {}
        for name, source in self.sources.by_name.items():
            has = source.checkpoint.modules.keys() | source.checkpoint.absent.keys()
            offered[name] = {module for module in has if offers(source, [module])} if kinds_of_word(name) else has
        check_complete(modules, self.sources.model.facts, offered, self.problems, self.notes)

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
                "run once with the hub in reach",
                code="not_cached",
                modules=names,
            )
            return
        holders = [s.name for s in self.sources.by_name.values() if offers(s, names)]
        replacement, new = Replacement.of(holders[0] if holders else None, [(name, rule) for name in names])
        by = f"by {rule}" if rule is not None else "by default"
        count = counted(len(names), "module")
        text = f"`{source_name}` has no {some(patterns)} ({count}), which come from there {by}"
        why, resolved = why_missing(source, self.default, names, self.sources)
        self.problems.hard(text + why, None if resolved else replacement, new, code="missing_module", modules=names)

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
                    f"(line {self.sources.by_name[bias.source].line}) to a checkpoint of the same model",
                    code="different_models",
                    modules=[name],
                )
                continue
            tensors = {leaf: tensor for leaf, tensor in module.tensors.items() if leaf != "bias"}
            modules[name] = module._replace(tensors=tensors)
            self.dropped_biases.add((bias.source, bias.info.name))

    # Accounts

    def rule_uses(self) -> Iterable[RuleUse]:
        for i, rule in enumerate(self.recipe.rules):
            yield RuleUse(rule, len(self.names_of[i]), self.won[i])
            if not self.names_of[i]:
                hint = self._why_nothing(rule.pattern.text)
                self.notes.append(f"{rule} matches nothing{hint and f' ({hint})'}")
            elif not self.won[i]:
                self.notes.append(f"{rule} never wins: later or exact lines decide all it matches")
            for number, pattern in rule.pattern.greatest() if self.names_of[i] else ():
                if not any(map(pattern.matches, reversed(self.names_of[i]))):  # great numbers are at the end
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
                names = {split_name(tensor.name, leaves())[0] for tensor in tensors}
                nbytes = sum(tensor.nbytes for tensor in tensors)
                yield LeftOut(source.name, reason, len(tensors), nbytes, tuple(compress(names)))

    def _why_left_out(self, source: Source, tensor: TensorInfo, modules: Mapping[str, PlannedModule]) -> str:
        module = modules.get(split_name(tensor.name, leaves())[0])
        if module is None and (reason := left_out_of_builds(tensor.name)) is not None:
            return reason
        if (source.name, tensor.name) in self.dropped_biases:
            return f"zero biases that `{self.default.name}` does not have"
        if module is not None:
            return f"taken from `{module.source}`"
        if self.default.facts.tied_embeddings and tensor.name.startswith(f"{self.family.head}."):
            return "tied to the embedding"
        return f"not in the model as `{self.default.name}` has it"
