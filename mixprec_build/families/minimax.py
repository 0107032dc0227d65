"""MiniMax-M2 (``models/minimax_m2.py``): Mixtral's names of experts, and norms over all heads, cut with these; and
MiniMax-M3 (``models/minimax_m3.py``), alone or beside an encoder of images (``models/minimax_m3_vl.py``).

M3's sparse attention chooses blocks of keys by q and k of a small index beside its own, ``index_q_proj`` and
``index_k_proj``. Releases have no ``index_v_proj`` (``sparse_disable_index_value``). Experts, shared experts and dense
layers are activated as gpt-oss's, without biases. On GPUs its class joins ``qkv_proj`` and ``index_qkv_proj`` after
loading, where both are unquantized.
"""

from __future__ import annotations

from dataclasses import replace

from .base import Family
from .degrees import DegreeLimits
from .parts import CutBy, ExpertActivation, FusedGroup

__all__ = ["MINIMAX_M2", "MINIMAX_M3", "MINIMAX_M3_IMAGES"]

_COMMON = Family()

MINIMAX_M2 = Family(
    model_types=frozenset({"minimax_m2"}),
    architectures=frozenset({"MiniMaxM2ForCausalLM"}),
    checked=True,
    can_be_cut=True,
    degrees=DegreeLimits(ranks_up_to_experts=True),
    cuts={**_COMMON.cuts, "q_norm": CutBy.QUERY_HEADS, "k_norm": CutBy.KEY_VALUE_HEADS},
    attention_replicas=True,
)


MINIMAX_M3 = Family(
    model_types=frozenset({"minimax_m3"}),
    architectures=frozenset({"MiniMaxM3SparseForCausalLM"}),
    inner=(("block_sparse_moe", "mlp"),),
    fused=(*_COMMON.fused, FusedGroup("index_qkv_proj", ("index_q_proj", "index_k_proj", "index_v_proj"))),
    in_some_layers=frozenset({"index_q_proj", "index_k_proj", "index_q_norm", "index_k_norm"}),
    shared_experts=("shared_experts",),
    activation=ExpertActivation("swiglu_oai"),
    checked=True,
    can_be_cut=True,
    degrees=MINIMAX_M2.degrees,
    cuts={**_COMMON.cuts, "index_q_proj": CutBy.INDEX_HEADS},
    attention_replicas=True,
    quantized_head=True,
    attention_inputs=_COMMON.attention_inputs | {"index_q_proj", "index_k_proj", "index_v_proj"},
)

MINIMAX_M3_IMAGES = replace(
    MINIMAX_M3,
    model_types=frozenset({"minimax_m3_vl"}),
    architectures=frozenset({"MiniMaxM3SparseForConditionalGeneration"}),
    embedding="language_model.model.embed_tokens",
    head="language_model.lm_head",
    renamed=(("language_model.model.", "model."), ("language_model.lm_head", "lm_head")),
    degrees=MINIMAX_M2.degrees._replace(encoder=("num_attention_heads", "intermediate_size"), whole_encoder=True),
    in_prefixes=(("language_model.model", "model"), ("language_model.lm_head", "lm_head")),
)
