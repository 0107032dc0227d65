"""Finds the draft layers of a mix, and the lines of its recipe that apply to them.

Draft layers are a group of their own. They come from the source of the line ``mtp: SOURCE``, else from the default
source. A glob applies to them only where it singles them out, by a word like ``mtp`` or by the number of their layer,
or matches nothing else: ``*.mlp.experts.*: int4`` means the model's experts, whatever the draft layers come from.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint.typed import Source
from ..recipe.recipe import Recipe, Rule
from ..recipe.sources import Sources

__all__ = ["Drafts", "find_drafts"]


@dataclass(frozen=True, slots=True, eq=False)
class Drafts:
    """The draft layers of a mix."""

    home: Source
    """The source of those that no other line names."""
    line: int | None
    """The index of the line ``mtp: SOURCE``; None without one."""
    globs: Mapping[str, list[int]]
    """Each of their modules -> indices of the globs that apply to it, ascending."""


def find_drafts(
    recipe: Recipe,
    rules: Sequence[tuple[Rule, Source]],
    sources: Sources,
    exact: Collection[str],
    used: Collection[int],
) -> Drafts:
    """Finds the draft layers that the home has, and those that exact lines name or that globs take from their source.

    Args:
        exact: the modules that exact lines name.
        used: indices of the globs that match other modules.
    """
    line = max((i for i, (rule, _) in enumerate(rules) if rule.mtp), default=None)
    home = sources.by_name[recipe.default] if line is None else rules[line][1]
    if recipe.drop_mtp:
        return Drafts(home, line, {})
    family, layers = sources.family, sources.model.facts.layers
    every = dict.fromkeys(name for source in sources.by_name.values() for name in sources.drafts_of(source))
    without_marks = {name: family.means_no_draft(name, layers) for name in every}
    hits = recipe.globs_matching({*every, *without_marks.values()})
    found = {}
    for name, other in without_marks.items():
        general = {*hits[other]}
        meant = [i for i in hits[name] if i not in general]
        if name in exact or home.module(name) is not None or any(rules[i][1].module(name) for i in meant):
            found[name] = [i for i in hits[name] if i not in general or i not in used]
    return Drafts(home, line, found)
