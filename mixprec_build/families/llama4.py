"""Llama 4 (``models/mllama4.py`` around ``models/llama4.py``): experts in every layer or in every second.

SGLang's class permutes rows of q and k while it loads them. The decoder is ``language_model.model.`` in releases.
"""

from __future__ import annotations

import re

from .base import Family
from .parts import ExpertActivation, MovedRows, StackedExperts

__all__ = ["LLAMA4"]

_CLASS = "Llama4ForConditionalGeneration"

LLAMA4 = Family(
    model_types=frozenset({"llama4"}),
    architectures=frozenset({_CLASS}),
    embedding="language_model.model.embed_tokens",
    head="language_model.lm_head",
    left_out=("language_model.", "model."),
    # mllama4.py, permute_qk_weight_for_rotary: names that end in `weight`, and no others
    moved=(MovedRows(_CLASS, re.compile(r"(?!.*vision).*\.(q_proj|k_proj|wq|wk)"), within_heads=True),),
    stacked_experts=(
        StackedExperts("gate_up_proj", ("gate_proj", "up_proj"), transposed=True),
        StackedExperts("down_proj", ("down_proj",), transposed=True),
    ),
    activation=ExpertActivation(weighted_inputs=True),
    checked=True,
    can_be_cut=True,
    quantized_head=True,
    # one parameter, of which the class permutes two parts
    class_loads=tuple(f".self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "qkv_proj")),
)
