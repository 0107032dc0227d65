"""Parts of checkpoints of model families: tensors of blocks, and settings of tiny models.

``p`` is the prefix of names, with its dot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Config = dict[str, Any]
Shape = tuple[int, ...]


class Tensor(NamedTuple):
    """A tensor of an unquantized checkpoint."""

    name: str
    shape: Shape
    linear: bool = False
    """Whether it is a weight ``[N, K]`` that quantized releases quantize."""
    dtype: str = "BF16"


Tensors = Iterator[Tensor]


def _linear(name: str, outputs: int, inputs: int, *, bias: bool = False, linear: bool = True) -> Tensors:
    yield Tensor(f"{name}.weight", (outputs, inputs), linear)
    if bias:
        yield Tensor(f"{name}.bias", (outputs,))


def _norm(name: str, size: int, *, bias: bool = False) -> Tensors:
    yield Tensor(f"{name}.weight", (size,))
    if bias:
        yield Tensor(f"{name}.bias", (size,))


def _attention(p: str, c: Config, *, gate: bool = False, bias: bool = False, norms: str = "head") -> Tensors:
    """``norms``: of each ``head``, over ``all`` heads, ``apart`` with a row for each head, or ``none``."""
    hidden, heads, kv = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    size = c.get("head_dim") or hidden // heads
    yield from _linear(f"{p}q_proj", heads * size * (2 if gate else 1), hidden, bias=bias)
    yield from _linear(f"{p}k_proj", kv * size, hidden, bias=bias)
    yield from _linear(f"{p}v_proj", kv * size, hidden, bias=bias)
    yield from _linear(f"{p}o_proj", hidden, heads * size)
    if norms == "apart":
        yield Tensor(f"{p}q_norm.weight", (heads, size))
        yield Tensor(f"{p}k_norm.weight", (kv, size))
    elif norms != "none":
        yield from _norm(f"{p}q_norm", size if norms == "head" else heads * size)
        yield from _norm(f"{p}k_norm", size if norms == "head" else kv * size)


def _latent_attention(p: str, c: Config, *, indexer: bool = False) -> Tensors:
    hidden, heads, q_rank, kv_rank = c["hidden_size"], c["num_attention_heads"], c["q_lora_rank"], c["kv_lora_rank"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    yield from _linear(f"{p}q_a_proj", q_rank, hidden)
    yield from _norm(f"{p}q_a_layernorm", q_rank)
    yield from _linear(f"{p}q_b_proj", heads * (nope + rope), q_rank)
    yield from _linear(f"{p}kv_a_proj_with_mqa", kv_rank + rope, hidden)
    yield from _norm(f"{p}kv_a_layernorm", kv_rank)
    yield from _linear(f"{p}kv_b_proj", heads * (nope + value), kv_rank)
    yield from _linear(f"{p}o_proj", hidden, heads * value)
    if indexer:
        size, count = c["index_head_dim"], c["index_n_heads"]
        yield from _linear(f"{p}indexer.wq_b", count * size, q_rank)
        yield from _linear(f"{p}indexer.wk", size, hidden)
        yield from _norm(f"{p}indexer.k_norm", size, bias=True)
        yield from _linear(f"{p}indexer.weights_proj", count, hidden, linear=False)


def _delta_net(p: str, c: Config, *, joined: bool) -> Tensors:
    hidden, heads = c["hidden_size"], c["linear_num_value_heads"]
    keys, values = c["linear_num_key_heads"] * c["linear_key_head_dim"], heads * c["linear_value_head_dim"]
    yield Tensor(f"{p}A_log", (heads,), dtype="F32")
    yield Tensor(f"{p}dt_bias", (heads,))
    yield Tensor(f"{p}conv1d.weight", (2 * keys + values, 1, c["linear_conv_kernel_dim"]))
    if joined:
        yield from _linear(f"{p}in_proj_qkvz", 2 * keys + 2 * values, hidden)
        yield from _linear(f"{p}in_proj_ba", 2 * heads, hidden, linear=False)
    else:
        yield from _linear(f"{p}in_proj_qkv", 2 * keys + values, hidden)
        yield from _linear(f"{p}in_proj_z", values, hidden)
        yield from _linear(f"{p}in_proj_b", heads, hidden, linear=False)
        yield from _linear(f"{p}in_proj_a", heads, hidden, linear=False)
    yield from _norm(f"{p}norm", c["linear_value_head_dim"])
    yield from _linear(f"{p}out_proj", hidden, values)


def _mlp(
    p: str, hidden: int, size: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Tensors:
    yield from _linear(f"{p}{names[0]}", size, hidden)
    yield from _linear(f"{p}{names[1]}", size, hidden)
    yield from _linear(f"{p}{names[2]}", hidden, size)


def _experts(p: str, count: int, hidden: int, size: int, **names: Any) -> Tensors:
    for expert in range(count):
        yield from _mlp(f"{p}experts.{expert}.", hidden, size, **names)


def _layer_norms(p: str, hidden: int, *names: str) -> Tensors:
    for name in names or ("input_layernorm", "post_attention_layernorm"):
        yield from _norm(f"{p}{name}", hidden)


def _around(p: str, c: Config, layers: Tensors, *, head: str = "lm_head", norm: str = "norm") -> Tensors:
    """``layers`` with the embedding, the last norm and, if it is not tied, the head."""
    table = c["vocab_size"], c["hidden_size"]
    yield Tensor(f"{p}embed_tokens.weight", table)
    yield from layers
    yield from _norm(f"{p}{norm}", c["hidden_size"])
    if not c.get("tie_word_embeddings", False):
        yield Tensor(f"{head}.weight", table)


def _dense(
    config: Config, p: str = "model.", head: str = "lm_head", *, norms: str = "none", around: tuple[str, ...] = ()
) -> Tensors:
    """Llama's names; ``around`` are the norms of a layer."""

    def layers() -> Tensors:
        for layer in range(config["num_hidden_layers"]):
            at = f"{p}layers.{layer}."
            yield from _attention(f"{at}self_attn.", config, norms=norms)
            yield from _mlp(f"{at}mlp.", config["hidden_size"], config["intermediate_size"])
            yield from _layer_norms(at, config["hidden_size"], *around)

    yield from _around(p, config, layers(), head=head)


