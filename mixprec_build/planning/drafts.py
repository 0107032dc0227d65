"""Checks the draft layers of a mix: that they are there where a source has them, and that they are complete."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..families.draft_layers import OWN_WORDS, DraftLayout, DraftPlace, guess_layout, place_of_draft
from ..families.facts import ModelFacts
from ..families.parts import Role
from ..patterns.compress import compress
from ..text import counted, some
from .complete import expert_gaps, kinds_of_blocks, modules_within
from .problems import Problems, Replacement
from .rules import replacement
from .types import PlannedDrafts

if TYPE_CHECKING:
    from ..checkpoint.typed import Source
    from ..recipe.recipe import Recipe
    from ..recipe.sources import Sources
    from .choose import Chosen
    from .types import PlannedModule

__all__ = ["check_draft_formats", "check_drafts", "planned_drafts"]

_Kinds = Mapping[str, Collection[frozenset[str]]]
"""Path of a block within a layer -> the names directly below it, for each kind of layer."""


def check_drafts(
    modules: Mapping[str, PlannedModule], chosen: Chosen, recipe: Recipe, sources: Sources, problems: Problems
) -> list[str]:
    """Adds to ``problems`` draft layers that are lost, and warns of lost ones. Returns notes on others."""
    if recipe.drop_mtp:
        return []
    home = chosen.drafts.home
    absent = sorted({file for name, file in home.checkpoint.absent.items() if sources.is_draft(name)})
    if absent:
        problems.hard(
            f"`{home.name}` is read from the cache, which lacks {some(absent)} with its draft layers (MTP); run once "
            "with the hub in reach, or leave them out with --drop-mtp",
            code="not_cached",
        )
        return []
    drafts = [name for name in modules if name in chosen.drafts.globs]
    having = [source for source in sources.by_name.values() if sources.drafts_of(source)]
    if drafts:
        return _check_complete(drafts, modules, _Completeness.of(modules, sources), having, sources, problems)
    others = _Completeness.of(modules, sources).in_order(having) if having else []
    other = others[0] if others else None
    if chosen.drafts.line is not None:
        rule = chosen.rules[chosen.drafts.line][0]
        problems.hard(
            f"`{home.name}` has no draft layers (MTP), which {rule} takes from it",
            None if other is None else Replacement(other, is_mtp=True),
            code="missing_module",
            advice="No source of this recipe has any: remove the line, or add a source that has them",
        )
        return []
    promise = _promise(sources.model.facts)
    written = "the config.json that is written declares none, so that SGLang has nothing to draft with"
    if other is not None:
        problems.warn(
            f"{promise or 'a source has draft layers (MTP)'}, and the mix has none: `{home.name}`, the default, lacks "
            f"them, and {', '.join(f'`{name}`' for name in others)} {'has' if len(others) == 1 else 'have'} them; "
            f"{written}",
            Replacement(other, is_mtp=True),
            code="lost_drafts",
        )
    elif promise:
        return [
            f"{promise}, and no source has any; {written}: serve it without --speculative-algorithm, or with a draft "
            "model of its own (--speculative-draft-model-path)"
        ]
    return []


def check_draft_formats(modules: Mapping[str, PlannedModule], sources: Sources, problems: Problems) -> None:
    """Adds to ``problems`` quantized draft layers of families whose draft class has no quantization."""
    layout = sources.family.draft_layout
    if layout is None or layout.quantized:
        return
    quantized = [module for module in modules.values() if module.draft and module.format.quantized]
    by_source: dict[str, list[PlannedModule]] = defaultdict(list)
    for module in quantized:
        by_source[module.source].append(module)
    for name, mine in by_source.items():
        other = next((s for s in sources.by_name.values() if _has_unquantized(s, mine)), None)
        source = None if other is None else other.name
        if source is not None and all(module.rule is None or module.rule.mtp for module in mine):
            edit: tuple[Replacement, list[str]] = Replacement(source, is_mtp=True), []
        else:
            edit = replacement(source, mine)
        problems.soft(
            [module.name for module in mine],
            f"draft layers quantized in `{name}`: SGLang's class for draft layers of this family makes them without "
            "quantization",
            *edit,
            code="role_limit",
        )


def _has_unquantized(source: Source, modules: Iterable[PlannedModule]) -> bool:
    formats = [source.known_format(module.name) for module in modules]
    return all(fmt is not None and not fmt.quantized for fmt in formats)


def planned_drafts(modules: Iterable[PlannedModule], chosen: Chosen, recipe: Recipe, sources: Sources) -> PlannedDrafts:
    """Describes the draft layers of a plan."""
    drafts = [module for module in modules if module.draft]
    line = chosen.drafts.line
    rule = None if line is None else chosen.rules[line][0]
    if not drafts:
        return PlannedDrafts(rule=rule, dropped=recipe.drop_mtp)
    source = Counter(module.source for module in drafts).most_common(1)[0][0]
    numbers = {place_of_draft(module.name).layer for module in drafts} - {None}
    layers = sources.by_name[source].facts.draft_layers or len(numbers) or 1
    return PlannedDrafts(tuple(module.name for module in drafts), layers, source, rule)


def _promise(facts: ModelFacts) -> str:
    """What ``config.json`` of the model declares; empty without draft layers."""
    return f"config.json declares {counted(facts.draft_layers, 'draft layer')} (MTP)" if facts.draft_layers else ""


def _check_complete(
    drafts: list[str],
    modules: Mapping[str, PlannedModule],
    completeness: _Completeness,
    having: Iterable[Source],
    sources: Sources,
    problems: Problems,
) -> list[str]:
    homes = Counter(modules[name].source for name in drafts)
    layout = sources.family.draft_layout
    of_other = [] if layout is None else [name for name in drafts if place_of_draft(name).inner == layout.other[0]]
    if layout is not None and of_other:
        source = modules[of_other[0]].source
        problems.hard(
            f"{of_other[0]}: the draft layers (MTP) from `{source}` are {layout.other[1]}, for which mixprec serves no "
            "class of SGLang's",
            code="unserved_model",
            modules=of_other,
            advice="Leave them out with --drop-mtp, or take draft layers from a source of this model that has others",
        )
        return []
    facts = sources.by_name[homes.most_common(1)[0][0]].facts
    bare = {name for name in drafts if "" in modules[name].tensors}
    missing = completeness.missing(drafts, bare, facts.draft_layers)
    where = ", ".join(f"`{name}`" for name in homes)

    def lack(places: list[str]) -> str:
        it = "it" if len(places) == 1 else "them"
        return f"{some(compress(places))}: the draft layers (MTP) from {where} lack {it}"

    likely = completeness.likely_missing(drafts)
    if not sources.family.checked:
        likely, missing = [*missing, *likely], []
    if missing:
        others = completeness.in_order(having)
        other = next((name for name in others if not completeness.lacks(sources.by_name[name])), None)
        has_all = "" if other is None else f"; `{other}` has all, and --drop-mtp leaves the draft layers out"
        problems.hard(
            f"{lack(missing)}, which SGLang's class for draft layers needs{has_all}",
            None if other is None else Replacement(other, is_mtp=True),
            code="incomplete_model",
            modules=missing,
            advice="Add a source that has complete draft layers, or leave them out with --drop-mtp",
        )
    return [lack(likely)] if likely else []


@dataclass(frozen=True, slots=True)
class _Completeness:
    """Finds what draft layers lack, by comparison with the layers of the model."""

    facts: ModelFacts
    kinds: _Kinds
    sources: Sources

    @classmethod
    def of(cls, modules: Mapping[str, PlannedModule], sources: Sources) -> _Completeness:
        main = {name: module for name, module in modules.items() if not module.draft}
        return cls(sources.model.facts, kinds_of_blocks(main, sources.model.facts), sources)

    def in_order(self, having: Iterable[Source]) -> list[str]:
        """Names of sources with draft layers, first those with complete ones that SGLang serves in their format."""
        best_first = sorted(having, key=lambda source: (bool(self.lacks(source)), self._is_limited(source)))
        return [source.name for source in best_first]

    def lacks(self, source: Source) -> list[str]:
        """What the draft layers of a source lack."""
        names = self.sources.drafts_of(source)
        bare = {name for name in names if "" in source.checkpoint.modules[name].tensors}
        return self.missing(names, bare, source.facts.draft_layers)

    def _is_limited(self, source: Source) -> bool:
        family = self.facts.family
        for name in self.sources.drafts_of(source):
            fmt, role = source.known_format(name), family.role_by_name(name) or Role.LINEAR
            if fmt is None or family.format_limit(name, role, fmt) is not None:
                return True
        return False

    def missing(self, names: Collection[str], bare: Collection[str], promised: int) -> list[str]:
        """The modules and blocks that draft layers with the modules ``names`` lack.

        Args:
            bare: those of ``names`` that are parameters without a module, which only some layers may have.
            promised: the number of layers that ``config.json`` declares.
        """
        family = self.facts.family
        places = {name: place_of_draft(name) for name in names}
        missing, _, _ = expert_gaps(names, self.facts)
        if family.draft_layout is not None:
            missing += _missing_of_layout(family.draft_layout, places)
        layers: dict[tuple[str, int], set[str]] = defaultdict(set)
        for name, place in places.items():
            if place.layer is not None and name not in bare and name.startswith(f"{place.stack}.{place.layer}."):
                layers[place.stack, place.layer].add(place.inner)
        known = family.draft_layout is None or not family.draft_layout.own_layers
        for (stack, number), inner in layers.items() if known else ():
            missing += [f"{stack}.{number}.{path}" for path in self._missing_within(modules_within(inner, family))]
        for stack in {stack for stack, _ in layers}:
            have = {number for other, number in layers if other == stack}
            last = self.facts.layers
            first = last if last is not None and min(have) >= last else 0
            missing += [f"{stack}.{n}" for n in range(first, first + promised) if n not in have]
        return sorted(dict.fromkeys(missing))

    def likely_missing(self, names: Collection[str]) -> list[str]:
        """What draft layers of an unknown class lack by the layout that their names are most like."""
        places = {name: place_of_draft(name) for name in names}
        layout = guess_layout(places.values()) if self.facts.family.draft_layout is None else None
        return [] if layout is None else sorted(_missing_of_layout(layout, places))

    def _missing_within(self, tree: Mapping[str, set[str]]) -> list[str]:
        """Paths of what one draft layer lacks: each block must be like that of some layer of the model."""
        family, missing = self.facts.family, []
        for node, have in tree.items():
            kinds = [kind - family.in_some_layers for kind in self.kinds.get(node, ())]
            known = frozenset().union(*kinds)
            mine = have & known
            lacks = [kind - mine for kind in kinds if mine <= kind]
            if not mine or not lacks or any(kind <= mine for kind in kinds):
                continue
            fewest = min(lacks, key=len)
            # A norm may have another name in draft layers.
            others = sum(family.is_norm(child) for child in have - known - OWN_WORDS)
            norms = {child for child in fewest if family.is_norm(child)}
            if norms == fewest and others >= len(norms) and not node:
                continue
            missing += [f"{node}.{child}" if node else child for child in sorted(fewest)]
        return missing


def _missing_of_layout(layout: DraftLayout, places: Mapping[str, DraftPlace]) -> list[str]:
    missing = []
    layers: dict[int, set[str]] = defaultdict(set)
    stacks: dict[int, str] = {}
    for name, place in places.items():
        if place.layer is not None:
            layers[place.layer].add(place.inner)
            if name.startswith(f"{place.stack}.{place.layer}."):
                stacks[place.layer] = place.stack
    for number, inner in layers.items():
        stack = stacks.get(number, "")
        parent = stack.rpartition(".")[0]
        for part in layout.in_each:
            if part not in inner:
                missing.append(f"{parent}.{part}.{number}" if layout.number_last else f"{stack}.{number}.{part}")
    once = {place.inner: place.stack for place in places.values() if place.layer is None}
    beside = next(iter(stacks.values()), "").rpartition(".")[0]
    above = next(iter(once.values()), beside or "mtp")
    return missing + [f"{above}.{part}" for part in layout.once if part not in once]
