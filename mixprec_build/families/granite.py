"""Granite, dense (``models/granite.py``): the common rules."""

from __future__ import annotations

from .base import Family

__all__ = ["GRANITE"]

GRANITE = Family(model_types=frozenset({"granite"}), architectures=frozenset({"GraniteForCausalLM"}), checked=True)
