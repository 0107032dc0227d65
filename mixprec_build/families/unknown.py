"""The rules for unknown models."""

from __future__ import annotations

from dataclasses import replace

from .deepseek import DEEPSEEK_RELATIVES
from .qwen2 import QWEN2_MOE

__all__ = ["UNKNOWN"]

UNKNOWN = replace(
    DEEPSEEK_RELATIVES,
    alike=(),
    compared=(),
    draft_layout=None,
    routers=DEEPSEEK_RELATIVES.routers | QWEN2_MOE.routers,
    shared_experts=(*DEEPSEEK_RELATIVES.shared_experts, *QWEN2_MOE.shared_experts),
)
"""The rules of all families where they do not contradict one another: latent attention is in models of many names."""
