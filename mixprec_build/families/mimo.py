"""MiMo-V2 (``models/mimo_v2.py``): heads of values smaller than those of keys, and windows with attention sinks."""

from __future__ import annotations

from .base import Family
from .degrees import DegreeLimits
from .draft_layers import MIMO_V2_MTP
from .parts import CutBy, OtherHeads, Restriction, StoredFormat

__all__ = ["MIMO_V2"]


def _joined_on_disk(fmt: StoredFormat) -> str:
    """``load_mimo_v2_qkv_proj_weight`` and ``_resolve_deferred_qkv_scale_inv``."""
    return "SGLang takes q, k and v that are joined on disk apart while loading, and quantizes FP8 of them once more"


MIMO_V2 = Family(
    model_types=frozenset({"mimo_v2", "mimo_v2_flash"}),
    architectures=frozenset({"MiMoV2ForCausalLM", "MiMoV2FlashForCausalLM"}),
    checked=True,
    can_be_cut=True,
    degrees=DegreeLimits(ranks_up_to_experts=True),
    cuts={**Family().cuts, "attention_sink_bias": CutBy.QUERY_HEADS},
    other_heads=OtherHeads("hybrid_layer_pattern", 1, "swa_num_attention_heads", "swa_num_key_value_heads"),
    quantized_head=True,
    restrictions=(Restriction(("self_attn.qkv_proj",), _joined_on_disk),),
    draft_layout=MIMO_V2_MTP,
)
