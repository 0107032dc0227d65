"""InternLM2 (``models/internlm2.py``), which cuts ``wqkv`` into heads of q, k and v as it loads it."""

from __future__ import annotations

import re

from .base import Family
from .parts import CutBy, FusedGroup, MovedRows

__all__ = ["INTERNLM2"]

_CLASS = "InternLM2ForCausalLM"

INTERNLM2 = Family(
    model_types=frozenset({"internlm2"}),
    architectures=frozenset({_CLASS}),
    embedding="model.tok_embeddings",
    head="output",
    embeddings=frozenset({"tok_embeddings"}),
    heads=frozenset({"output"}),
    fused=(FusedGroup("gate_up_proj", ("w1", "w3")),),
    moved=(MovedRows(_CLASS, re.compile(r".*\.wqkv")),),
    attention_inputs=frozenset({"wqkv"}),
    checked=True,
    can_be_cut=True,
    cuts={
        "wqkv": CutBy.QKV_SECTIONS,
        "wo": CutBy.HEAD_INPUTS,
        "tok_embeddings": CutBy.VOCABULARY,
        "output": CutBy.VOCABULARY,
    },
    class_loads=(".attention.wqkv",),
)
