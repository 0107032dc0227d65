"""Scales that were folded into whatever makes the inputs of a linear of unknown name.

Where the norm or linear before a linear is known by name, :mod:`.folding` looks at that. Of others, the weights of the
linear itself tell: where its columns are those of another source times factors, something before it was divided by
these, and must not come from the other source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..families.names import last_word, layer_prefix
from ..families.parts import Role
from ..patterns.compress import compress
from ..text import some
from .probe import WeightProbe
from .problems import Problems, Replacement
from .rules import by_votes, can_serve_from, origin

if TYPE_CHECKING:
    from ..recipe.sources import Sources
    from .folding import Folding
    from .types import PlannedModule

__all__ = ["check_untraced"]

_LOOKED_AT = 4
"""Number of linears of one kind and two sources that are compared."""


def check_untraced(
    modules: Mapping[str, PlannedModule], sources: Sources, folding: Folding, problems: Problems
) -> list[str]:
    """Adds to ``problems`` linears with scales in their columns, and what may feed them from elsewhere. Returns
    notes on those that could not be compared.

    Only of those that no known norm or linear feeds; what may feed one is as wide as its inputs, and a norm of its
    layer or a linear of its block.
    """
    unseen: dict[tuple[str, str], list[str]] = {}
    if not any(module.format.quantized for module in modules.values()):
        return []
    probe, seen = WeightProbe(sources), dict[tuple[str, str, str], list[bool | None]]()
    blocks, norms = _blocks_and_norms(modules, folding)
    for name, module in modules.items():
        prefix = layer_prefix(name)
        if not prefix or module.role not in (Role.LINEAR, Role.EXPERT) or len(module.shape) != 2:
            continue
        parent = name.rpartition(".")[0]
        may_feed = [m for m in (*blocks[parent], *norms.get(prefix, ())) if _fits(m, module)]
        away = [
            m for m in may_feed if m.source != module.source and not folding.is_explained(module, m.source, modules)
        ]
        if not away or folding.is_traced(name, modules):
            continue
        found = {other: _is_scaled(module, other, sources, probe, seen) for other in {m.source: None for m in away}}
        for other in (other for other, is_scaled in found.items() if is_scaled is None):
            unseen.setdefault((module.source, other), []).append(name)
        scaled = {other for other, is_scaled in found.items() if is_scaled}
        if scaled:
            fed_from = ", ".join(f"{last_word(m.name)} from {origin(m)}" for m in away if m.source in scaled)
            text = (
                f"the inputs of {last_word(name)} were scaled in one of two sources, and what makes them must come "
                f"from the same one, but it is from {origin(module)} and what may make them is not ({fed_from})"
            )
            problems.soft([name], text, *_from_one_source([module, *may_feed], sources), code="folded_scales")
    return [
        f"{some(compress(names))}: from `{source}`, and what may make their inputs is from `{other}`; whether scales "
        "were folded between them cannot be seen, since their values are not on this machine"
        for (source, other), names in unseen.items()
    ]


def _blocks_and_norms(
    modules: Mapping[str, PlannedModule], folding: Folding
) -> tuple[dict[str, list[PlannedModule]], dict[str, list[PlannedModule]]]:
    """The linears of each block, and those norms of each layer that no known linear is fed by."""
    blocks: dict[str, list[PlannedModule]] = {}
    norms: dict[str, list[PlannedModule]] = {}
    for name, module in modules.items():
        if len(module.shape) == 2:
            blocks.setdefault(name.rpartition(".")[0], []).append(module)
        elif len(module.shape) == 1 and name not in folding.fed:
            norms.setdefault(layer_prefix(name), []).append(module)
    return blocks, norms


def _fits(before: PlannedModule, after: PlannedModule) -> bool:
    """Whether as many values come out of a module as go into the other; of joined ones two or three times as many."""
    size = after.shape[1]
    joined = (size, 2 * size, 3 * size) if len(before.shape) == 2 else (size,)
    return before.name != after.name and before.shape[0] in joined


def _is_scaled(
    module: PlannedModule,
    other: str,
    sources: Sources,
    probe: WeightProbe,
    seen: dict[tuple[str, str, str], list[bool | None]],
) -> bool | None:
    """Whether the module's columns, or those of another one of its kind, are scaled; None where none is known."""
    if not any(fmt.quantized for name in (module.source, other) for fmt in sources.by_name[name].distinct_formats):
        return False
    found = seen.setdefault((last_word(module.name), module.source, other), [])
    if len(found) < _LOOKED_AT and not any(found):
        found.append(probe.is_scaled(module.name, module.source, other, columns=True))
    return any(found) or (None if None in found else False)


def _from_one_source(parts: Iterable[PlannedModule], sources: Sources) -> tuple[Replacement, list[str]]:
    parts = list(parts)
    for source in by_votes(parts, sources):
        linears = [m for m in parts if not m.role.never_quantized]
        has_all = all(m.name in source.checkpoint.modules for m in parts)
        if has_all and can_serve_from(source, linears, sources.family):
            return Replacement.of(source.name, [(m.name, m.rule) for m in parts if m.source != source.name])
    return Replacement(None), []