def _image_encoder(p: str, c: Config) -> Tensors:
    """Qwen's, from 3 on."""
    hidden, size = c["hidden_size"], c["intermediate_size"]
    patch = c["in_channels"], c["temporal_patch_size"], c["patch_size"], c["patch_size"]
    yield Tensor(f"{p}patch_embed.proj.weight", (hidden, *patch))
    yield Tensor(f"{p}patch_embed.proj.bias", (hidden,))
    yield Tensor(f"{p}pos_embed.weight", (c["num_position_embeddings"], hidden))
    for block in range(c["depth"]):
        b = f"{p}blocks.{block}."
        yield from _norm(f"{b}norm1", hidden, bias=True)
        yield from _norm(f"{b}norm2", hidden, bias=True)
        yield from _linear(f"{b}attn.qkv", 3 * hidden, hidden, bias=True, linear=False)
        yield from _linear(f"{b}attn.proj", hidden, hidden, bias=True, linear=False)
        yield from _linear(f"{b}mlp.linear_fc1", size, hidden, bias=True, linear=False)
        yield from _linear(f"{b}mlp.linear_fc2", hidden, size, bias=True, linear=False)
    merged = hidden * c["spatial_merge_size"] ** 2
    mergers = ["merger.", *(f"deepstack_merger_list.{i}." for i, _ in enumerate(c["deepstack_visual_indexes"]))]
    for merger in mergers:
        yield from _norm(f"{p}{merger}norm", hidden if merger == "merger." else merged, bias=True)
        yield from _linear(f"{p}{merger}linear_fc1", merged, merged, bias=True, linear=False)
        yield from _linear(f"{p}{merger}linear_fc2", c["out_hidden_size"], merged, bias=True, linear=False)


