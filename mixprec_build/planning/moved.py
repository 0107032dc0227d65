"""Checks modules whose rows a model class of SGLang's permutes while it loads them.

It permutes ``weight`` but not scales, packed words or zero points, so that a quantized module loads without an error
and computes nonsense. Found by reading ``models/`` of SGLang 0.5.15 to 0.5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..families.parts import MovedRows
from ..formats.base import Format
from .problems import Problems, Replacement
from .rules import by_votes, can_serve_from, origin

if TYPE_CHECKING:
    from ..recipe.sources import Sources
    from .types import PlannedModule

__all__ = ["check_moved"]


def _limit(move: MovedRows, fmt: Format, head_dim: int | None) -> str | None:
    """The reason why a module in ``fmt`` would be loaded wrongly; None if there is none."""
    if not fmt.quantized:
        return None
    if move.within_heads and fmt.has_weight:
        beside = (fmt.axes(leaf).n for leaf in fmt.leaves - {fmt.values_leaf, "bias"})
        rows = [axis.per for axis in beside if axis is not None]
        # A scale for all rows, or for the rows of complete heads, stays right.
        if not rows or (head_dim is not None and all(n % head_dim == 0 for n in rows)):
            return None
    return (
        f"SGLang's {move.architecture} moves the rows of this module's weight as it loads it, and not what "
        f"{fmt.kind} keeps beside it, or in its place"
    )


def check_moved(modules: Mapping[str, PlannedModule], sources: Sources, problems: Problems) -> None:
    """Adds to ``problems`` the modules whose scales SGLang would not permute with the weight."""
    facts = sources.model.facts
    moves, head_dim, family = facts.family.moved, facts.head_dim, facts.family
    if not moves:
        return

    def limit(name: str, fmt: Format) -> str | None:
        found = (_limit(move, fmt, head_dim) for move in moves if move.modules.fullmatch(name))
        return next((why for why in found if why is not None), None)

    for members in family.fused_groups(modules).values():
        parts = [modules[member] for member in members]
        for part in parts:
            why = limit(part.name, part.format)
            if why is None:
                continue
            for source in by_votes(parts, sources):
                if can_serve_from(source, parts, family) and not any(
                    limit(p.name, source.format_of(p.name)) for p in parts
                ):
                    others = [(p.name, p.rule) for p in parts if p.source != source.name]
                    edit, change = Replacement.of(source.name, others)
                    break
            else:
                edit, change = Replacement(None), []
            text = f"{part.format.kind} from {origin(part)}: {why}"
            problems.soft([p.name for p in parts if limit(p.name, p.format)], text, edit, change, code="moved_rows")
            break
