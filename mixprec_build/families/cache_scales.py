"""Scales of an FP8 KV cache: their names in checkpoints, and SGLang's parameters for them.

llm-compressor calls them ``self_attn.k_scale`` and ``.v_scale``, ModelOpt ``self_attn.k_proj.k_scale``, Quark
``self_attn.k_proj.output_scale``, AutoFP8 has one ``self_attn.kv_scale`` for both. SGLang 0.5.17 has parameters
``k_scale`` and ``v_scale`` in its attention (``layers/quantization/kv_cache.py``), and uses them with
``--kv-cache-dtype fp8_e4m3`` only.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

__all__ = ["CacheScale", "cache_scale", "home_of", "parameters_of"]


_SCALE = re.compile(
    r"(?P<attention>.+?)\.(?:kv_scale|(?:attn\.)?(?P<plain>[kv])_scale|(?P<modelopt>[kv])_proj\.(?P=modelopt)_scale"
    r"|(?P<quark>[kv])_proj\.output_scale)"
)


class CacheScale(NamedTuple):
    """A scale of one attention's cache."""

    attention: str
    """``model.layers.0.self_attn``."""
    leaves: tuple[str, ...]
    """``k_scale``, ``v_scale`` or both."""


def cache_scale(name: str) -> CacheScale | None:
    """Parses the name of a cache scale; None for other names, and for scales that SGLang does not load."""
    if not name.endswith("_scale"):
        return None
    found = _SCALE.fullmatch(name)
    if found is None:
        return None
    of = found["plain"] or found["modelopt"] or found["quark"] or "kv"
    return CacheScale(found["attention"], tuple(f"{one}_scale" for one in of))


def home_of(attention: str, modules: Collection[str]) -> str | None:
    """The module that computes an attention's keys, perhaps with its values; None where there is none."""
    names = (f"{attention}.{last}" for last in ("k_proj", "kv_a_proj_with_mqa", "qkv_proj"))
    return next((name for name in names if name in modules), None)


def parameters_of(scale: CacheScale, modules: Collection[str]) -> list[str]:
    """SGLang's parameters for a scale in a model with ``modules``; latent attention has them elsewhere."""
    latent = f"{scale.attention}.kv_a_proj_with_mqa" in modules
    return [f"{scale.attention}.{'attn_mqa' if latent else 'attn'}.{leaf}" for leaf in scale.leaves]
