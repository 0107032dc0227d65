"""Chooses the source of each module: by the recipe's lines, and for norms and routers by what they feed."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..checkpoint.typed import Source
from ..errors import RecipeError
from ..families.expected import left_out_of_builds
from ..families.parts import Role
from ..formats.registry import kinds_of_word, leaves
from ..patterns.compress import compress, natural_key
from ..recipe.fix import Line, RecipeFix
from ..recipe.recipe import Recipe, Rule
from ..recipe.sources import Sources
from ..storage.module import split_name
from ..text import some
from .draft_lines import Drafts, find_drafts
from .folding import Folding
from .problems import Problems
from .rules import offers
from .types import RuleUse

__all__ = ["Choice", "Chosen", "check_same_model", "choose", "with_followers"]


class Choice(NamedTuple):
    """The source of one module. ``rule`` is the line that chose it, None for the default."""

    source: Source
    rule: Rule | None = None
    follows: bool = False
    """Whether the modules that a norm feeds decided the source."""

    @property
    def is_default(self) -> bool:
        """Whether no line names the module, but at most ``mtp:`` all draft layers."""
        return self.rule is None or self.rule.mtp


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """The source of every module of the output, in checkpoint order."""

    choices: Mapping[str, Choice]
    roles: Mapping[str, Role]
    rules: tuple[tuple[Rule, Source], ...]
    """The recipe's lines, each with its source."""
    uses: tuple[RuleUse, ...]
    """Numbers of modules that each of these lines matches and decides."""
    matched: Sequence[Sequence[str]]
    """The modules that each of these lines matches, in checkpoint order."""
    drafts: Drafts
    notes: tuple[str, ...] = ()

    @property
    def sources(self) -> dict[str, Source]:
        """The sources that any module comes from, by name."""
        return {choice.source.name: choice.source for choice in self.choices.values()}

    def assigned(self, sources: Mapping[str, Source]) -> Chosen:
        """A copy with these modules only, each from the source that it is mapped to, whatever the recipe says."""
        return replace(self, choices={name: Choice(source) for name, source in sources.items()})


def choose(recipe: Recipe, sources: Sources) -> Chosen:
    """Applies the lines of a recipe to the modules of the default source, and to those that lines name: exactly, or by
    braces without a wildcard.

    The last glob that matches decides; an exact name beats every glob. Norms, routers and parameters, which are never
    quantized, are decided only by globs that match nothing else. Draft layers have a default source and globs of their
    own, see :mod:`.draft_lines`.

    Raises:
        RecipeError: no source has a module that an exact line names, or its source has it unquantized where the line
            names a quantized format; no source or several have a format that a line names.
    """
    rules = tuple((rule, sources.resolve(rule.source, recipe, rule.line)) for rule in recipe.rules)
    default = sources.by_name[recipe.default]
    named = {i: name for i, rule in enumerate(rules) if (name := _module_named(*rule, recipe, sources)) is not None}
    if recipe.drop_mtp:
        named = {i: name for i, name in named.items() if not sources.is_draft(name)}
    exact = {name: i for i, name in named.items()}
    mains = (n for n in default.checkpoint.modules if left_out_of_builds(n) is None and not sources.is_draft(n))
    listed = _listed_beside(default, rules, sources)
    hits = recipe.globs_matching({*mains, *listed, *(name for name in exact if not sources.is_draft(name))})
    drafts = find_drafts(recipe, rules, sources, exact, {i for found in hits.values() for i in found})
    hits |= drafts.globs
    names = sorted(hits, key=natural_key)
    matched = [[named[i]] if i in named else [] for i in range(len(rules))]
    for name in names:
        for i in hits[name]:
            matched[i].append(name)
    if drafts.line is not None:
        matched[drafts.line] = [name for name in names if name in drafts.globs]
    default_first = [default, drafts.home, *sources.by_name.values()]
    roles = {name: sources.family.role_by_name(name) or _role(name, default_first, sources) for name in names}
    fixed = {name for name, role in roles.items() if role.never_quantized}
    # Only a glob that matches nothing but norms, routers and the like is meant for them.
    means_fixed = {i for i, found in enumerate(matched) if i not in named and found and fixed.issuperset(found)}
    notes = [
        f"{recipe.rules[i]} covers only tensors that are never quantized (norms, routers, parameters): "
        f"{len(matched[i])} are copied from that source as they are"
        for i in sorted(means_fixed)
    ]
    won = Counter[int]()
    choices = {}
    for name in names:
        found, home = hits[name], drafts.home if name in drafts.globs else default
        if name in fixed and home.module(name) is not None:
            found = [i for i in found if i in means_fixed]
        winner = exact.get(name, found[-1] if found else drafts.line if name in drafts.globs else None)
        if winner is None:
            choices[name] = Choice(home)
        else:
            won[winner] += 1
            choices[name] = Choice(rules[winner][1], rules[winner][0])
    uses = tuple(RuleUse(rule, len(matched[i]), won[i]) for i, rule in enumerate(recipe.rules))
    return Chosen(choices, roles, rules, uses, matched, drafts, tuple(notes))


def _listed_beside(default: Source, rules: Iterable[tuple[Rule, Source]], sources: Sources) -> Iterator[str]:
    """Yields modules that ``default`` lacks and that a line takes from its source by names listed in braces."""
    beside: dict[str, list[str]] = {}  # by source, for a recipe may have thousands of lines
    for rule, source in rules:
        if rule.mtp or rule.exact or not rule.pattern.lists:
            continue
        if source.name not in beside:
            others = source.checkpoint.modules.keys() - default.checkpoint.modules.keys()
            beside[source.name] = [n for n in others if left_out_of_builds(n) is None and not sources.is_draft(n)]
        yield from filter(rule.pattern.matches, beside[source.name])


