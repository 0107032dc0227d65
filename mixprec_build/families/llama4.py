"""Llama 4, whose rows SGLang permutes while loading; the rest is as in unknown models."""

from __future__ import annotations

import re
from dataclasses import replace

from .parts import MovedRows
from .unknown import UNKNOWN

__all__ = ["LLAMA4"]

_CLASS = "Llama4ForConditionalGeneration"

LLAMA4 = replace(
    UNKNOWN,
    model_types=frozenset({"llama4"}),
    architectures=frozenset({_CLASS}),
    # mllama4.py, permute_qk_weight_for_rotary: names that end in `weight`, and no others
    moved=(MovedRows(_CLASS, re.compile(r"(?!.*vision).*\.(q_proj|k_proj|wq|wk)"), within_heads=True),),
)
