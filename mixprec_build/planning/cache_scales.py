"""Adds the scales of an FP8 KV cache, each from the source of its attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..families.cache_scales import CacheScale, cache_scale, home_of
from ..families.parts import Role
from ..patterns.compress import compress, natural_key
from ..text import some
from .types import PlannedModule, PlannedTensor

if TYPE_CHECKING:
    from ..checkpoint.typed import Source
    from ..recipe.sources import Sources

__all__ = ["with_cache_scales"]


def with_cache_scales(
    modules: dict[str, PlannedModule], sources: Sources
) -> tuple[dict[str, PlannedModule], list[str]]:
    """Adds to ``modules`` the cache scales that the source of each attention's keys has.

    Returns all in checkpoint order, and notes where that source has none and another has.
    """
    homes: dict[str, PlannedModule | None] = {}
    added: dict[str, PlannedModule] = {}
    offered: dict[str, dict[str, None]] = {}
    for source in sources.by_name.values():
        for name, scale in _scales_of(source).items():
            if scale.attention not in homes:
                home = home_of(scale.attention, modules)
                homes[scale.attention] = modules[home] if home is not None else None
            attention = homes[scale.attention]
            if attention is None:
                continue
            if attention.source == source.name:
                if name not in modules:
                    added[name] = _planned(name, source)
            else:
                offered.setdefault(source.name, {})[scale.attention] = None
    notes = []
    have = {found.attention for name in added if (found := cache_scale(name)) is not None}
    for source_name, attentions in offered.items():
        lacking = [attention for attention in attentions if attention not in have]
        if lacking:
            notes.append(
                f"{some(compress(lacking))}: `{source_name}` has scales for an FP8 KV cache, and the source that these "
                "come from has none: with --kv-cache-dtype fp8_e4m3 their cache has scales of 1"
            )
    if not added:
        return modules, notes
    both = {**modules, **added}
    return {name: both[name] for name in sorted(both, key=natural_key)}, notes


def _scales_of(source: Source) -> Mapping[str, CacheScale]:
    """Parameters of one value that are cache scales, without attention that has zero points, which SGLang ignores."""
    found = {}
    for name, module in source.checkpoint.modules.items():
        scale = cache_scale(name)
        fmt = source.known_format(name)
        if scale is None or fmt is None or fmt.quantized or module.tensors.keys() != {""}:
            continue
        if module.tensors[""].shape in ((), (1,)):
            found[name] = scale
    shifted = {
        name.rpartition(".")[0].removesuffix(".k_proj").removesuffix(".v_proj")
        for name in source.checkpoint.modules
        if name.endswith(("k_zero_point", "v_zero_point"))
    }
    return {name: scale for name, scale in found.items() if scale.attention not in shifted}


def _planned(name: str, source: Source) -> PlannedModule:
    stored = source.checkpoint.modules[name]
    fmt = source.format_of(name)
    tensors = {leaf: PlannedTensor(source.name, tensor) for leaf, tensor in stored.tensors.items()}
    return PlannedModule(name, Role.PARAMETER, fmt, source.name, None, fmt.shape(stored), tensors, follows=True)
