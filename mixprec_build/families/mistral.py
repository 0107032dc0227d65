"""Mistral-Small-3 beside its encoder of images (``models/mistral.py``, ``Mistral3ForConditionalGeneration``).

Releases call the decoder ``language_model.model.``, as SGLang does, or ``model.language_model.``.
"""

from __future__ import annotations

from .base import Family

__all__ = ["MISTRAL3"]

MISTRAL3 = Family(
    model_types=frozenset({"mistral3"}),
    architectures=frozenset({"Mistral3ForConditionalGeneration"}),
    embedding="language_model.model.embed_tokens",
    head="language_model.lm_head",
    renamed=(("model.language_model.", "language_model.model."),),
    left_out=("language_model.", "model."),
    checked=True,
    can_be_cut=True,
)
