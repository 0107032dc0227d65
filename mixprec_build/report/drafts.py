"""Describes draft layers (MTP) as plain data: a row of their own beside the layers of the model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from ..families.base import EXPERTS_COLUMN, Family
from ..families.draft_layers import place_of_draft
from ..families.parts import Role
from ..formats.base import Format
from ..patterns.compress import compress
from .projections import ShownModule, projections

if TYPE_CHECKING:
    from ..planning.types import Plan

__all__ = ["draft_facts", "planned_draft_facts"]


def draft_facts(
    drafts: Collection[ShownModule],
    names: Mapping[Format, str],
    family: Family,
    declared: int,
    *,
    dropped: bool = False,
) -> dict[str, Any] | None:
    """The data of draft layers; None where there are none, ``config.json`` declares none and none were dropped.

    Args:
        names: the name of each format.
        declared: the number of draft layers in ``config.json``.
    """
    if not drafts and not declared and not dropped:
        return None
    formats = Counter(names[module.format] for module in drafts)
    nbytes: Counter[str] = Counter()
    for module in drafts:
        nbytes[names[module.format]] += module.nbytes
    places = {module.name: place_of_draft(module.name) for module in drafts}
    layers = {f"{p.stack}.{p.layer}" for name, p in places.items() if name.startswith(f"{p.stack}.{p.layer}.")}
    columns = [(EXPERTS_COLUMN if m.role is Role.EXPERT else places[m.name].inner, m) for m in drafts]
    return {
        "layers": compress(layers or {place.stack or name for name, place in places.items()}),
        "declared": declared,
        "dropped": dropped,
        "modules": len(drafts),
        "parameters": sum(prod(module.shape) for module in drafts),
        "bytes": sum(module.nbytes for module in drafts),
        "formats": [{"name": name, "modules": formats[name], "bytes": nbytes[name]} for name in formats],
        "projections": projections(columns, names, family),
    }


def planned_draft_facts(plan: Plan, names: Mapping[Format, str]) -> dict[str, Any] | None:
    """The same of a plan, with the source of each module; ``line`` is that of ``mtp: SOURCE``, None without one."""
    drafts = [plan.modules[name] for name in plan.drafts.modules]
    facts = draft_facts(
        drafts, names, plan.sources.family, plan.sources.model.facts.draft_layers, dropped=plan.drafts.dropped
    )
    if facts is None:
        return None
    rule = plan.drafts.rule
    sources = [
        {"name": name, "modules": modules, "bytes": sum(m.nbytes for m in drafts if m.source == name)}
        for name, modules in Counter(module.source for module in drafts).most_common()
    ]
    return facts | {"sources": sources, "line": None if rule is None else rule.line, "written": plan.drafts.layers}
