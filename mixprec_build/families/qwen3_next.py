"""Qwen3-Next (``models/qwen3_next.py``): as Qwen3.5, with the delta net's projections joined on disk, head by head."""

from __future__ import annotations

from dataclasses import replace

from .base import Family
from .draft_class import DraftClass
from .parts import CutBy, Restriction, StoredFormat
from .qwen3_5 import DELTA_NET, DRAFT_NAMES, QWEN3_5_TEXT

__all__ = ["QWEN3_NEXT"]

_JOINED = frozenset(group.name for group in DELTA_NET)


def _needs_weight(fmt: StoredFormat) -> str | None:
    if fmt.has_weight:
        return None
    return "SGLang's class puts a loader of its own on the weight of in_proj_qkvz, and packed formats have none"


QWEN3_NEXT = replace(
    QWEN3_5_TEXT,
    model_types=frozenset({"qwen3_next"}),
    architectures=frozenset({"Qwen3NextForCausalLM"}),
    draft_class=DraftClass(("Qwen3NextForCausalLMMTP",), renamed=DRAFT_NAMES),
    stacked_experts=(),
    complete_in_replicas=frozenset(),
    restrictions=(*QWEN3_5_TEXT.restrictions, Restriction(tuple(sorted(_JOINED)), _needs_weight)),
    cuts={**QWEN3_5_TEXT.cuts, **dict.fromkeys(_JOINED, CutBy.STATE_KEY_HEADS)},
    attention_inputs=Family().attention_inputs | _JOINED,
)
