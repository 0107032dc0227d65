"""DeepSeek-V2 and V3: latent attention (MLA), shared experts, layers for multi-token prediction.

As ``models/deepseek_v2.py``, ``models/deepseek_nextn.py`` and ``models/deepseek_common/deepseek_weight_loader.py`` of
SGLang 0.5.17 have them.
"""

from __future__ import annotations

from dataclasses import replace

from .base import Family
from .degrees import DegreeLimits
from .draft_class import APPENDED_LAYER, DraftClass
from .draft_layers import NEXTN, NEXTN_OF_RELATIVES
from .parts import ComparedFormats, CutBy, FusedGroup, Restriction, StoredFormat, never_quantized

__all__ = ["DEEPSEEK", "DEEPSEEK_RELATIVES", "DEEPSEEK_V32"]


def _needs_unquantized(_: StoredFormat) -> str:
    return "SGLang reads kv_b_proj outside its quantization methods and needs it unquantized"


def _needs_weight(fmt: StoredFormat) -> str | None:
    if fmt.has_weight:
        return None
    return "SGLang 0.5.17 looks for a weight in q_b_proj, and packed formats have none of that name"


def _joined_by_rows(fmt: StoredFormat) -> str | None:
    """deepseek_weight_loader.py: ``torch.cat`` along the first axis, or the first of two scalars."""
    return None if fmt.row_join_limit is None else f"SGLang joins q_a_proj and kv_a_proj {fmt.row_join_limit}"


_COMMON = Family()
_JOINED = ("q_a_proj", "kv_a_proj_with_mqa")

DEEPSEEK = Family(
    model_types=frozenset({"deepseek_v2", "deepseek_v3", "kimi_k2"}),
    architectures=frozenset({"DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"}),
    fused=(*_COMMON.fused, FusedGroup("fused_qkv_a_proj_with_mqa", _JOINED, ragged_end=True)),
    draft_heads=("shared_head.head",),
    draft_layout=NEXTN,
    draft_class=DraftClass(
        ("DeepseekV3ForCausalLMNextN",), renamed=APPENDED_LAYER, shared=("shared_head.head", "embed_tokens")
    ),
    shared_experts=("shared_experts",),
    restrictions=(
        Restriction(("kv_b_proj",), _needs_unquantized),
        Restriction(("q_b_proj",), _needs_weight),
        Restriction(_JOINED, _joined_by_rows),
    ),
    # models/deepseek_v2.py:774 looks into the methods of shared experts; glm4_moe.py and glm4_moe_lite.py likewise
    compared=(
        ComparedFormats(
            ".shared_experts.gate_up_proj",
            ".shared_experts.down_proj",
            lambda ups, down: ups.shared_experts_limit(down),
        ),
    ),
    checked=True,
    can_be_cut=True,
    degrees=DegreeLimits(ranks_up_to_experts=True),
    cuts={**_COMMON.cuts, "q_b_proj": CutBy.QUERY_HEADS, "kv_b_proj": CutBy.QUERY_HEADS},
    attention_replicas=True,
    quantized_head=True,
    attention_inputs=_COMMON.attention_inputs | {*_JOINED},
    norms_beside={"q_b_proj": "q_a_layernorm", "kv_b_proj": "kv_a_layernorm"},
)

DEEPSEEK_V32 = replace(
    DEEPSEEK,
    model_types=frozenset({"deepseek_v32"}),
    architectures=frozenset({"DeepseekV32ForCausalLM"}),
    restrictions=(*DEEPSEEK.restrictions, never_quantized("indexer.weights_proj")),
)

DEEPSEEK_RELATIVES = replace(
    DEEPSEEK,
    model_types=frozenset(),
    architectures=frozenset(),
    draft_class=None,
    alike=(
        "deepseek", "glm4_moe", "glm_moe", "kimi", "mistral_large_3", "dots_vlm", "longcat", "bailing", "axk1",
    ),
    checked=False,
    can_be_cut=False,
    attention_replicas=False,
    quantized_head=False,
    draft_layout=NEXTN_OF_RELATIVES,
)  # fmt: skip
"""Models whose classes are built on DeepSeek's, or compare the formats of shared experts as it does."""
