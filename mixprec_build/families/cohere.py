"""Command-R and Command-A (``models/commandr.py``): attention and MLP in parallel, after one norm."""

from __future__ import annotations

from .base import Family

__all__ = ["COHERE"]

COHERE = Family(
    model_types=frozenset({"cohere", "cohere2"}),
    architectures=frozenset({"CohereForCausalLM", "Cohere2ForCausalLM"}),
    checked=True,
)
