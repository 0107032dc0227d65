"""Kimi-K2.5 to 2.7 (``models/kimi_k25.py``): DeepSeek-V3 under ``language_model.``, with a vision tower.

Kimi-K2 and K2-Thinking are DeepSeek-V3 by their class.

Kimi-K3 (``models/kimi_k3.py``): linear attention (KDA) beside latent attention, each with a gate ``g_proj``, and
experts between two projections of all of them, activated by SiTU. Its class joins weights of small projections, and
multiplies by them without their scales. Outputs of attention (``self_attn.o_proj``) are unquantized in both kinds of
attention, although only those of linear attention have to be.
"""

from __future__ import annotations

from dataclasses import replace

from .base import Family
from .deepseek import DEEPSEEK
from .parts import ExpertActivation, FusedGroup, Restriction, StoredFormat, never_quantized

__all__ = ["KIMI_K3", "KIMI_K25"]

KIMI_K25 = replace(
    DEEPSEEK,
    model_types=frozenset({"kimi_k25"}),
    architectures=frozenset({"KimiK25ForConditionalGeneration"}),
    embedding="language_model.model.embed_tokens",
    head="language_model.lm_head",
    left_out=("language_model.", "model."),
    draft_class=None,  # SGLang has none for this class
    degrees=DEEPSEEK.degrees._replace(encoder=("vt_num_attention_heads", "num_attention_heads"), whole_encoder=True),
)


def _without_scales(_: StoredFormat) -> str:
    return "SGLang's class multiplies by its weight outside of quantization methods, without scales"


def _joined_without_scales(_: StoredFormat) -> str:
    return "SGLang's class joins q_a_proj and kv_a_proj_with_mqa by rows of their weights, and no scales"


def _compiled_for(_: StoredFormat) -> str:
    return (
        "SGLang 0.5.17 compiles a kernel of linear attention for the dtype of its weight, and stops for quantized ones"
    )


def _needs_weight(fmt: StoredFormat) -> str | None:
    return None if fmt.has_weight else "SGLang's class looks for its weight, and packed formats have none of that name"


_COMMON = Family()
_CONVOLUTIONS = "q_conv1d", "k_conv1d", "v_conv1d"
_WITHOUT_SCALES = "f_a_proj", "f_b_proj", "b_proj"
_PLAIN = (
    "routed_expert_down_proj", "routed_expert_up_proj", "self_attention_res_proj", "mlp_res_proj",
    "output_attn_res_proj",
)  # fmt: skip
_OF_ONE_ATTENTION = (
    "A_log", "dt_bias", "o_norm", "q_proj", "k_proj", "v_proj",
    "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj",
)  # fmt: skip
_SHARED = tuple(f"shared_experts.{word}" for word in _COMMON.projections[0].words)

KIMI_K3 = Family(
    model_types=frozenset({"kimi_k3"}),
    architectures=frozenset({"KimiK3ForConditionalGeneration"}),
    embedding="language_model.model.embed_tokens",
    head="language_model.lm_head",
    left_out=("language_model.", "model."),
    inner=(("block_sparse_moe", "mlp"),),
    parameters=frozenset({*_CONVOLUTIONS, *_WITHOUT_SCALES, *_PLAIN}),
    in_some_layers=frozenset({*_CONVOLUTIONS, *_WITHOUT_SCALES, *_OF_ONE_ATTENTION}),
    fused=(
        FusedGroup("qkv_proj", ("q_proj", "k_proj", "v_proj")),  # beside g_proj, with replicas of attention
        FusedGroup("fused_qkvg_proj", ("q_proj", "k_proj", "v_proj", "g_proj")),
        FusedGroup("gate_up_proj", ("gate_proj", "up_proj")),
        *(group for group in DEEPSEEK.fused if group not in _COMMON.fused),
    ),
    activation=ExpertActivation("situ"),
    restrictions=(
        *DEEPSEEK.restrictions,
        Restriction(("q_a_proj", "kv_a_proj_with_mqa"), _joined_without_scales),
        Restriction(_WITHOUT_SCALES, _without_scales),
        Restriction(("self_attn.o_proj",), _compiled_for),
        Restriction(_SHARED, _needs_weight),
        never_quantized(*_PLAIN),
    ),
    taken_in_part=(".self_attn.A_log",),  # a release's is as long as a head, and one entry for each head is used
    checked=True,
    quantized_head=True,
    attention_inputs=DEEPSEEK.attention_inputs | {"g_proj", "f_a_proj", "b_proj"},
    norms_beside=DEEPSEEK.norms_beside,
)
