"""Qwen2 and Qwen2-MoE, whose shared expert has a gate of its own (``models/qwen2.py`` and ``models/qwen2_moe.py``)."""

from __future__ import annotations

from .base import Family
from .degrees import DegreeLimits

__all__ = ["QWEN2", "QWEN2_MOE"]

QWEN2 = Family(
    model_types=frozenset({"qwen2"}),
    architectures=frozenset({"Qwen2ForCausalLM"}),
    checked=True,
    can_be_cut=True,
    quantized_head=True,
)

QWEN2_MOE = Family(
    model_types=frozenset({"qwen2_moe"}),
    architectures=frozenset({"Qwen2MoeForCausalLM"}),
    routers=Family().routers | {"shared_expert_gate"},
    shared_experts=("shared_expert",),
    checked=True,
    can_be_cut=True,
    degrees=DegreeLimits(ranks_up_to_experts=True),
    attention_replicas=True,
    quantized_head=True,
)
