"""Names and shapes of all tensors in unquantized checkpoints of further model families, and tiny models of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from support.family_parts import (
    _A_PROJECTIONS,
    _DECODER,
    _DENSE_LINES,
    _EXPERT_LINES,
    _HEADS_OF_HIDDEN,
    _HYBRID,
    _MLA_LINES,
    _MOE,
    _OUTER,
    _YARN,
    EXPERTS,
    Config,
    Tensor,
    Tensors,
    TinyModel,
    _around,
    _attention,
    _experts,
    _latent_attention,
    _layer_norms,
    _linear,
    _mlp,
    _norm,
)

__all__ = [
    "GEMMA4",
    "MINIMAX_M3",
    "MINIMAX_M3_LINES",
    "MORE_TENSORS",
    "MORE_TINY",
    "STEP",
    "STEP_LINES",
    "TRITON",
    "gemma4_tensors",
    "minimax_m3_tensors",
    "step_tensors",
]


def _up_and_down(p: str, hidden: int, size: int) -> Tensors:
    yield from _linear(f"{p}up_proj", size, hidden)
    yield from _linear(f"{p}down_proj", hidden, size)


# Llama 4


def _llama4(config: Config) -> Tensors:
    text, p = config["text_config"], "language_model.model."
    hidden, size = text["hidden_size"], text["intermediate_size"]

    def layers() -> Tensors:
        for layer in range(text["num_hidden_layers"]):
            at = f"{p}layers.{layer}."
            yield from _attention(f"{at}self_attn.", text, norms="none")
            if (layer + 1) % text["interleave_moe_layer_step"]:
                yield from _mlp(f"{at}feed_forward.", hidden, text["intermediate_size_mlp"])
            else:
                yield from _linear(f"{at}feed_forward.router", text["num_local_experts"], hidden, linear=False)
                yield from _experts(f"{at}feed_forward.", text["num_local_experts"], hidden, size)
                yield from _mlp(f"{at}feed_forward.shared_expert.", hidden, size)
            yield from _layer_norms(at, hidden)

    yield from _around(p, {**text, "tie_word_embeddings": False}, layers(), head="language_model.lm_head")
    c = config["vision_config"]
    width, inner = c["hidden_size"], c["intermediate_size"]
    patches = (c["image_size"] // c["patch_size"]) ** 2 + 1
    yield Tensor("vision_model.class_embedding", (width,))
    yield Tensor("vision_model.positional_embedding_vlm", (patches, width))
    yield from _linear("vision_model.patch_embedding.linear", width, 3 * c["patch_size"] ** 2, linear=False)
    for name in ("layernorm_pre", "layernorm_post"):
        yield from _norm(f"vision_model.{name}", width, bias=True)
    for layer in range(c["num_hidden_layers"]):
        at = f"vision_model.model.layers.{layer}."
        for name in "qkvo":
            yield from _linear(f"{at}self_attn.{name}_proj", width, width, bias=True, linear=False)
        yield from _linear(f"{at}mlp.fc1", inner, width, bias=True, linear=False)
        yield from _linear(f"{at}mlp.fc2", width, inner, bias=True, linear=False)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield from _norm(f"{at}{name}", width, bias=True)
    merged = int(width // c["pixel_shuffle_ratio"] ** 2)
    yield from _linear("vision_model.vision_adapter.mlp.fc1", c["projector_input_dim"], merged, linear=False)
    yield from _linear(
        "vision_model.vision_adapter.mlp.fc2", c["projector_output_dim"], c["projector_input_dim"], linear=False
    )
    yield from _linear("multi_modal_projector.linear_1", hidden, c["vision_output_dim"], linear=False)


# Nemotron


def _nemotron_h(config: Config) -> Tensors:
    c, p = config, "backbone."
    hidden, inner, heads = c["hidden_size"], c["mamba_num_heads"] * c["mamba_head_dim"], c["mamba_num_heads"]
    states = c["n_groups"] * c["ssm_state_size"]
    latent = c.get("moe_latent_size") or hidden
    yield Tensor(f"{p}embeddings.weight", (c["vocab_size"], hidden))
    for layer, kind in enumerate(c["hybrid_override_pattern"]):
        at = f"{p}layers.{layer}.mixer."
        yield from _norm(f"{p}layers.{layer}.norm", hidden)
        if kind == "M":
            yield Tensor(f"{at}A_log", (heads,), dtype="F32")
            yield Tensor(f"{at}D", (heads,))
            yield Tensor(f"{at}dt_bias", (heads,))
            yield Tensor(f"{at}conv1d.weight", (inner + 2 * states, 1, c["conv_kernel"]))
            yield Tensor(f"{at}conv1d.bias", (inner + 2 * states,))
            yield from _linear(f"{at}in_proj", 2 * inner + 2 * states + heads, hidden)
            yield from _norm(f"{at}norm", inner)
            yield from _linear(f"{at}out_proj", hidden, inner)
        elif kind == "*":
            yield from _attention(at, c, norms="none")
        elif kind == "-":
            yield from _up_and_down(at, hidden, c["intermediate_size"])
        else:
            yield from _linear(f"{at}gate", c["n_routed_experts"], hidden, linear=False)
            yield Tensor(f"{at}gate.e_score_correction_bias", (c["n_routed_experts"],), dtype="F32")
            if latent != hidden:
                yield from _linear(f"{at}fc1_latent_proj", latent, hidden)
                yield from _linear(f"{at}fc2_latent_proj", hidden, latent)
            for expert in range(c["n_routed_experts"]):
                yield from _up_and_down(f"{at}experts.{expert}.", latent, c["moe_intermediate_size"])
            yield from _up_and_down(f"{at}shared_experts.", hidden, c["moe_shared_expert_intermediate_size"])
    yield from _norm(f"{p}norm_f", hidden)
    yield Tensor("lm_head.weight", (c["vocab_size"], hidden))


# MiMo, Ling and Ring, Hunyuan


def _mimo_v2(config: Config) -> Tensors:
    c, hidden = config, config["hidden_size"]

    def layers() -> Tensors:
        for layer in range(c["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            window = bool(c["hybrid_layer_pattern"][layer])
            kind = "swa_" if window else ""
            heads, kv = c[f"{kind}num_attention_heads"], c[f"{kind}num_key_value_heads"]
            size, values = c[f"{kind}head_dim"], c[f"{kind}v_head_dim"]
            for name, outputs in (("q", heads * size), ("k", kv * size), ("v", kv * values)):
                yield from _linear(f"{at}self_attn.{name}_proj", outputs, hidden)
            yield from _linear(f"{at}self_attn.o_proj", hidden, heads * values)
            if window:
                yield Tensor(f"{at}self_attn.attention_sink_bias", (heads,))
            if c["moe_layer_freq"][layer]:
                yield from _linear(f"{at}mlp.gate", c["n_routed_experts"], hidden, linear=False)
                yield Tensor(f"{at}mlp.gate.e_score_correction_bias", (c["n_routed_experts"],), dtype="F32")
                yield from _experts(f"{at}mlp.", c["n_routed_experts"], hidden, c["moe_intermediate_size"])
            else:
                yield from _mlp(f"{at}mlp.", hidden, c["intermediate_size"])
            yield from _layer_norms(at, hidden)

    yield from _around("model.", c, layers())


def _bailing_moe(config: Config) -> Tensors:
    c, hidden, size = config, config["hidden_size"], config["head_dim"]
    heads, kv, count = c["num_attention_heads"], c["num_key_value_heads"], c["num_experts"]

    yield Tensor("model.word_embeddings.weight", (c["vocab_size"], hidden))
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        yield from _linear(f"{at}attention.query_key_value", (heads + 2 * kv) * size, hidden)
        yield from _linear(f"{at}attention.dense", hidden, heads * size)
        yield from _norm(f"{at}attention.query_layernorm", size)
        yield from _norm(f"{at}attention.key_layernorm", size)
        if layer < c["first_k_dense_replace"]:
            yield from _mlp(f"{at}mlp.", hidden, c["intermediate_size"])
        else:
            yield Tensor(f"{at}mlp.gate.weight", (count, hidden), dtype="F32")
            yield Tensor(f"{at}mlp.gate.expert_bias", (count,), dtype="F32")
            yield from _experts(f"{at}mlp.", count, hidden, c["moe_intermediate_size"])
            yield from _mlp(f"{at}mlp.shared_experts.", hidden, c["moe_intermediate_size"])
        yield from _layer_norms(at, hidden)
    yield from _norm("model.norm", hidden)
    yield Tensor("lm_head.weight", (c["vocab_size"], hidden))


def _hunyuan(config: Config) -> Tensors:
    c, hidden, size = config, config["hidden_size"], config["head_dim"]

    def layers() -> Tensors:
        for layer in range(c["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            yield from _attention(f"{at}self_attn.", c, norms="none")
            yield from _norm(f"{at}self_attn.query_layernorm", size)
            yield from _norm(f"{at}self_attn.key_layernorm", size)
            if c.get("num_experts", 1) > 1:
                yield Tensor(f"{at}mlp.gate.wg.weight", (c["num_experts"], hidden))
                yield from _experts(f"{at}mlp.", c["num_experts"], hidden, c["moe_intermediate_size"][layer])
                yield from _mlp(f"{at}mlp.shared_mlp.", hidden, c["intermediate_size"])
            else:
                yield from _mlp(f"{at}mlp.", hidden, c["intermediate_size"])
            yield from _layer_norms(at, hidden)

    yield from _around("model.", c, layers())


# Granite with experts, Phi-3.5-MoE


def _granite_moe(config: Config) -> Tensors:
    hidden, size, count = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]

    def layers() -> Tensors:
        for layer in range(config["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            yield from _attention(f"{at}self_attn.", config, norms="none")
            yield from _linear(f"{at}block_sparse_moe.router.layer", count, hidden, linear=False)
            yield from _experts(f"{at}block_sparse_moe.", count, hidden, size, names=("w1", "w3", "w2"))
            yield from _layer_norms(at, hidden)

    yield from _around("model.", config, layers())


def _phimoe(config: Config) -> Tensors:
    hidden, size, count = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    yield Tensor("model.embed_tokens.weight", (config["vocab_size"], hidden))
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        yield from _attention(f"{at}self_attn.", config, bias=True, norms="none")
        yield Tensor(f"{at}self_attn.o_proj.bias", (hidden,))
        yield from _linear(f"{at}block_sparse_moe.gate", count, hidden, linear=False)
        yield from _experts(f"{at}block_sparse_moe.", count, hidden, size, names=("w1", "w3", "w2"))
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield from _norm(f"{at}{name}", hidden, bias=True)
    yield from _norm("model.norm", hidden, bias=True)
    yield Tensor("lm_head.weight", (config["vocab_size"], hidden))
    yield Tensor("lm_head.bias", (config["vocab_size"],))


# LongCat


def _longcat(config: Config) -> Tensors:
    hidden, count = config["hidden_size"], config["n_routed_experts"]

    def layers() -> Tensors:
        for layer in range(config["num_layers"]):
            at = f"model.layers.{layer}."
            for part in range(2):
                yield from _latent_attention(f"{at}self_attn.{part}.", config)
                yield from _mlp(f"{at}mlps.{part}.", hidden, config["ffn_hidden_size"])
                yield from _layer_norms(at, hidden, f"input_layernorm.{part}", f"post_attention_layernorm.{part}")
            router, routes = f"{at}mlp.router", count + config["zero_expert_num"]
            yield Tensor(f"{router}.classifier.weight", (routes, hidden), dtype="F32")
            yield Tensor(f"{router}.e_score_correction_bias", (routes,), dtype="F32")
            yield from _experts(f"{at}mlp.", count, hidden, config["expert_ffn_hidden_size"])

    yield from _around("model.", config, layers())


# Gemma 4, Apertus, InternLM2


def _gemma4_layers(p: str, c: Config) -> Tensors:
    hidden = c["hidden_size"]
    names = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]
    if c["enable_moe_block"]:
        names += ["pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"]
    for layer, kind in enumerate(c["layer_types"]):
        at = f"{p}layers.{layer}."
        whole = kind == "full_attention"
        shared = whole and c["attention_k_eq_v"]
        heads = {"num_key_value_heads": c["num_global_key_value_heads"] or c["num_key_value_heads"]} if shared else {}
        size = {"head_dim": c["global_head_dim"]} if whole else {}
        for tensor in _attention(f"{at}self_attn.", {**c, **heads, **size}):
            if not (shared and ".v_proj." in tensor.name):
                yield tensor
        yield from _mlp(f"{at}mlp.", hidden, c["intermediate_size"])
        if c["enable_moe_block"]:
            yield Tensor(f"{at}router.scale", (hidden,))
            yield Tensor(f"{at}router.per_expert_scale", (c["num_experts"],))
            yield from _linear(f"{at}router.proj", c["num_experts"], hidden, linear=False)
            yield from _experts(at, c["num_experts"], hidden, c["moe_intermediate_size"])
        if size := c["hidden_size_per_layer_input"]:
            yield from _linear(f"{at}per_layer_input_gate", size, hidden)
            yield from _linear(f"{at}per_layer_projection", hidden, size)
            yield from _norm(f"{at}post_per_layer_input_norm", hidden)
        yield Tensor(f"{at}layer_scalar", (1,))
        yield from _layer_norms(at, hidden, *names)


def gemma4_tensors(config: Config, p: str = "model.") -> Tensors:
    hidden, size = config["hidden_size"], config["hidden_size_per_layer_input"]
    if size:
        width = config["num_hidden_layers"] * size
        yield Tensor(f"{p}embed_tokens_per_layer.weight", (config["vocab_size_per_layer_input"], width))
        yield from _linear(f"{p}per_layer_model_projection", width, hidden, linear=False)
        yield from _norm(f"{p}per_layer_projection_norm", size)
    yield from _around(p, config, _gemma4_layers(p, config))


def _apertus(config: Config) -> Tensors:
    hidden = config["hidden_size"]

    def layers() -> Tensors:
        for layer in range(config["num_hidden_layers"]):
            at = f"model.layers.{layer}."
            yield from _attention(f"{at}self_attn.", config)
            yield from _up_and_down(f"{at}mlp.", hidden, config["intermediate_size"])
            for name, size in (("alpha_n", (1,)), ("alpha_p", (1,)), ("beta", ()), ("eps", ())):
                yield Tensor(f"{at}mlp.act_fn.{name}", size)
            yield from _layer_norms(at, hidden, "attention_layernorm", "feedforward_layernorm")

    yield from _around("model.", config, layers())


def _internlm2(config: Config) -> Tensors:
    hidden, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    yield Tensor("model.tok_embeddings.weight", (config["vocab_size"], hidden))
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        yield from _linear(f"{at}attention.wqkv", (heads + 2 * kv) * (hidden // heads), hidden)
        yield from _linear(f"{at}attention.wo", hidden, hidden)
        yield from _mlp(f"{at}feed_forward.", hidden, config["intermediate_size"], ("w1", "w3", "w2"))
        yield from _layer_norms(at, hidden, "attention_norm", "ffn_norm")
    yield from _norm("model.norm", hidden)
    yield Tensor("output.weight", (config["vocab_size"], hidden))


def step_tensors(config: Config) -> Tensors:
    hidden, last = config["hidden_size"], config["num_hidden_layers"]
    sparse = {int(layer) for layer in config["moe_layers_enum"].split(",")}
    other = config["attention_other_setting"]

    def layers() -> Tensors:
        for layer in range(last + config["num_nextn_predict_layers"]):
            at = f"model.layers.{layer}."
            heads = other if config["layer_types"][layer] == "sliding_attention" else config
            own, shared = heads["num_attention_heads"], heads["num_attention_groups"]
            counts = {**config, "num_attention_heads": own, "num_key_value_heads": shared}
            yield from _attention(f"{at}self_attn.", counts)
            yield from _linear(f"{at}self_attn.g_proj", own, hidden, linear=False)
            if layer in sparse:
                yield from _linear(f"{at}moe.gate", config["moe_num_experts"], hidden, linear=False)
                yield Tensor(f"{at}moe.router_bias", (config["moe_num_experts"],), dtype="F32")
                yield from _experts(f"{at}moe.", config["moe_num_experts"], hidden, config["moe_intermediate_size"])
                yield from _mlp(f"{at}share_expert.", hidden, config["share_expert_dim"])
            else:
                yield from _mlp(f"{at}mlp.", hidden, config["intermediate_size"])
            if layer >= last:
                yield from _layer_norms(at, hidden, "enorm", "hnorm", "transformer.shared_head.norm")
                yield from _linear(f"{at}eh_proj", hidden, 2 * hidden, linear=False)
                yield Tensor(f"{at}transformer.shared_head.output.weight", (config["vocab_size"], hidden))
            yield from _layer_norms(at, hidden)

    yield from _around("model.", config, layers())


def minimax_m3_tensors(config: Config, p: str = "model.", head: str = "lm_head") -> Tensors:
    hidden, count = config["hidden_size"], config["num_local_experts"]
    sparse = config["sparse_attention_config"]

    def layers() -> Tensors:
        for layer in range(config["num_hidden_layers"]):
            at, size = f"{p}layers.{layer}.", sparse["sparse_index_dim"]
            yield from _attention(f"{at}self_attn.", config)
            if sparse["sparse_attention_freq"][layer]:
                yield from _linear(f"{at}self_attn.index_q_proj", sparse["sparse_num_index_heads"] * size, hidden)
                yield from _linear(f"{at}self_attn.index_k_proj", size, hidden)
                yield from _norm(f"{at}self_attn.index_q_norm", size)
                yield from _norm(f"{at}self_attn.index_k_norm", size)
            if config["moe_layer_freq"][layer]:
                moe = f"{at}block_sparse_moe."
                yield from _linear(f"{moe}gate", count, hidden, linear=False)
                yield Tensor(f"{moe}e_score_correction_bias", (count,), dtype="F32")
                yield from _experts(moe, count, hidden, config["intermediate_size"], names=("w1", "w3", "w2"))
                yield from _mlp(f"{moe}shared_experts.", hidden, config["intermediate_size"])
            else:
                yield from _mlp(f"{at}mlp.", hidden, config["dense_intermediate_size"])
            yield from _layer_norms(at, hidden)

    yield from _around(p, config, layers(), head=head)


MORE_TENSORS: Mapping[str, Callable[[Config], Tensors]] = {
    "Llama4ForConditionalGeneration": _llama4,
    "NemotronHForCausalLM": _nemotron_h,
    "MiMoV2ForCausalLM": _mimo_v2,
    "MiMoV2FlashForCausalLM": _mimo_v2,
    "BailingMoeV2ForCausalLM": _bailing_moe,
    "HunYuanMoEV1ForCausalLM": _hunyuan,
    "HunYuanDenseV1ForCausalLM": _hunyuan,
    "GraniteMoeForCausalLM": _granite_moe,
    "PhiMoEForCausalLM": _phimoe,
    "LongcatFlashForCausalLM": _longcat,
    "Gemma4ForCausalLM": gemma4_tensors,
    "ApertusForCausalLM": _apertus,
    "InternLM2ForCausalLM": _internlm2,
    "Step3p5ForCausalLM": step_tensors,
    "MiniMaxM3SparseForCausalLM": minimax_m3_tensors,
}


# Tiny models


_NEMOTRON: Config = {
    **_DECODER, **_MOE, **_OUTER, "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h",
    "hybrid_override_pattern": "*EME-", "num_hidden_layers": 5, "n_routed_experts": EXPERTS, "n_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "moe_shared_expert_intermediate_size": 256, "mlp_hidden_act": "relu2",
    "mlp_bias": False, "mamba_num_heads": 128, "mamba_head_dim": 4, "ssm_state_size": 64, "n_groups": 8,
    "conv_kernel": 4, "expand": 2, "use_conv_bias": True, "use_bias": False, "mamba_hidden_act": "silu",
    "mamba_proj_bias": False, "chunk_size": 128, "layer_norm_epsilon": 1e-5, "routed_scaling_factor": 2.5,
    "sliding_window": None, "residual_in_fp32": False, "time_step_floor": 0.0001, "mamba_ssm_cache_dtype": "float32",
}  # fmt: skip
_NEMOTRON_LINES = {
    "*.mixer.{q_proj,k_proj,v_proj,o_proj,out_proj,up_proj,down_proj}": "fp8", "*.mixer.experts.*": "int4",
    "*.layers.1.mixer.experts.{0..2}.*": "fp8", "*.shared_experts.*": "int4", "*.mixer.in_proj": "int4",
}  # fmt: skip
GEMMA4: Config = {
    **_DECODER, **_OUTER, "architectures": ["Gemma4ForCausalLM"], "model_type": "gemma4_text",
    "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 64,
    "global_head_dim": 128, "attention_k_eq_v": False, "enable_moe_block": False, "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 512, "num_kv_shared_layers": 0, "num_global_key_value_heads": None,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25},
    },
}  # fmt: skip
STEP: Config = {
    **{key: value for key, value in _DECODER.items() if key not in ("num_key_value_heads", "rope_theta")},
    **_OUTER, "architectures": ["Step3p5ForCausalLM"], "model_type": "step3p5", "num_attention_groups": 2,
    "moe_intermediate_size": 256, "moe_num_experts": EXPERTS, "moe_top_k": 2, "share_expert_dim": 256,
    "share_expert_dims": 256, "moe_layers_enum": "1,2", "need_fp32_gate": True, "use_moe_router_bias": True,
    "moe_router_scaling_factor": 3.0, "moe_router_activation": "sigmoid", "num_nextn_predict_layers": 1,
    "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "attention_other_setting": {
        "attention_type": "sliding_attention", "num_attention_heads": 6, "num_attention_groups": 2,
        "head_dim": 128,
    },
    "sliding_window": 64, "yarn_only_types": [], "rope_scaling": None, "use_head_wise_attn_gate": True,
    "rope_theta": [10000.0, 10000.0, 10000.0, 10000.0], "partial_rotary_factors": [0.5, 1.0, 0.5, 1.0],
    "swiglu_limits": [0.0, 0.0, 0.0, 0.0], "swiglu_limits_shared": [0.0, 0.0, 0.0, 0.0],
}  # fmt: skip
STEP_LINES = {
    "*.self_attn.*": "fp8", "*.moe.experts.*": "int4", "*.layers.1.moe.experts.{0..2}.*": "fp8",
    "*.layers.2.moe.experts.{3,5}.*": "bf16", "*.share_expert.*": "int4", "*.layers.0.mlp.*": "fp8",
}  # fmt: skip
MINIMAX_M3: Config = {
    **_DECODER, **_OUTER, "architectures": ["MiniMaxM3SparseForCausalLM"], "model_type": "minimax_m3",
    "hidden_act": "swigluoai", "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "intermediate_size": 256,
    "dense_intermediate_size": 512, "shared_intermediate_size": 256, "n_shared_experts": 1,
    "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "moe_layer_freq": [0, 1, 1],
    "partial_rotary_factor": 0.5, "rotary_dim": 64, "routed_scaling_factor": 2.0, "scoring_func": "sigmoid",
    "use_routing_bias": True, "use_gemma_norm": True, "use_qk_norm": True, "qk_norm_type": "per_head",
    "num_mtp_modules": 0,
    "sparse_attention_config": {
        "use_sparse_attention": True, "sparse_attention_freq": [0, 1, 1], "sparse_disable_index_value": [0, 1, 1],
        "sparse_num_index_heads": 2, "sparse_index_dim": 128, "sparse_block_size": 128, "sparse_init_block": 0,
        "sparse_local_block": 1, "sparse_score_type": "max", "sparse_topk_blocks": 16,
    },
}  # fmt: skip
MINIMAX_M3_LINES = {
    "*.self_attn.*": "fp8", "*.layers.2.self_attn.*": "bf16", "*.block_sparse_moe.experts.*": "int4",
    "*.layers.1.block_sparse_moe.experts.{0..2}.*": "fp8", "*.layers.1.block_sparse_moe.experts.{4,6}.*": "mxfp4",
    "*.layers.2.block_sparse_moe.experts.{3,5}.*": "bf16",
    "*.shared_experts.*": "int4", "*.layers.0.mlp.*": "fp8",
}  # fmt: skip
TRITON = {"attention_backend": "triton"}
_MOE_LINES = {
    "*.self_attn.*": "fp8", "*.block_sparse_moe.experts.*": "int4",
    "*.layers.1.block_sparse_moe.experts.{0..2}.*": "fp8",
}  # fmt: skip

MORE_TINY: Mapping[str, TinyModel] = {
    "step3p5": TinyModel(STEP, STEP_LINES, degrees=((2, 1), (2, 2)), norms_add_one=True),
    "minimax_m3": TinyModel(MINIMAX_M3, MINIMAX_M3_LINES, degrees=((2, 1), (2, 2)), norms_add_one=True),
    "llama4": TinyModel(
        {
            "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", **_OUTER,
            "image_token_index": 500, "boi_token_index": 501, "eoi_token_index": 502,
            "text_config": {
                **_DECODER, "model_type": "llama4_text", "intermediate_size": 256, "intermediate_size_mlp": 512,
                "num_local_experts": EXPERTS, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
                "use_qk_norm": False, "attention_chunk_size": 8192, "attn_temperature_tuning": False,
                "rope_scaling": None, "dtype": "bfloat16",
            },
            "vision_config": {
                "model_type": "llama4_vision_model", "hidden_size": 64, "intermediate_size": 256,
                "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
                "vision_output_dim": 64, "projector_input_dim": 64, "projector_output_dim": 64,
                "pixel_shuffle_ratio": 0.5,
            },
        },
        {
            "*.self_attn.*": "fp8", "*.feed_forward.{gate_proj,up_proj,down_proj}": "int4",
            "*.feed_forward.experts.*": "fp8", "*.shared_expert.*": "int4",
        },
        degrees=((2, 1), (2, 2)),
    ),
    "nemotron_h": TinyModel(_NEMOTRON, _NEMOTRON_LINES, options=_HYBRID, degrees=((2, 1), (2, 2))),
    "nemotron_h_latent": TinyModel(
        {**_NEMOTRON, "hidden_size": 512, "moe_latent_size": 256},
        {**_NEMOTRON_LINES, "*_latent_proj": "fp8"}, options=_HYBRID, degrees=((2, 2),),
    ),
    "mimo_v2": TinyModel(
        {
            **_DECODER, **_MOE, **_OUTER, "architectures": ["MiMoV2FlashForCausalLM"], "model_type": "mimo_v2_flash",
            "head_dim": 192, "v_head_dim": 128, "swa_head_dim": 192, "swa_v_head_dim": 128,
            "swa_num_attention_heads": 8, "swa_num_key_value_heads": 4, "num_key_value_heads": 4,
            "hybrid_layer_pattern": [0, 1, 1], "moe_layer_freq": [0, 1, 1], "sliding_window": 128,
            "sliding_window_size": 128, "swa_rope_theta": 10000.0, "add_swa_attention_sink_bias": True,
            "add_full_attention_sink_bias": False, "attention_value_scale": None, "layernorm_epsilon": 1e-5,
            "n_routed_experts": EXPERTS, "n_group": 1, "topk_group": 1, "topk_method": "noaux_tc",
            "scoring_func": "sigmoid", "partial_rotary_factor": 0.334, "encoder_only": False,
        },
        {"*.self_attn.*": "fp8", **_EXPERT_LINES, "*.layers.0.mlp.*": "int4"}, degrees=((2, 1), (2, 2)),
    ),
    "bailing_moe": TinyModel(
        {
            **_DECODER, **_MOE, **_OUTER, "architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe",
            "num_experts": EXPERTS, "num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
            "use_bias": False, "use_qkv_bias": False, "use_qk_norm": True, "router_dtype": "fp32",
            "moe_router_enable_expert_bias": True, "score_function": "sigmoid", "routed_scaling_factor": 2.5,
            "norm_head": False, "norm_softmax": False, "embedding_dropout": 0.0, "partial_rotary_factor": 0.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "num_nextn_predict_layers": 0,
        },
        {"*.attention.*": "fp8", **_EXPERT_LINES, "*.shared_experts.*": "int4", "*.layers.0.mlp.*": "int4"},
        degrees=((2, 1), (2, 2)),
    ),
    "hunyuan": TinyModel(
        {
            **_DECODER, **_OUTER, "architectures": ["HunYuanMoEV1ForCausalLM"], "model_type": "hunyuan_v1_moe",
            "tie_word_embeddings": True, "num_experts": EXPERTS, "moe_topk": [2, 2, 2],
            "moe_intermediate_size": [256, 256, 256], "num_shared_expert": [1, 1, 1], "use_mixed_mlp_moe": True,
            "use_qk_norm": True, "use_cla": False, "cla_share_factor": 2, "rope_scaling": None,
        },
        {
            "*.self_attn.*": "fp8", "*.layers.1.self_attn.*": "int4", "*.layers.2.self_attn.o_proj": "bf16",
            **_EXPERT_LINES, "*.layers.2.mlp.experts.*": "fp8", "*.layers.{1..2}.mlp.shared_mlp.*": "int4",
        },
        degrees=((2, 1), (2, 2)),
    ),
    "hunyuan_dense": TinyModel(
        {
            **_DECODER, **_OUTER, "architectures": ["HunYuanDenseV1ForCausalLM"], "model_type": "hunyuan_v1_dense",
            "tie_word_embeddings": True, "use_qk_norm": True, "use_cla": False, "rope_scaling": None,
        },
        _DENSE_LINES, degrees=((2, 1),),
    ),
    "granitemoe": TinyModel(
        {
            **_HEADS_OF_HIDDEN, **_OUTER, "architectures": ["GraniteMoeForCausalLM"], "model_type": "granitemoe",
            "intermediate_size": 256, "num_local_experts": EXPERTS, "num_experts_per_tok": 2,
            "attention_multiplier": 0.1, "embedding_multiplier": 12.0, "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
        },
        _MOE_LINES, degrees=((2, 1), (2, 2)),
    ),
    "phimoe": TinyModel(
        {
            **_HEADS_OF_HIDDEN, **_OUTER, "architectures": ["PhiMoEForCausalLM"], "model_type": "phimoe",
            "intermediate_size": 256, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "lm_head_bias": True,
            "attention_bias": True, "sliding_window": None, "rope_scaling": None, "router_jitter_noise": 0.01,
        },
        _MOE_LINES, degrees=((2, 1), (2, 2)),
    ),
    "longcat": TinyModel(
        {
            **{key: value for key, value in _DECODER.items() if key not in ("num_hidden_layers", "head_dim")},
            **_OUTER, "architectures": ["LongcatFlashForCausalLM"], "model_type": "longcat_flash", "num_layers": 2,
            "q_lora_rank": 256, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
            "v_head_dim": 128, "num_key_value_heads": 4, "ffn_hidden_size": 512, "expert_ffn_hidden_size": 256,
            "n_routed_experts": EXPERTS, "zero_expert_num": 2, "zero_expert_type": "identity", "moe_topk": 2,
            "routed_scaling_factor": 6.0, "router_bias": False, "attention_method": "MLA", "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True, "rope_scaling": {**_YARN, "rope_theta": 10000.0},
            "max_position_embeddings": 8192,
        },
        {**_MLA_LINES, "*.mlps.*": "fp8", "*.layers.1.mlps.0.*": "int4"}, dense=_A_PROJECTIONS,
        degrees=((2, 1), (2, 2)),
    ),
    "gemma4": TinyModel(
        {**GEMMA4, "attention_k_eq_v": True, "hidden_size_per_layer_input": 128},
        {**_DENSE_LINES, "*.per_layer_projection": "fp8"}, options=TRITON, degrees=((2, 1),),
    ),
    "gemma4_moe": TinyModel(
        {
            **GEMMA4, "enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": 2,
            "moe_intermediate_size": 256,
        },
        {**_DENSE_LINES, "*.experts.*": "fp8", "*.layers.1.experts.{0..2}.*": "bf16", "*.layers.2.experts.*": "bf16"},
        options=TRITON, degrees=((2, 1),),
    ),
    "apertus": TinyModel(
        {
            **_DECODER, **_OUTER, "architectures": ["ApertusForCausalLM"], "model_type": "apertus",
            "hidden_act": "xielu", "rope_scaling": None,
        },
        _DENSE_LINES, degrees=((2, 1),),
    ),
    "internlm2": TinyModel(
        {
            **_HEADS_OF_HIDDEN, **_OUTER, "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2",
            "bias": False, "rope_scaling": None,
        },
        {"*.attention.wo": "fp8", "*.feed_forward.*": "int4", "*.layers.1.feed_forward.*": "fp8"},
        dense=("wqkv",), degrees=((2, 1),),
    ),
}  # fmt: skip
