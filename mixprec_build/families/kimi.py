"""Kimi-K2.5 to 2.7 (``models/kimi_k25.py``): DeepSeek-V3 under ``language_model.``, with a vision tower.

Kimi-K2 and K2-Thinking are DeepSeek-V3 by their class.

Of Kimi-K3 (``models/kimi_k3.py``) only the activation of its experts is known here.
"""

from __future__ import annotations

from dataclasses import replace

from .deepseek import DEEPSEEK, DEEPSEEK_RELATIVES
from .parts import ExpertActivation, Restriction, StoredFormat

__all__ = ["KIMI_K3", "KIMI_K25"]

KIMI_K25 = replace(
    DEEPSEEK,
    model_types=frozenset({"kimi_k25"}),
    architectures=frozenset({"KimiK25ForConditionalGeneration"}),
    embedding="language_model.model.embed_tokens",
    head="language_model.lm_head",
    left_out=("language_model.", "model."),
    draft_class=None,  # SGLang has none for this class
)


def _no_mxfp4(fmt: StoredFormat) -> str | None:
    """quantization/mxfp4_marlin_moe.py takes gate and up for rows that alternate where there is an alpha."""
    if fmt.kind != "mxfp4":
        return None
    return "with this activation (SiTU), mixprec serves no experts in MXFP4"


KIMI_K3 = replace(
    DEEPSEEK_RELATIVES,
    model_types=frozenset({"kimi_k3"}),
    architectures=frozenset({"KimiK3ForConditionalGeneration"}),
    alike=(),
    activation=ExpertActivation("situ"),
    restrictions=(*DEEPSEEK_RELATIVES.restrictions, Restriction(("w1", "w2", "w3"), _no_mxfp4)),
)