def _module_named(rule: Rule, source: Source, recipe: Recipe, sources: Sources) -> str | None:
    """The module that an exact line names; None for a glob. Raises :class:`RecipeError` where no source has it."""
    if not rule.exact:
        return None

    def error(message: str, instead: str | None = None, *, remove: bool = False) -> RecipeError:
        fix = None
        if instead is not None:
            fix = RecipeFix(change=(Line(rule.line, instead, rule.source),), section=recipe.section)
        elif remove:
            fix = RecipeFix(remove=(Line(rule.line, rule.pattern.text, rule.source),), section=recipe.section)
        return RecipeError(message, path=recipe.path, line=rule.line, fix=fix)

    name = rule.pattern.text
    holders = _holders(name, sources)
    module, leaf = split_name(name, leaves())
    if not holders and leaf:
        name, holders = module, _holders(module, sources)
        if leaf == "bias" and holders:
            raise error(f"a bias is never quantized and comes with its module; name {module}", module)
    if not holders:
        hint, instead = _nearest(name, sources)
        raise error(f"no source has a module {rule.pattern.text}; {hint}", instead)
    if name in source.checkpoint.modules:  # else it is reported later, with all modules that are missing
        fmt = source.format_of(name)
        asked = kinds_of_word(rule.source)
        if asked and fmt.kind not in asked and not fmt.quantized:
            others = ", ".join(f"`{s.name}`" for s in holders if offers(s, [name])) or "no source"
            raise error(
                f"{name} is not quantized in `{source.name}`: it is stored as {fmt.kind} there; "
                f"remove the line or name another source ({others} has it so)",
                remove=True,
            )
    return name


def _holders(name: str, sources: Sources) -> list[Source]:
    return [source for source in sources.by_name.values() if name in source.checkpoint.modules]


def _nearest(name: str, sources: Sources) -> tuple[str, str | None]:
    """A hint for the name of a module that no source has, and a pattern to write instead."""
    parent, _, last = name.rpartition(".")
    parts = sources.family.members_of(last)
    if parts:
        pattern = f"{parent}.{{{','.join(parts)}}}"
        return f"checkpoints store its parts: write {pattern}", pattern
    names = sorted({n for s in sources.by_name.values() for n in s.checkpoint.modules})
    alike = [n for n in names if n.endswith(last) and n.count(".") == name.count(".")] or names
    near = difflib.get_close_matches(name, alike[:5000], n=1, cutoff=0.3)
    return (f"did you mean {near[0]}?", near[0]) if near else ("see `mixprec inspect` for the names it has", None)


def _role(name: str, default_first: Iterable[Source], sources: Sources) -> Role:
    """The role of a module by its shape and tensors, in the first source that has it in a supported format."""
    for source in default_first:
        fmt = source.known_format(name)
        if fmt is not None:
            stored = source.checkpoint.modules[name]
            return sources.family.role_of(name, fmt.shape(stored), stored.tensors)
    return sources.family.role_of(name, (0, 0), ())


def check_same_model(chosen: Chosen, sources: Sources, problems: Problems) -> list[str]:
    """Compares the ``config.json`` that the output is served with and those of the sources that are used.

    Adds to ``problems`` those of different models. Returns notes on differences that do not matter.
    """
    names = {id(source.checkpoint): f"`{name}`" for name, source in sources.by_name.items()}
    ours = names.get(id(sources.model), f"`model:` ({sources.model.location})")
    notes = []
    for source in chosen.sources.values():
        for difference in sources.model.facts.differences(source.facts):
            if difference.counts:
                problems.hard(
                    f"{ours} and `{source.name}` are different models: {difference} in their config.json; point "
                    f"`{source.name}` (line {source.line}) to a checkpoint of the same model",
                    code="different_models",
                )
            else:
                notes.append(
                    f"{ours} and `{source.name}` differ in their config.json: {difference}; the output is served with "
                    "the first"
                )
    return notes


def with_followers(chosen: Chosen, folding: Folding, sources: Sources) -> Chosen:
    """Takes norms that no line decides, and their routers, from where the modules that they feed come from.

    Does so only where scales are folded into a norm, see :mod:`.folding`.
    """
    choices, moved = dict(chosen.choices), dict[str, list[str]]()

    def move(names: Iterable[str], to: Source) -> None:
        for name in names:
            fmt = to.known_format(name)
            if fmt is not None and not fmt.quantized:
                choices[name] = Choice(to, follows=True)
                moved.setdefault(to.name, []).append(name)

    for norm, fed in folding.fed.items():
        free = [n for n in (norm, *fed) if choices[n].is_default and chosen.roles[n].never_quantized]
        voters = [choices[name].source.name for name in fed if name not in free]
        source = folding.follow(norm, choices[norm].source.name, voters) if norm in free else None
        if source is not None:
            move([norm], sources.by_name[source])
        home = choices[norm].source
        routers = [name for name in free if name != norm]
        move([n for n in routers if folding.differ(norm, choices[n].source.name, home.name)], home)
    notes = [
        f"{some(compress(names))}: from `{name}` like the modules that these norms feed, because it has scales of "
        "activations folded into the norms"
        for name, names in moved.items()
    ]
    return replace(chosen, choices=choices, notes=(*chosen.notes, *notes))
