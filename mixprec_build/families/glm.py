"""GLM-4.5 to 4.7 (``models/glm4_moe.py``), and GLM-5 (the same file's ``GlmMoeDsaForCausalLM``), which is like
DeepSeek-V3.2.
"""

from __future__ import annotations

from dataclasses import replace

from .base import Family
from .deepseek import DEEPSEEK, DEEPSEEK_V32
from .draft_class import APPENDED_LAYER, DraftClass
from .parts import Restriction, StoredFormat

__all__ = ["GLM4_MOE", "GLM_DSA"]

GLM4_MOE = Family(
    model_types=frozenset({"glm4_moe"}),
    architectures=frozenset({"Glm4MoeForCausalLM"}),
    draft_heads=DEEPSEEK.draft_heads,
    draft_layout=DEEPSEEK.draft_layout,
    draft_class=DraftClass(
        ("Glm4MoeForCausalLMNextN",), renamed=APPENDED_LAYER, shared=("shared_head.head", "embed_tokens")
    ),
    shared_experts=DEEPSEEK.shared_experts,
    compared=DEEPSEEK.compared,
    checked=True,
    can_be_cut=True,
    degrees=DEEPSEEK.degrees,
    attention_replicas=True,
    quantized_head=True,
)


def _dequantized_wk(fmt: StoredFormat) -> str | None:
    """deepseek_weight_loader.py, ``_load_fused_indexer_wk``; only on NVIDIA's GPUs they are joined."""
    if fmt.kind == "fp8_block" and fmt.rows_in_fused == 128:
        return None
    return "SGLang joins wk with weights_proj in BF16, and dequantizes for that FP8 in blocks of 128 only"


GLM_DSA = replace(
    DEEPSEEK_V32,
    # one parameter in BF16 for both, on NVIDIA's GPUs: wk may be dequantized for it
    class_loads=(".indexer.wk", ".indexer.weights_proj", ".indexer.wk_weights_proj"),
    in_some_layers=frozenset({"indexer"}),
    restrictions=(*DEEPSEEK_V32.restrictions, Restriction(("indexer.wk",), _dequantized_wk)),
    model_types=frozenset({"glm_moe_dsa"}),
    architectures=frozenset({"GlmMoeDsaForCausalLM"}),
    draft_class=DraftClass(
        ("GlmMoeDsaForCausalLMNextN", "DeepseekV3ForCausalLMNextN"),
        renamed=APPENDED_LAYER,
        shared=("shared_head.head", "embed_tokens"),
    ),
)
