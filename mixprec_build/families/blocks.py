"""Finds linears at the start of a block, whose names no family lists."""

from __future__ import annotations

import re

__all__ = ["ATTENTION", "MLP", "block_fed_by_norm"]

ATTENTION, MLP = "attention", "mlp"

_ATTENTION_BLOCK = re.compile(
    r"(.*\.)?(self_attn|attn|attention|linear_attn|self_attention|mixer|mamba|conv|temporal_block)(\.indexer)?"
)
_MLP_BLOCK = re.compile(
    r"(.*\.)?(mlp|feed_forward|ffn|moe|block_sparse_moe|experts|shared_experts?|router|gate)(\..*)?"
)
# Linears at the end of a block, or in the middle of it: what feeds them is in the block, too.
_INSIDE = re.compile(
    r"o_proj|down_proj|w2|wo|out_proj|c_proj|dense|dense_4h_to_h|fc2|fc_out|output_linear|.*norm\d?|.*_(a|b)_proj|wq_b|"
    r".*(bias|scale|A_log|conv1d)|D"
)


def block_fed_by_norm(block: str, last: str) -> str | None:
    """``ATTENTION`` or ``MLP`` if the linear ``last`` is at the start of ``block``, so that the layer's norm feeds it.

    ``block`` is the block's name within the layer. None for other linears.
    """
    if _INSIDE.fullmatch(last):
        return None
    return MLP if _MLP_BLOCK.fullmatch(block) else ATTENTION if _ATTENTION_BLOCK.fullmatch(block) else None
