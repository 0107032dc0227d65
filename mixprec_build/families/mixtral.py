"""Mixtral: experts ``block_sparse_moe.experts.N.{w1,w2,w3}``, which the common rules have."""

from __future__ import annotations

from .base import Family

__all__ = ["MIXTRAL"]

MIXTRAL = Family(
    model_types=frozenset({"mixtral"}),
    architectures=frozenset({"MixtralForCausalLM"}),
    checked=True,
    can_be_cut=True,
)
