"""Apertus (``models/apertus.py``): MLPs without a gate, whose activation has parameters."""

from __future__ import annotations

from .base import Family
from .parts import Projections

__all__ = ["APERTUS"]

APERTUS = Family(
    model_types=frozenset({"apertus"}),
    architectures=frozenset({"ApertusForCausalLM"}),
    projections=(Projections(None, "up_proj", "down_proj"),),
    attention_norms=("attention_layernorm",),
    mlp_norms=("feedforward_layernorm",),
    checked=True,
    can_be_cut=True,
    class_loads=(".act_fn.beta", ".act_fn.eps"),  # buffers, and no parameters
    quantized_head=True,
)
