"""Ling and Ring, up to 2.0 (``models/bailing_moe.py``): q, k and v joined on disk, shared experts, a router in F32."""

from __future__ import annotations

from .base import Family
from .draft_layers import BAILING_NEXTN
from .parts import CutBy

__all__ = ["BAILING_MOE"]

BAILING_MOE = Family(
    model_types=frozenset({"bailing_moe", "bailing_moe_v2"}),
    architectures=frozenset({"BailingMoEForCausalLM", "BailingMoeForCausalLM", "BailingMoeV2ForCausalLM"}),
    embedding="model.word_embeddings",
    attention_inputs=frozenset({"query_key_value"}),
    checked=True,
    can_be_cut=True,
    cuts={
        "query_key_value": CutBy.QKV_SECTIONS,
        "attention.dense": CutBy.HEAD_INPUTS,
        "word_embeddings": CutBy.VOCABULARY,
        "lm_head": CutBy.VOCABULARY,
    },
    quantized_head=True,
    draft_layout=BAILING_NEXTN,
)
