"""Gemma-3 and Gemma-4 (``models/gemma3_causal.py``, ``models/gemma4_causal.py``; ``gemma3_mm.py`` and
``gemma4_mm.py`` beside an encoder of images): norms before and after each block. Every rank has all of the embedding.

Some of Gemma-4 have experts beside the MLP of each layer, some embeddings of their own for each layer.
"""

from __future__ import annotations

from dataclasses import replace

from .base import Family
from .degrees import DegreeLimits
from .parts import ExpertActivation, OtherHeads, StackedExperts

__all__ = ["GEMMA3", "GEMMA3_IMAGES", "GEMMA4", "GEMMA4_IMAGES"]

_COMMON = Family()
_CUTS = {word: cut for word, cut in _COMMON.cuts.items() if word != "embed_tokens"}

GEMMA3 = Family(
    model_types=frozenset({"gemma3_text"}),
    architectures=frozenset({"Gemma3ForCausalLM"}),
    checked=True,
    can_be_cut=True,
    cuts=_CUTS,
)

GEMMA3_IMAGES = replace(
    GEMMA3,
    model_types=frozenset({"gemma3"}),
    architectures=frozenset({"Gemma3ForConditionalGeneration"}),
    embedding="language_model.model.embed_tokens",
    head="language_model.lm_head",
    degrees=DegreeLimits(encoder=("num_attention_heads", "intermediate_size"), positions="image_size"),
)

GEMMA4 = Family(
    model_types=frozenset({"gemma4_text"}),
    architectures=frozenset({"Gemma4ForCausalLM"}),
    embeddings=_COMMON.embeddings | {"embed_tokens_per_layer"},
    inner=(("experts", "moe.experts"), ("router.per_expert_scale", "moe.per_expert_scale")),
    routers=frozenset({"router", "router.proj"}),
    in_some_layers=frozenset({"v_proj"}),  # in others, values are keys
    activation=ExpertActivation("gelu"),
    stacked_experts=(
        StackedExperts("gate_up_proj", ("gate_proj", "up_proj")),
        StackedExperts("down_proj", ("down_proj",)),
    ),
    checked=True,
    can_be_cut=True,
    cuts=_CUTS,
    # of some layers, the class loads keys as values, too; `layer_scalar` is a buffer
    class_loads=(*(f".self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "qkv_proj")), ".layer_scalar"),
)

GEMMA4_IMAGES = replace(
    GEMMA4,
    model_types=frozenset({"gemma4"}),
    architectures=frozenset({"Gemma4ForConditionalGeneration"}),
    embedding="model.language_model.embed_tokens",
    renamed=(("model.", ""),),
    in_prefixes=(("model.language_model", "language_model"),),
    other_heads=OtherHeads("layer_types", "full_attention", "num_attention_heads", "num_global_key_value_heads"),
    degrees=DegreeLimits(encoder=("num_attention_heads", "num_key_value_heads", "intermediate_size")),
)
