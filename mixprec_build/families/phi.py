"""Phi-3 and Phi-4 (``Phi3ForCausalLM`` in ``models/llama.py``): ``qkv_proj`` and ``gate_up_proj`` joined on disk."""

from __future__ import annotations

from .base import Family

__all__ = ["PHI3"]

PHI3 = Family(
    model_types=frozenset({"phi3"}),
    architectures=frozenset({"Phi3ForCausalLM"}),
    checked=True,
    attention_inputs=frozenset({"qkv_proj"}),
)
