"""Kimi-K2.5 to 2.7 (``models/kimi_k25.py``): DeepSeek-V3 under ``language_model.``, with a vision tower.

Kimi-K2 and K2-Thinking are DeepSeek-V3 by their class.
"""

from __future__ import annotations

from dataclasses import replace

from .deepseek import DEEPSEEK

__all__ = ["KIMI_K25"]

KIMI_K25 = replace(
    DEEPSEEK,
    model_types=frozenset({"kimi_k25"}),
    architectures=frozenset({"KimiK25ForConditionalGeneration"}),
    embedding="language_model.model.embed_tokens",
    head="language_model.lm_head",
    left_out=("language_model.", "model."),
    draft_class=None,  # SGLang has none for this class
)
