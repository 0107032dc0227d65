"""Qwen3.5 to 3.8, dense and MoE (``models/qwen3_5.py`` and ``models/qwen3_5_text.py``).

Some layers have attention with a gate in ``q_proj``, others a gated delta net, whose projections SGLang joins. The
class drops ``.self_attn`` from its parameters' names.
"""

from __future__ import annotations

from dataclasses import replace

from .base import Family
from .draft_class import DraftClass
from .draft_layers import QWEN_MTP
from .parts import CutBy, FusedGroup, StackedExperts
from .qwen2 import QWEN2_MOE
from .qwen3_vl import QWEN3_VL

__all__ = ["DELTA_NET", "DRAFT_NAMES", "QWEN3_5", "QWEN3_5_TEXT"]

_COMMON = Family()

DELTA_NET = (
    FusedGroup("in_proj_qkvz", ("in_proj_qkv", "in_proj_z")),
    FusedGroup("in_proj_ba", ("in_proj_b", "in_proj_a")),
)

DRAFT_NAMES = (("mtp.layers.", "model.layers."), ("mtp.norm.", "model.norm."), ("mtp.", ""))

QWEN3_5_TEXT = Family(
    model_types=frozenset({"qwen3_5_text", "qwen3_5_moe_text"}),
    architectures=frozenset({"Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM"}),
    dropped=("self_attn",),
    draft_class=DraftClass(("Qwen3_5ForCausalLMMTP",), renamed=DRAFT_NAMES),
    fused=(*_COMMON.fused, *DELTA_NET),
    routers=QWEN2_MOE.routers,
    shared_experts=QWEN2_MOE.shared_experts,
    stacked_experts=(
        StackedExperts("gate_up_proj", ("gate_proj", "up_proj")),
        StackedExperts("down_proj", ("down_proj",)),
    ),
    checked=True,
    can_be_cut=True,
    degrees=QWEN2_MOE.degrees,
    attention_replicas=True,
    complete_in_replicas=frozenset({"embed_tokens"}),
    quantized_head=True,
    draft_layout=QWEN_MTP,
    cuts={
        **_COMMON.cuts,
        **dict.fromkeys(("in_proj_qkv", "conv1d"), CutBy.STATE_SECTIONS),
        **dict.fromkeys(("in_proj_z", "in_proj_b", "in_proj_a", "A_log", "dt_bias"), CutBy.STATE_VALUE_HEADS),
        "out_proj": CutBy.STATE_INPUTS,
    },
    attention_inputs=_COMMON.attention_inputs | {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"},
)

QWEN3_5 = replace(
    QWEN3_5_TEXT,
    model_types=frozenset({"qwen3_5", "qwen3_5_moe"}),
    architectures=frozenset({"Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"}),
    embedding="model.language_model.embed_tokens",
    renamed=(("model.language_model.", "model."), ("model.visual.", "visual.")),
    degrees=QWEN3_VL.degrees,
)
