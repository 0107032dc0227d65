"""Names and shapes of all tensors in unquantized checkpoints of model families.

    for tensor in tensors_of(config): ...      # of a config.json, of the published sizes or of tiny ones
    TINY["qwen3_5_moe"].config                 # a tiny model of the family

Names are those of the published releases, with separate tensors for experts; :data:`STACKED` lists the unquantized
releases that have all experts of a layer in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["STACKED", "TINY", "StackedRelease", "Tensor", "TinyModel", "tensors_of"]

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


class StackedRelease(NamedTuple):
    """How an unquantized release stores all experts of a layer in one tensor, without ``.weight``."""

    transposed: bool
    """``[E, K, N]`` instead of ``[E, N, K]``."""


STACKED: Mapping[str, StackedRelease] = {
    "Qwen3_5MoeForConditionalGeneration": StackedRelease(False),
    "Qwen3VLMoeForConditionalGeneration": StackedRelease(True),
    "Llama4ForConditionalGeneration": StackedRelease(True),
}


def tensors_of(config: Config) -> Tensors:
    """All tensors in the order of layers."""
    yield from _FAMILIES[config["architectures"][0]](config)


# Parts of layers. ``p`` is the prefix of names, with its dot.


def _linear(name: str, outputs: int, inputs: int, *, bias: bool = False, linear: bool = True) -> Tensors:
    yield Tensor(f"{name}.weight", (outputs, inputs), linear)
    if bias:
        yield Tensor(f"{name}.bias", (outputs,))


def _norm(name: str, size: int, *, bias: bool = False) -> Tensors:
    yield Tensor(f"{name}.weight", (size,))
    if bias:
        yield Tensor(f"{name}.bias", (size,))


def _attention(p: str, c: Config, *, gate: bool = False, bias: bool = False, norms: str = "head") -> Tensors:
    """``norms``: of each ``head``, over ``all`` heads, or ``none``."""
    hidden, heads, kv = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
    size = c.get("head_dim") or hidden // heads
    yield from _linear(f"{p}q_proj", heads * size * (2 if gate else 1), hidden, bias=bias)
    yield from _linear(f"{p}k_proj", kv * size, hidden, bias=bias)
    yield from _linear(f"{p}v_proj", kv * size, hidden, bias=bias)
    yield from _linear(f"{p}o_proj", hidden, heads * size)
    if norms != "none":
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


# Families


def _qwen3_5_mlp(p: str, c: Config) -> Tensors:
    hidden = c["hidden_size"]
    if "num_experts" not in c:
        yield from _mlp(f"{p}mlp.", hidden, c["intermediate_size"])
        return
    yield from _linear(f"{p}mlp.gate", c["num_experts"], hidden, linear=False)
    yield from _experts(f"{p}mlp.", c["num_experts"], hidden, c["moe_intermediate_size"])
    yield from _mlp(f"{p}mlp.shared_expert.", hidden, c["shared_expert_intermediate_size"])
    yield from _linear(f"{p}mlp.shared_expert_gate", 1, hidden, linear=False)


def _qwen2_moe(config: Config) -> Tensors:
    def layers() -> Tensors:
        for layer in range(config["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            yield from _attention(f"{at}self_attn.", config, bias=True, norms="none")
            yield from _qwen3_5_mlp(at, config)
            yield from _layer_norms(at, config["hidden_size"])

    yield from _around("model.", config, layers())


def _qwen3_5_layers(p: str, c: Config, *, joined: bool) -> Tensors:
    for layer, kind in enumerate(c["layer_types"]):
        at = f"{p}layers.{layer}."
        if kind == "linear_attention":
            yield from _delta_net(f"{at}linear_attn.", c, joined=joined)
        else:
            yield from _attention(f"{at}self_attn.", c, gate=True)
        yield from _qwen3_5_mlp(at, c)
        yield from _layer_norms(at, c["hidden_size"])


def _draft_of_qwen(c: Config) -> Tensors:
    hidden = c["hidden_size"]
    for layer in range(c.get("mtp_num_hidden_layers", 0)):
        yield from _attention(f"mtp.layers.{layer}.self_attn.", c, gate=True)
        yield from _qwen3_5_mlp(f"mtp.layers.{layer}.", c)
        yield from _layer_norms(f"mtp.layers.{layer}.", hidden)
        yield from _linear("mtp.fc", hidden, 2 * hidden, linear=False)
        yield from _layer_norms("mtp.", hidden, "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")


def _qwen3_5(config: Config) -> Tensors:
    text, p = config["text_config"], "model.language_model."
    text = {**text, "tie_word_embeddings": config.get("tie_word_embeddings", False)}
    yield from _around(p, text, _qwen3_5_layers(p, text, joined=False))
    yield from _image_encoder("model.visual.", config["vision_config"])
    yield from _draft_of_qwen(text)


def _qwen3_next(config: Config) -> Tensors:
    yield from _around("model.", config, _qwen3_5_layers("model.", config, joined=True))
    yield from _draft_of_qwen(config)


def _qwen3_vl_moe(config: Config) -> Tensors:
    text, p = config["text_config"], "model.language_model."

    def layers() -> Tensors:
        for layer in range(text["num_hidden_layers"]):
            at = f"{p}layers.{layer}."
            yield from _attention(f"{at}self_attn.", text)
            if text.get("num_experts"):
                yield from _linear(f"{at}mlp.gate", text["num_experts"], text["hidden_size"], linear=False)
                yield from _experts(
                    f"{at}mlp.", text["num_experts"], text["hidden_size"], text["moe_intermediate_size"]
                )
            else:
                yield from _mlp(f"{at}mlp.", text["hidden_size"], text["intermediate_size"])
            yield from _layer_norms(at, text["hidden_size"])

    yield from _around(p, {**text, "tie_word_embeddings": config.get("tie_word_embeddings", False)}, layers())
    yield from _image_encoder("model.visual.", config["vision_config"])


def _deepseek_layers(p: str, c: Config, attention: Callable[[str, int], Tensors]) -> Tensors:
    """Dense layers first, then MoE layers with shared experts, then a draft layer."""
    hidden, last = c["hidden_size"], c["num_hidden_layers"]
    for layer in range(last + c.get("num_nextn_predict_layers", 0)):
        at = f"{p}layers.{layer}."
        if layer >= last:
            yield from _layer_norms(at, hidden, "enorm", "hnorm", "shared_head.norm")
            yield from _linear(f"{at}eh_proj", hidden, 2 * hidden, linear=False)
            yield Tensor(f"{at}embed_tokens.weight", (c["vocab_size"], hidden))
            yield Tensor(f"{at}shared_head.head.weight", (c["vocab_size"], hidden))
        yield from attention(f"{at}self_attn.", layer)
        if layer < c["first_k_dense_replace"]:
            yield from _mlp(f"{at}mlp.", hidden, c["intermediate_size"])
        else:
            yield from _linear(f"{at}mlp.gate", c["n_routed_experts"], hidden, linear=False)
            yield Tensor(f"{at}mlp.gate.e_score_correction_bias", (c["n_routed_experts"],), dtype="F32")
            yield from _mlp(f"{at}mlp.shared_experts.", hidden, c["n_shared_experts"] * c["moe_intermediate_size"])
            yield from _experts(f"{at}mlp.", c["n_routed_experts"], hidden, c["moe_intermediate_size"])
        yield from _layer_norms(at, hidden)


def _deepseek(config: Config, p: str = "model.", head: str = "lm_head") -> Tensors:
    def attention(at: str, layer: int) -> Tensors:
        types = config.get("indexer_types")
        own = types is None or layer >= len(types) or types[layer] == "full"
        return _latent_attention(at, config, indexer="index_topk" in config and own)

    yield from _around(p, config, _deepseek_layers(p, config, attention), head=head)


def _kimi_k25(config: Config) -> Tensors:
    yield from _deepseek(config["text_config"], "language_model.model.", "language_model.lm_head")
    c = config["vision_config"]
    hidden, size, patch = c["vt_hidden_size"], c["vt_intermediate_size"], c["patch_size"]
    yield Tensor("vision_tower.patch_embed.proj.weight", (hidden, 3, patch, patch))
    yield Tensor("vision_tower.patch_embed.proj.bias", (hidden,))
    table = c["init_pos_emb_height"], c["init_pos_emb_width"], hidden
    yield Tensor("vision_tower.patch_embed.pos_emb.weight", table)
    for block in range(c["vt_num_hidden_layers"]):
        at = f"vision_tower.encoder.blocks.{block}."
        yield from _norm(f"{at}norm0", hidden, bias=True)
        yield from _norm(f"{at}norm1", hidden, bias=True)
        yield from _linear(f"{at}wqkv", 3 * hidden, hidden, bias=True, linear=False)
        yield from _linear(f"{at}wo", hidden, hidden, bias=True, linear=False)
        yield from _linear(f"{at}mlp.fc0", size, hidden, bias=True, linear=False)
        yield from _linear(f"{at}mlp.fc1", hidden, size, bias=True, linear=False)
    yield from _norm("vision_tower.encoder.final_layernorm", hidden, bias=True)
    merged = hidden * c["merge_kernel_size"][0] * c["merge_kernel_size"][1]
    yield from _norm("mm_projector.pre_norm", hidden, bias=True)
    yield from _linear("mm_projector.proj.0", merged, merged, bias=True, linear=False)
    yield from _linear("mm_projector.proj.2", c["text_hidden_size"], merged, bias=True, linear=False)


def _glm4_moe(config: Config) -> Tensors:
    def attention(at: str, layer: int) -> Tensors:
        norms = "head" if config.get("use_qk_norm") else "none"
        return _attention(at, config, bias=config["attention_bias"], norms=norms)

    yield from _around("model.", config, _deepseek_layers("model.", config, attention))


def _minimax_m2(config: Config) -> Tensors:
    hidden = config["hidden_size"]

    def layers() -> Tensors:
        for layer in range(config["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            yield from _attention(f"{at}self_attn.", config, norms="all")
            moe = f"{at}block_sparse_moe."
            yield from _linear(f"{moe}gate", config["num_local_experts"], hidden, linear=False)
            yield Tensor(f"{moe}e_score_correction_bias", (config["num_local_experts"],), dtype="F32")
            sizes = config["num_local_experts"], hidden, config["intermediate_size"]
            yield from _experts(moe, *sizes, names=("w1", "w3", "w2"))
            yield from _layer_norms(at, hidden)

    yield from _around("model.", config, layers())


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


def _phi3(config: Config) -> Tensors:
    hidden, size = config["hidden_size"], config["intermediate_size"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]

    def layers() -> Tensors:
        for layer in range(config["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            yield from _linear(f"{at}self_attn.qkv_proj", (heads + 2 * kv) * (hidden // heads), hidden)
            yield from _linear(f"{at}self_attn.o_proj", hidden, hidden)
            yield from _linear(f"{at}mlp.gate_up_proj", 2 * size, hidden)
            yield from _linear(f"{at}mlp.down_proj", hidden, size)
            yield from _layer_norms(at, hidden)

    yield from _around("model.", config, layers())


def _ernie_moe(config: Config) -> Tensors:
    hidden, size, count = config["hidden_size"], config["moe_intermediate_size"], config["moe_num_experts"]

    def layers() -> Tensors:
        for layer in range(config["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            yield from _attention(f"{at}self_attn.", config, norms="none")
            if layer < config["moe_layer_start_index"]:
                yield from _mlp(f"{at}mlp.", hidden, config["intermediate_size"])
            else:
                yield Tensor(f"{at}mlp.gate.weight", (count, hidden), dtype="F32")
                yield Tensor(f"{at}mlp.moe_statics.e_score_correction_bias", (1, count), dtype="F32")
                yield from _mlp(f"{at}mlp.shared_experts.", hidden, config["moe_num_shared_experts"] * size)
                yield from _experts(f"{at}mlp.", count, hidden, size)
            yield from _layer_norms(at, hidden)

    yield from _around("model.", config, layers())


def _olmoe(config: Config) -> Tensors:
    hidden = config["hidden_size"]

    def layers() -> Tensors:
        for layer in range(config["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            yield from _attention(f"{at}self_attn.", config, norms="all")
            yield from _linear(f"{at}mlp.gate", config["num_experts"], hidden, linear=False)
            yield from _experts(f"{at}mlp.", config["num_experts"], hidden, config["intermediate_size"])
            yield from _layer_norms(at, hidden)

    yield from _around("model.", config, layers())


def _mistral3(config: Config) -> Tensors:
    text = {**config["text_config"], "tie_word_embeddings": config["tie_word_embeddings"]}
    yield from _dense(text, "language_model.model.", "language_model.lm_head")
    c = config["vision_config"]
    hidden, size, patch = c["hidden_size"], c["intermediate_size"], c["patch_size"]
    yield Tensor("vision_tower.patch_conv.weight", (hidden, 3, patch, patch))
    yield from _norm("vision_tower.ln_pre", hidden)
    for layer in range(c["num_hidden_layers"]):
        at = f"vision_tower.transformer.layers.{layer}."
        for name in "qkvo":
            yield from _linear(f"{at}attention.{name}_proj", hidden, hidden, linear=False)
        for name, shape in (("gate", (size, hidden)), ("up", (size, hidden)), ("down", (hidden, size))):
            yield from _linear(f"{at}feed_forward.{name}_proj", *shape, linear=False)
        yield from _layer_norms(at, hidden, "attention_norm", "ffn_norm")
    merged = hidden * config["spatial_merge_size"] ** 2
    yield from _norm("multi_modal_projector.norm", hidden)
    yield from _linear("multi_modal_projector.patch_merger.merging_layer", hidden, merged, linear=False)
    yield from _linear("multi_modal_projector.linear_1", text["hidden_size"], hidden, linear=False)
    yield from _linear("multi_modal_projector.linear_2", text["hidden_size"], text["hidden_size"], linear=False)


def _gemma3(config: Config) -> Tensors:
    names = "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    yield from _dense(config, norms="head", around=names)


def _cohere2(config: Config) -> Tensors:
    yield from _dense(config, around=("input_layernorm",))


_FAMILIES: Mapping[str, Callable[[Config], Tensors]] = {
    "Mistral3ForConditionalGeneration": _mistral3,
    "Ernie4_5_ForCausalLM": _dense,
    "Ernie4_5_MoeForCausalLM": _ernie_moe,
    "OlmoeForCausalLM": _olmoe,
    "Gemma3ForCausalLM": _gemma3,
    "CohereForCausalLM": _cohere2,
    "Cohere2ForCausalLM": _cohere2,
    "Phi3ForCausalLM": _phi3,
    "GraniteForCausalLM": _dense,
    "Qwen2MoeForCausalLM": _qwen2_moe,
    "Qwen3_5ForConditionalGeneration": _qwen3_5,
    "Qwen3_5MoeForConditionalGeneration": _qwen3_5,
    "Qwen3NextForCausalLM": _qwen3_next,
    "Qwen3VLForConditionalGeneration": _qwen3_vl_moe,
    "Qwen3VLMoeForConditionalGeneration": _qwen3_vl_moe,
    "DeepseekV3ForCausalLM": _deepseek,
    "DeepseekV32ForCausalLM": _deepseek,
    "GlmMoeDsaForCausalLM": _deepseek,
    "KimiK25ForConditionalGeneration": _kimi_k25,
    "Glm4MoeForCausalLM": _glm4_moe,
    "MiniMaxM2ForCausalLM": _minimax_m2,
}


# Tiny models


@dataclass(frozen=True)
class TinyModel:
    """A tiny model of a family, and a mix of it."""

    config: Config
    lines: Mapping[str, str]
    """The recipe: patterns of modules -> ``fp8``, ``int4`` (GPTQ) or ``auto_round``; the rest is BF16."""
    dense: tuple[str, ...] = ()
    """Endings of linears that Int4 releases do not quantize."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of SGLang's ServerArgs."""
    degrees: tuple[tuple[int, int], ...] = ()
    """Ranks, and groups of experts among them, that it can be cut for."""


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
_EXPERT_LINES = {"*.mlp.experts.*": "int4", "*.layers.1.mlp.experts.{0..2}.*": "fp8"}
_DENSE_LINES = {"*.self_attn.*": "fp8", "*.mlp.*": "int4", "*.layers.1.mlp.*": "fp8"}
_HEADS_OF_HIDDEN = {**{key: value for key, value in _DECODER.items() if key != "head_dim"}, "num_attention_heads": 2}
_MLA_LINES = {"*.self_attn.*": "fp8", "*.kv_b_proj": "bf16", **_EXPERT_LINES}
_A_PROJECTIONS = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj")
_HYBRID = {"page_size": 1, "disable_overlap_schedule": True, "mamba_radix_cache_strategy": "no_buffer"}


