"""Llama and Mistral (``models/llama.py`` and ``models/mistral.py``): the common rules only."""

from __future__ import annotations

from .base import Family

__all__ = ["LLAMA"]

LLAMA = Family(
    model_types=frozenset({"llama", "mistral"}),
    architectures=frozenset({"LlamaForCausalLM", "MistralForCausalLM"}),
    checked=True,
    can_be_cut=True,
    quantized_head=True,
)
