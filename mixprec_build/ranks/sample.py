"""Selects a part of a checkpoint that stands for all of it, to try many degrees quickly."""

from __future__ import annotations

from collections.abc import Mapping

from ..families.base import Family
from ..families.names import layer_prefix
from ..formats.base import Format
from ..storage.module import StoredModule

__all__ = ["one_layer_of_each"]


def one_layer_of_each(
    modules: Mapping[str, tuple[Format, StoredModule]], family: Family
) -> dict[str, tuple[Format, StoredModule]]:
    """The modules outside of layers, and those of one layer for each combination of formats and shapes."""
    layers: dict[str, list[str]] = {}
    for name in modules:
        layers.setdefault(layer_prefix(name), []).append(name)
    kinds: dict[object, list[str]] = {}
    for prefix, names in layers.items():
        kind = set()
        for name in names:
            fmt, stored = modules[name]
            expert = family.expert_of(name)
            inner = expert[2] if expert else name.removeprefix(prefix)
            kind.add((inner, fmt, *((leaf, t.dtype, t.shape) for leaf, t in stored.tensors.items())))
        kinds.setdefault((len(names), frozenset(kind)), names)
    return {name: modules[name] for names in kinds.values() for name in names}