@dataclass(frozen=True)
class TinyModel:
    """A tiny model of a family, and a mix of it."""

    config: Config
    lines: Mapping[str, str]
    """The recipe: patterns of modules -> ``fp8``, ``int4`` (GPTQ), ``auto_round``, ``packed`` (Kimi's Int4: experts in
    groups of 32), ``v4_fp8`` or ``v4_mxfp4`` (DeepSeek-V4's); the rest is BF16."""
    dense: tuple[str, ...] = ()
    """Endings of linears that Int4 releases do not quantize."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of SGLang's ServerArgs."""
    degrees: tuple[tuple[int, int], ...] = ()
    """Ranks, and groups of experts among them, that it can be cut for."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Prefixes of tensors' names, and what some releases have in their place; the first that fits counts."""
    norms_add_one: bool = False
    """Whether norms scale by 1 and their weights. Weights around 1 would double what attention compares, and a
    hundredth more or less anywhere then changes all answers."""

    def released_name(self, name: str) -> str:
        """The name of a tensor in releases, by :attr:`renamed`."""
        return next((new + name[len(old) :] for old, new in self.renamed if name.startswith(old)), name)


HIDDEN, EXPERTS = 256, 8
_DECODER: Config = {
    "hidden_size": HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
    "intermediate_size": 512, "vocab_size": 512, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 10000.0,
    "max_position_embeddings": 2048, "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_MOE: Config = {"moe_intermediate_size": 256, "num_experts_per_tok": 2, "norm_topk_prob": True}
_OUTER: Config = {"dtype": "bfloat16", "torch_dtype": "bfloat16", "tie_word_embeddings": False}
_MLA: Config = {
    "q_lora_rank": 256, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "num_key_value_heads": 4,
}  # fmt: skip
_SHARED: Config = {
    **_MOE, "n_routed_experts": EXPERTS, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "ep_size": 1,
    "first_k_dense_replace": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1,
    "routed_scaling_factor": 2.5,
}  # fmt: skip
_YARN: Config = {
    "type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048, "mscale": 1.0,
    "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
}  # fmt: skip
_DEEPSEEK: Config = {
    **{key: value for key, value in _DECODER.items() if key != "head_dim"}, **_MLA, **_SHARED, **_OUTER,
    "rope_scaling": _YARN, "max_position_embeddings": 8192, "num_nextn_predict_layers": 1,
}  # fmt: skip
_INDEXER: Config = {"index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128}
_DELTA_NET: Config = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 2, "attn_output_gate": True,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "mtp_num_hidden_layers": 1,
    "partial_rotary_factor": 0.25,
}  # fmt: skip
_MROPE: Config = {
    "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True,
    "partial_rotary_factor": 0.25,
}  # fmt: skip
_VISION: Config = {
    "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "in_channels": 3, "patch_size": 16,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": HIDDEN, "num_position_embeddings": 16,
    "hidden_act": "gelu_pytorch_tanh",
}  # fmt: skip
_IMAGES: Config = {
    "image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503,
}  # fmt: skip
_SHARED_EXPERT: Config = {**_MOE, "num_experts": EXPERTS, "shared_expert_intermediate_size": 256}
_KIMI_K25: Config = {
    "architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", **_OUTER,
    "media_placeholder_token_id": 500, "pad_token_id": 0,
    "text_config": {
        **_DEEPSEEK, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3",
        "num_nextn_predict_layers": 0,
    },
    "vision_config": {
        "vt_hidden_size": 64, "vt_intermediate_size": 128, "vt_num_hidden_layers": 1,
        "vt_num_attention_heads": 2, "patch_size": 14, "merge_kernel_size": [2, 2], "mm_hidden_size": 64,
        "text_hidden_size": HIDDEN, "init_pos_emb_height": 4, "init_pos_emb_width": 4,
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
    },
}  # fmt: skip
_EXPERT_LINES = {"*.mlp.experts.*": "int4", "*.layers.1.mlp.experts.{0..2}.*": "fp8"}
_DENSE_LINES = {"*.self_attn.*": "fp8", "*.mlp.*": "int4", "*.layers.1.mlp.*": "fp8"}
_HEADS_OF_HIDDEN = {**{key: value for key, value in _DECODER.items() if key != "head_dim"}, "num_attention_heads": 2}
_MLA_LINES = {"*.self_attn.*": "fp8", "*.kv_b_proj": "bf16", **_EXPERT_LINES}
_A_PROJECTIONS = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj")
_HYBRID = {"page_size": 1, "disable_overlap_schedule": True, "mamba_radix_cache_strategy": "no_buffer"}
