"""DeepSeek-V4 (``models/deepseek_v4.py``, its draft layer ``models/deepseek_v4_nextn.py``).

Releases have names of their own: ``layers.0.attn.wq_a``, ``layers.0.ffn.experts.0.w1``, ``embed``, ``head``, ``mtp.0``.
Attention has one key-value head; its output is projected in groups, by ``wo_a`` and then by ``wo_b``. The class
multiplies by ``wo_a`` outside of quantization methods, and dequantizes it to BF16 as it loads it. Some layers compress
keys (``compressor``), some choose among these (``indexer``); the first ones route tokens by a table (``tid2eid``).
Outputs of gate and up are limited (``swiglu_limit``), by SGLang's runners on Triton and Marlin.
"""

from __future__ import annotations

from dataclasses import replace

from .base import Family
from .deepseek import DEEPSEEK
from .draft_class import DraftClass
from .draft_layers import V4_MTP
from .parts import (
    CutBy,
    ExpertActivation,
    FusedGroup,
    Projections,
    Restriction,
    StoredFormat,
    never_quantized,
)

__all__ = ["DEEPSEEK_V4"]


def _dequantized_by_class(fmt: StoredFormat) -> str | None:
    """``_dequant_fp8_wo_a_streaming`` of SGLang 0.5.17."""
    if fmt.fp8_blocks == ("scale", 128, 128):
        return None
    return (
        "SGLang's class dequantizes wo_a by itself, and only from FP8 in blocks of 128 x 128 whose scales are called "
        "`scale`, as DeepSeek's releases have it"
    )


def _needs_weight(fmt: StoredFormat) -> str | None:
    """``DeepseekV2MLP.forward``, where there is a limit."""
    return None if fmt.has_weight else "SGLang's class looks for its weight, and packed formats have none of that name"


_IN_DRAFT = ("e_proj", "h_proj", "enorm", "hnorm", "hc_head_fn", "hc_head_base", "hc_head_scale")

DEEPSEEK_V4 = Family(
    model_types=frozenset({"deepseek_v4"}),
    architectures=frozenset({"DeepseekV4ForCausalLM"}),
    embedding="embed",
    head="head",
    embeddings=frozenset({"embed"}),
    heads=frozenset({"head"}),
    renamed=(
        ("layers.", "model.layers."),
        ("embed", "model.embed_tokens"),
        ("head", "lm_head"),
        ("norm", "model.norm"),
        ("hc_head_", "model.hc_head_"),
    ),
    inner=(
        ("attn", "self_attn"),
        ("ffn", "mlp"),
        ("attn_norm", "input_layernorm"),
        ("ffn_norm", "post_attention_layernorm"),
        ("w1", "gate_proj"),
        ("w3", "up_proj"),
        ("w2", "down_proj"),
        ("gate.bias", "gate.e_score_correction_bias"),
        ("gate.tid2eid", "topk.tid2eid"),
    ),
    in_some_layers=frozenset({"compressor", "indexer"}),
    last_norms=("norm",),
    draft_layout=V4_MTP,
    draft_class=DraftClass(
        ("DeepseekV4ForCausalLMNextN",),
        renamed=(
            *((f"mtp.0.{name}.", f"model.{name}.") for name in _IN_DRAFT),
            ("mtp.0.norm.", "model.shared_head.norm."),
            ("mtp.0.", "model.decoder."),
        ),
        shared=("emb", "head"),
    ),
    fused=(
        FusedGroup("wqkv_a", ("wq_a", "wkv"), ragged_end=True),
        FusedGroup("wkv_gate", ("wkv", "wgate"), within="compressor"),
        FusedGroup("gate_up_proj", ("w1", "w3")),
    ),
    projections=(Projections("w1", "w3", "w2"),),
    activation=ExpertActivation(limit="swiglu_limit"),
    shared_experts=("shared_experts",),
    restrictions=(
        Restriction(("wo_a",), _dequantized_by_class),
        Restriction(("shared_experts.w1", "shared_experts.w3", "shared_experts.w2"), _needs_weight),
        never_quantized("compressor.wkv", "compressor.wgate", "indexer.weights_proj"),
    ),
    compared=tuple(replace(rule, down=".shared_experts.w2") for rule in DEEPSEEK.compared),
    checked=True,
    can_be_cut=True,
    degrees=DEEPSEEK.degrees,
    cuts={
        "embed": CutBy.VOCABULARY,
        "head": CutBy.VOCABULARY,
        "attn.wq_b": CutBy.QUERY_HEADS,
        "wo_a": CutBy.OUTPUT_GROUPS,
        "wo_b": CutBy.GROUP_INPUTS,
    },
    class_loads=(".wo_a",),
    attention_norms=("attn_norm",),
    attention_inputs=frozenset({"wq_a", "wkv", "wgate"}),
    mlp_norms=("ffn_norm",),
    norms_beside={"wq_b": "q_norm"},
    linears_before={"wo_b": "wo_a"},
    joined_before={},
)
