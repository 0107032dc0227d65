"""Gemma-3's decoder (``models/gemma3_causal.py``): norms before and after each block."""

from __future__ import annotations

from .base import Family

__all__ = ["GEMMA3"]

GEMMA3 = Family(model_types=frozenset({"gemma3_text"}), architectures=frozenset({"Gemma3ForCausalLM"}), checked=True)
