"""Names, shapes and dtypes of all tensors of DeepSeek-V4's releases, and a tiny model."""

from __future__ import annotations

from support.family_parts import (
    _MOE,
    _OUTER,
    _YARN,
    EXPERTS,
    HIDDEN,
    Config,
    Tensor,
    Tensors,
    TinyModel,
    _experts,
    _linear,
    _mlp,
    _norm,
)

__all__ = ["DEEPSEEK_V4", "DEEPSEEK_V4_LINES", "deepseek_v4_tensors", "tiny_deepseek_v4"]

_NAMES = ("w1", "w3", "w2")

DEEPSEEK_V4: Config = {
    **_MOE, **_OUTER, "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "hidden_size": HIDDEN,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128, "vocab_size": 512,
    "qk_rope_head_dim": 64, "q_lora_rank": 256, "o_lora_rank": 128, "o_groups": 2, "compress_ratios": [0, 4, 128, 4, 0],
    "index_head_dim": 128, "index_n_heads": 4, "index_topk": 512, "hc_mult": 4, "hc_eps": 1e-6, "hc_sinkhorn_iters": 20,
    "num_hash_layers": 2, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_nextn_predict_layers": 1,
    "topk_method": "noaux_tc", "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5, "swiglu_limit": 10.0,
    "sliding_window": 128, "rope_theta": 10000, "compress_rope_theta": 160000, "rope_scaling": _YARN,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-6, "hidden_act": "silu", "expert_dtype": "fp4",
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def _compressor(p: str, c: Config, size: int, ratio: int) -> Tensors:
    width = 2 * size if ratio == 4 else size
    yield Tensor(f"{p}ape", (ratio, width), dtype="F32")
    yield from _linear(f"{p}wkv", width, c["hidden_size"], linear=False)
    yield from _linear(f"{p}wgate", width, c["hidden_size"], linear=False)
    yield from _norm(f"{p}norm", size)


def _attention(p: str, c: Config, ratio: int) -> Tensors:
    hidden, rank, heads, size = c["hidden_size"], c["q_lora_rank"], c["num_attention_heads"], c["head_dim"]
    inner = c["o_groups"] * c["o_lora_rank"]
    yield Tensor(f"{p}attn_sink", (heads,), dtype="F32")
    yield from _linear(f"{p}wq_a", rank, hidden)
    yield from _norm(f"{p}q_norm", rank)
    yield from _linear(f"{p}wq_b", heads * size, rank)
    yield from _linear(f"{p}wkv", size, hidden)
    yield from _norm(f"{p}kv_norm", size)
    yield from _linear(f"{p}wo_a", inner, heads * size // c["o_groups"])
    yield from _linear(f"{p}wo_b", hidden, inner)
    if ratio:
        yield from _compressor(f"{p}compressor.", c, size, ratio)
    if ratio == 4:
        yield from _linear(f"{p}indexer.wq_b", c["index_n_heads"] * c["index_head_dim"], rank)
        yield from _linear(f"{p}indexer.weights_proj", c["index_n_heads"], hidden, linear=False)
        yield from _compressor(f"{p}indexer.compressor.", c, c["index_head_dim"], ratio)


def _mixing(p: str, streams: int, hidden: int) -> Tensors:
    mixes = (2 + streams) * streams
    for name in ("hc_attn", "hc_ffn"):
        yield Tensor(f"{p}{name}_fn", (mixes, streams * hidden), dtype="F32")
        yield Tensor(f"{p}{name}_base", (mixes,), dtype="F32")
        yield Tensor(f"{p}{name}_scale", (3,), dtype="F32")


def _last_mixing(p: str, streams: int, hidden: int) -> Tensors:
    yield Tensor(f"{p}hc_head_fn", (streams, streams * hidden), dtype="F32")
    yield Tensor(f"{p}hc_head_base", (streams,), dtype="F32")
    yield Tensor(f"{p}hc_head_scale", (1,), dtype="F32")


def _layer(p: str, c: Config, ratio: int, *, by_table: bool) -> Tensors:
    hidden = c["hidden_size"]
    yield from _attention(f"{p}attn.", c, ratio)
    yield from _norm(f"{p}attn_norm", hidden)
    yield from _linear(f"{p}ffn.gate", c["n_routed_experts"], hidden, linear=False)
    if by_table:
        yield Tensor(f"{p}ffn.gate.tid2eid", (c["vocab_size"], c["num_experts_per_tok"]), dtype="I64")
    else:
        yield Tensor(f"{p}ffn.gate.bias", (c["n_routed_experts"],), dtype="F32")
    yield from _experts(f"{p}ffn.", c["n_routed_experts"], hidden, c["moe_intermediate_size"], names=_NAMES)
    yield from _mlp(f"{p}ffn.shared_experts.", hidden, c["moe_intermediate_size"] * c["n_shared_experts"], _NAMES)
    yield from _norm(f"{p}ffn_norm", hidden)
    yield from _mixing(p, c["hc_mult"], hidden)


def deepseek_v4_tensors(config: Config) -> Tensors:
    hidden, streams, table = config["hidden_size"], config["hc_mult"], (config["vocab_size"], config["hidden_size"])
    yield Tensor("embed.weight", table)
    for layer in range(config["num_hidden_layers"]):
        ratio = config["compress_ratios"][layer]
        yield from _layer(f"layers.{layer}.", config, ratio, by_table=layer < config["num_hash_layers"])
    yield from _norm("norm", hidden)
    yield from _last_mixing("", streams, hidden)
    yield Tensor("head.weight", table)
    for layer in range(config["num_nextn_predict_layers"]):
        at = f"mtp.{layer}."
        yield from _layer(at, config, 0, by_table=False)
        yield from _linear(f"{at}e_proj", hidden, hidden)
        yield from _linear(f"{at}h_proj", hidden, hidden)
        for name in ("enorm", "hnorm", "norm"):
            yield from _norm(f"{at}{name}", hidden)
        yield from _last_mixing(at, streams, hidden)


DEEPSEEK_V4_LINES = {
    "*.attn.*": "v4_fp8", "layers.3.attn.{wq_a,wkv}": "bf16", "*.shared_experts.*": "v4_fp8",
    "*.ffn.experts.*": "v4_mxfp4", "layers.1.ffn.experts.{0..2}.*": "v4_fp8", "layers.2.ffn.experts.*": "v4_fp8",
}  # fmt: skip


def tiny_deepseek_v4() -> TinyModel:
    return TinyModel(DEEPSEEK_V4, DEEPSEEK_V4_LINES, degrees=((2, 1), (2, 2)))
