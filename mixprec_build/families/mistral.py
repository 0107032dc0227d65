"""Mistral-Small-3 beside its encoder of images (``models/mistral.py``, ``Mistral3ForConditionalGeneration``).

Releases call the decoder ``language_model.model.``, as SGLang does; those that transformers 5 wrote have all tensors
below ``model.``, the decoder's below ``model.language_model.``, but for ``lm_head``.
"""

from __future__ import annotations

from .base import Family
from .degrees import DegreeLimits

__all__ = ["MISTRAL3"]

MISTRAL3 = Family(
    model_types=frozenset({"mistral3"}),
    architectures=frozenset({"Mistral3ForConditionalGeneration"}),
    embedding="language_model.model.embed_tokens",
    head="language_model.lm_head",
    renamed=(
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head", "language_model.lm_head"),
    ),
    left_out=("language_model.", "model."),
    checked=True,
    can_be_cut=True,
    degrees=DegreeLimits(encoder=("num_attention_heads", "intermediate_size")),
    quantized_head=True,
)
