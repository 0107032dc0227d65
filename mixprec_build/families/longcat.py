"""LongCat-Flash (``models/longcat_flash.py``): in each layer two blocks of DeepSeek's attention, two dense MLPs, and
experts of which some do nothing.
"""

from __future__ import annotations

from dataclasses import replace

from .deepseek import DEEPSEEK
from .draft_layers import LONGCAT_MTP

__all__ = ["LONGCAT"]

LONGCAT = replace(
    DEEPSEEK,
    model_types=frozenset({"longcat_flash"}),
    architectures=frozenset({"LongcatFlashForCausalLM"}),
    routers=frozenset({"classifier"}),
    shared_experts=(),
    compared=(),
    draft_heads=(),
    draft_layout=LONGCAT_MTP,
    draft_class=None,
    attention_replicas=False,
)
