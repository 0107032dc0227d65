"""MiniMax-M2 (``models/minimax_m2.py``): Mixtral's names of experts, and norms over all heads, cut with these."""

from __future__ import annotations

from .base import Family
from .parts import CutBy

__all__ = ["MINIMAX_M2"]

MINIMAX_M2 = Family(
    model_types=frozenset({"minimax_m2"}),
    architectures=frozenset({"MiniMaxM2ForCausalLM"}),
    checked=True,
    can_be_cut=True,
    cuts={**Family().cuts, "q_norm": CutBy.QUERY_HEADS, "k_norm": CutBy.KEY_VALUE_HEADS},
    attention_replicas=True,
)
