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


def _of_shared_experts(ups: StoredFormat, down: StoredFormat) -> str | None:
    """models/glm4_moe.py:489 looks at the dtype of a parameter that packed values of compressed-tensors lack there;
    models/deepseek_v2.py gives them that name."""
    if ups.quantized and not ups.has_weight and ups.kind != "awq_int4":  # the class asks for AWQ by its name
        return f"SGLang looks for a weight in shared experts' gate and up, and {ups.kind} has none of that name"
    return ups.shared_experts_limit(down)


GLM4_MOE = Family(
    model_types=frozenset({"glm4_moe"}),
    architectures=frozenset({"Glm4MoeForCausalLM"}),
    draft_heads=DEEPSEEK.draft_heads,
    draft_layout=DEEPSEEK.draft_layout,
    draft_class=DraftClass(
        ("Glm4MoeForCausalLMNextN",), renamed=APPENDED_LAYER, shared=("shared_head.head", "embed_tokens")
    ),
    shared_experts=DEEPSEEK.shared_experts,
    compared=tuple(replace(rule, limit=_of_shared_experts) for rule in DEEPSEEK.compared),
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
