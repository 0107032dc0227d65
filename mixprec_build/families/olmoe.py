"""OLMoE (``models/olmoe.py``): the common rules, norms over all heads.

The class keeps these norms complete on ranks that have a share of the heads, and so runs on one rank only.
"""

from __future__ import annotations

from .base import Family

__all__ = ["OLMOE"]

OLMOE = Family(
    model_types=frozenset({"olmoe"}),
    architectures=frozenset({"OlmoeForCausalLM"}),
    checked=True,
    can_be_cut=True,
    quantized_head=True,
)
