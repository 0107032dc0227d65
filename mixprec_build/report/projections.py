"""Counts the formats of a layer's projections."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from typing import Protocol

from ..families.base import Family
from ..families.parts import Role
from ..formats.base import Format

__all__ = ["ShownModule", "projections"]


class ShownModule(Protocol):
    """A module as a report sees it, planned or stored. ``shape`` is that of the weight it stands for."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> Role: ...
    @property
    def format(self) -> Format: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


def projections(
    modules: Collection[tuple[str, ShownModule]], names: Mapping[Format, str], family: Family
) -> dict[str, dict[str, int]]:
    """Projection -> format name -> number of modules; an expert counts once.

    Args:
        modules: projection, which is one for all experts, and module.
        names: the name of each format.
    """
    ups = {
        module.name.rpartition(".")[0]: names[module.format]
        for _, module in modules
        if module.role is Role.EXPERT and not family.is_down(module.name)
    }
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for projection, module in modules:
        if module.role.never_quantized:
            continue
        fmt = names[module.format]
        if module.role is Role.EXPERT:
            if not family.is_down(module.name):
                continue
            up = ups.get(module.name.rpartition(".")[0], fmt)
            fmt = fmt if up == fmt else f"{up} (down {fmt})"
        found[projection][fmt] += 1
    return {projection: dict(counts) for projection, counts in found.items()}
