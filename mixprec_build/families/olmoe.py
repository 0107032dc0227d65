"""OLMoE (``models/olmoe.py``): the common rules, norms over all heads."""

from __future__ import annotations

from .base import Family

__all__ = ["OLMOE"]

OLMOE = Family(model_types=frozenset({"olmoe"}), architectures=frozenset({"OlmoeForCausalLM"}), checked=True)
