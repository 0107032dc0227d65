"""Qwen3-VL, dense and MoE (``models/qwen3_vl.py`` and ``models/qwen3_vl_moe.py``): Qwen3 with a vision tower."""

from __future__ import annotations

from dataclasses import replace

from .parts import StackedExperts
from .qwen3 import QWEN3

__all__ = ["QWEN3_VL"]

QWEN3_VL = replace(
    QWEN3,
    model_types=frozenset({"qwen3_vl", "qwen3_vl_moe"}),
    architectures=frozenset({"Qwen3VLForConditionalGeneration", "Qwen3VLMoeForConditionalGeneration"}),
    embedding="model.language_model.embed_tokens",
    renamed=(("model.language_model.", "model."), ("model.visual.", "visual.")),
    degrees=QWEN3.degrees._replace(
        encoder=("num_heads", "intermediate_size"), positions="num_position_embeddings", whole_encoder=True
    ),
    stacked_experts=(
        StackedExperts("gate_up_proj", ("gate_proj", "up_proj"), transposed=True),
        StackedExperts("down_proj", ("down_proj",), transposed=True),
    ),
)
