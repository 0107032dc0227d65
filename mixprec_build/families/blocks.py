"""Names of norms and linears by what they feed, and linears at the start of a block, whose names no family lists."""

from __future__ import annotations

import re

__all__ = [
    "ATTENTION",
    "ATTENTION_NORMS",
    "JOINED_BEFORE",
    "LINEARS_BEFORE",
    "MLP",
    "MLP_NORMS",
    "block_fed_by_norm",
]

ATTENTION, MLP = "attention", "mlp"

ATTENTION_NORMS = (
    "input_layernorm", "attention_norm", "ln_1", "norm1", "self_attn_layer_norm", "pre_attention_layernorm",
    "operator_norm", "norm",
)  # fmt: skip
MLP_NORMS = (
    "pre_feedforward_layernorm", "pre_mlp_layernorm", "post_attention_layernorm", "ffn_norm", "ln_2", "norm2",
    "final_layer_norm", "pre_ff_layernorm", "post_mixer_norm",
    *ATTENTION_NORMS,  # one norm feeds both blocks where they run in parallel
)  # fmt: skip
LINEARS_BEFORE = {
    "o_proj": "v_proj", "wo": "wv", "out_proj": "v_proj",
    "fc2": "fc1", "dense_4h_to_h": "dense_h_to_4h", "c_proj": "c_fc",
}  # fmt: skip
JOINED_BEFORE = {
    "o_proj": ("qkv_proj", "W_pack", "kv_b_proj"), "down_proj": ("gate_up_proj",), "wo": ("wqkv",),
    "dense": ("query_key_value",), "out_proj": ("in_proj_qkv",), "w2": ("w13",),
}  # fmt: skip

_ATTENTION_BLOCK = re.compile(
    r"(.*\.)?(self_attn|attn|attention|linear_attn|self_attention|mixer|mamba|conv|temporal_block)(\.indexer)?"
)
_MLP_BLOCK = re.compile(
    r"(.*\.)?(mlp|feed_forward|ffn|moe|block_sparse_moe|experts|shared_experts?|router|gate)(\..*)?"
)
# Linears at the end of a block, or in the middle of it: what feeds them is in the block, too.
_INSIDE = re.compile(
    r"o_proj|down_proj|w2|wo|wo_a|wo_b|out_proj|c_proj|dense|dense_4h_to_h|fc2|fc_out|output_linear|.*norm\d?|.*_(a|b)_proj|wq_b|"
    r".*(bias|scale|A_log|conv1d)|D"
)


def block_fed_by_norm(block: str, last: str) -> str | None:
    """``ATTENTION`` or ``MLP`` if the linear ``last`` is at the start of ``block``, so that the layer's norm feeds it.

    ``block`` is the block's name within the layer. None for other linears.
    """
    if _INSIDE.fullmatch(last):
        return None
    return MLP if _MLP_BLOCK.fullmatch(block) else ATTENTION if _ATTENTION_BLOCK.fullmatch(block) else None
