"""Qwen3 and Qwen3-MoE (``models/qwen3.py`` and ``models/qwen3_moe.py``): the common rules, attention in replicas."""

from __future__ import annotations

from .base import Family
from .degrees import DegreeLimits
from .draft_layers import QWEN_MTP

__all__ = ["QWEN3"]

QWEN3 = Family(
    model_types=frozenset({"qwen3", "qwen3_moe"}),
    architectures=frozenset({"Qwen3ForCausalLM", "Qwen3MoeForCausalLM"}),
    checked=True,
    can_be_cut=True,
    degrees=DegreeLimits(ranks_up_to_experts=True),
    attention_replicas=True,
    quantized_head=True,
    draft_layout=QWEN_MTP,
)