def _qwen3_5_config(architecture: str, model_type: str, **text: Any) -> Config:
    inner = {**_DECODER, **_DELTA_NET, **text, "rope_parameters": _MROPE, "dtype": "bfloat16"}
    vision = {**_VISION, "model_type": model_type, "deepstack_visual_indexes": []}
    text_type = f"{model_type}_text"
    return {
        "architectures": [architecture], "model_type": model_type, **_OUTER, **_IMAGES,
        "text_config": {**inner, "model_type": text_type}, "vision_config": vision,
    }  # fmt: skip


TINY: Mapping[str, TinyModel] = {
    "qwen2_moe": TinyModel(
        {
            **{key: value for key, value in _DECODER.items() if key != "head_dim"}, **_SHARED_EXPERT, **_OUTER,
            "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "decoder_sparse_step": 1,
            "mlp_only_layers": [], "num_attention_heads": 2, "num_key_value_heads": 2, "qkv_bias": True,
        },
        {"*.self_attn.*": "fp8", **_EXPERT_LINES, "*.shared_expert.*": "int4"}, degrees=((2, 1), (2, 2)),
    ),
    "qwen3_5": TinyModel(
        _qwen3_5_config("Qwen3_5ForConditionalGeneration", "qwen3_5"),
        {
            "*.self_attn.*": "fp8", "*.linear_attn.*": "fp8", "*.layers.2.linear_attn.{in_proj_qkv,in_proj_z}": "int4",
            "*.mlp.*": "int4", "*.layers.1.mlp.*": "fp8",
        },
        options=_HYBRID, degrees=((2, 1),),
    ),
    "qwen3_5_moe": TinyModel(
        _qwen3_5_config("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", **_SHARED_EXPERT),
        {
            "*.self_attn.*": "fp8", "*.linear_attn.*": "fp8", **_EXPERT_LINES, "*.shared_expert.*": "int4",
            "*.layers.2.mlp.experts.{3,5}.*": "bf16",
        },
        options=_HYBRID, degrees=((2, 1), (2, 2)),
    ),
    "qwen3_5_moe_auto_round": TinyModel(
        _qwen3_5_config("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", **_SHARED_EXPERT),
        {
            "*.self_attn.*": "fp8", "*.linear_attn.*": "fp8", "*.mlp.experts.*": "auto_round",
            "*.shared_expert.*": "fp8",
        },
        options=_HYBRID, degrees=((2, 1), (2, 2)),
    ),
    "qwen3_next": TinyModel(
        {
            **_DECODER, **_DELTA_NET, **_SHARED_EXPERT, **_OUTER, "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next", "decoder_sparse_step": 1, "mlp_only_layers": [], "rope_scaling": None,
        },
        {
            "*.self_attn.*": "fp8", "*.linear_attn.*": "fp8", "*.layers.2.linear_attn.out_proj": "int4",
            **_EXPERT_LINES, "*.shared_expert.*": "fp8",
        },
        options=_HYBRID, degrees=((2, 1), (2, 2)),
    ),
    "qwen3_vl_moe": TinyModel(
        {
            "architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe", **_OUTER, **_IMAGES,
            "text_config": {
                **_DECODER, **_MOE, "num_experts": EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": [],
                "model_type": "qwen3_vl_moe_text", "dtype": "bfloat16",
                "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
            },
            "vision_config": {**_VISION, "model_type": "qwen3_vl_moe", "deepstack_visual_indexes": [0, 1]},
        },
        {"*.self_attn.*": "fp8", **_EXPERT_LINES, "*.layers.2.mlp.experts.{3,5}.*": "bf16"}, degrees=((2, 1), (2, 2)),
    ),
    "qwen3_vl": TinyModel(
        {
            "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", **_OUTER, **_IMAGES,
            "text_config": {
                **_DECODER, "model_type": "qwen3_vl_text", "dtype": "bfloat16",
                "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
            },
            "vision_config": {**_VISION, "model_type": "qwen3_vl", "deepstack_visual_indexes": [0, 1]},
        },
        _DENSE_LINES, degrees=((2, 1),),
    ),
    "kimi_k2": TinyModel(
        {
            **_DEEPSEEK, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "kimi_k2",
            "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
        },
        _MLA_LINES, dense=_A_PROJECTIONS, degrees=((2, 1), (2, 2)),
    ),
    "kimi_k25": TinyModel(
        {
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
        },
        _MLA_LINES, dense=_A_PROJECTIONS, degrees=((2, 1), (2, 2)),
    ),
    "deepseek_v32": TinyModel(
        {**_DEEPSEEK, **_INDEXER, "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"},
        _MLA_LINES, dense=(*_A_PROJECTIONS, "indexer.wk", "indexer.wq_b"), degrees=((2, 1), (2, 2)),
    ),
    "glm_moe_dsa": TinyModel(
        {
            **_DEEPSEEK, **_INDEXER, "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa",
            "index_n_heads": 32, "indexer_rope_interleave": True, "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
        _MLA_LINES, dense=(*_A_PROJECTIONS, "indexer.wk", "indexer.wq_b"),
    ),
    "glm4_moe": TinyModel(
        {
            **_DECODER, **_SHARED, **_OUTER, "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe",
            "attention_bias": True, "use_qk_norm": True, "partial_rotary_factor": 0.5, "rope_scaling": None,
            "num_nextn_predict_layers": 1,
        },
        {"*.self_attn.*": "fp8", **_EXPERT_LINES, "*.shared_experts.*": "fp8"}, degrees=((2, 1), (2, 2)),
    ),
    "minimax_m2": TinyModel(
        {
            **_DECODER, **_OUTER, "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2",
            "intermediate_size": 256, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "rotary_dim": 64,
            "use_qk_norm": True, "qk_norm_type": "per_layer", "use_routing_bias": True, "scoring_func": "sigmoid",
            "shared_intermediate_size": 0, "attn_type_list": [1, 1, 1], "num_mtp_modules": 0, "rope_theta": 5000000,
        },
        {
            "*.self_attn.*": "fp8", "*.block_sparse_moe.experts.*": "int4",
            "*.layers.1.block_sparse_moe.experts.{0..2}.*": "fp8",
        },
        degrees=((2, 1), (2, 2)),
    ),
    "mistral3": TinyModel(
        {
            "architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", **_OUTER,
            "text_config": {**_DECODER, "model_type": "mistral"}, "image_token_index": 500, "vision_feature_layer": -1,
            "projector_hidden_act": "gelu", "multimodal_projector_bias": False, "spatial_merge_size": 2,
            "vision_config": {
                "model_type": "pixtral", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
                "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "head_dim": 32, "rope_theta": 10000.0,
                "num_channels": 3, "hidden_act": "silu",
            },
        },
        _DENSE_LINES,
    ),
    "ernie4_5": TinyModel(
        {**_DECODER, **_OUTER, "architectures": ["Ernie4_5_ForCausalLM"], "model_type": "ernie4_5", "use_bias": False},
        _DENSE_LINES,
    ),
    "ernie4_5_moe": TinyModel(
        {
            **_DECODER, **_OUTER, "architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe",
            "moe_intermediate_size": 256, "moe_num_experts": EXPERTS, "moe_k": 2, "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1, "moe_layer_end_index": 2, "moe_layer_interval": 1, "use_bias": False,
        },
        {"*.self_attn.*": "fp8", **_EXPERT_LINES, "*.shared_experts.*": "int4"},
    ),
    "olmoe": TinyModel(
        {
            **_HEADS_OF_HIDDEN, **_OUTER, "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe",
            "intermediate_size": 256, "num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": False,
        },
        {"*.self_attn.*": "fp8", **_EXPERT_LINES},
    ),
    "gemma3": TinyModel(
        {
            **_DECODER, **_OUTER, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
            "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 128,
            "sliding_window": 64, "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        _DENSE_LINES,
    ),
    "cohere2": TinyModel(
        {
            **_HEADS_OF_HIDDEN, **_OUTER, "architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2",
            "tie_word_embeddings": True, "layer_norm_eps": 1e-5, "logit_scale": 0.25, "sliding_window": 64,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        _DENSE_LINES,
    ),
    "phi3": TinyModel(
        {
            **_HEADS_OF_HIDDEN, **_OUTER, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3",
            "original_max_position_embeddings": 2048, "rope_scaling": None,
        },
        _DENSE_LINES,
    ),
    "granite": TinyModel(
        {
            **_HEADS_OF_HIDDEN, **_OUTER, "architectures": ["GraniteForCausalLM"], "model_type": "granite",
            "attention_multiplier": 0.1, "embedding_multiplier": 12.0, "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
        },
        _DENSE_LINES,
    ),
}  # fmt: skip
