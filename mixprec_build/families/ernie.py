"""ERNIE-4.5 (``models/ernie4.py``): dense layers first, shared experts, biases of routers in ``moe_statics``."""

from __future__ import annotations

from .base import Family

__all__ = ["ERNIE"]

ERNIE = Family(
    model_types=frozenset({"ernie4_5", "ernie4_5_moe"}),
    architectures=frozenset({"Ernie4_5_ForCausalLM", "Ernie4_5_MoeForCausalLM"}),
    shared_experts=("shared_experts",),
    checked=True,
)
