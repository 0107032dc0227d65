"""Names and shapes of all tensors of models beside an encoder of images, and tiny models of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from support.family_parts import (
    _A_PROJECTIONS,
    _DECODER,
    _DENSE_LINES,
    _HYBRID,
    _MLA,
    _OUTER,
    EXPERTS,
    Config,
    Tensor,
    Tensors,
    TinyModel,
    _around,
    _dense,
    _experts,
    _latent_attention,
    _layer_norms,
    _linear,
    _mlp,
    _norm,
)
from support.more_families import (
    GEMMA4,
    MINIMAX_M3,
    MINIMAX_M3_LINES,
    STEP,
    STEP_LINES,
    TRITON,
    gemma4_tensors,
    minimax_m3_tensors,
    step_tensors,
)

__all__ = ["GEMMA3", "IMAGE_TENSORS", "IMAGE_TINY", "KIMI_K3_WIDE", "gemma3_tensors"]

_GEMMA_NORMS = (
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
)  # fmt: skip


# Gemma 3


def gemma3_tensors(config: Config, p: str = "model.", head: str = "lm_head") -> Tensors:
    yield from _dense(config, p, head, norms="head", around=_GEMMA_NORMS)


def _clip_layers(p: str, c: Config) -> Tensors:
    """The layers of an encoder as in CLIP and SigLIP, and the norm after them."""
    hidden, size = c["hidden_size"], c["intermediate_size"]
    for layer in range(c["num_hidden_layers"]):
        at = f"{p}encoder.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{at}self_attn.{name}", hidden, hidden, bias=True, linear=False)
        yield from _linear(f"{at}mlp.fc1", size, hidden, bias=True, linear=False)
        yield from _linear(f"{at}mlp.fc2", hidden, size, bias=True, linear=False)
        yield from _norm(f"{at}layer_norm1", hidden, bias=True)
        yield from _norm(f"{at}layer_norm2", hidden, bias=True)
    yield from _norm(f"{p}post_layernorm", hidden, bias=True)


def _siglip(p: str, c: Config) -> Tensors:
    hidden = c["hidden_size"]
    yield Tensor(f"{p}embeddings.patch_embedding.weight", (hidden, 3, c["patch_size"], c["patch_size"]))
    yield Tensor(f"{p}embeddings.patch_embedding.bias", (hidden,))
    yield Tensor(f"{p}embeddings.position_embedding.weight", ((c["image_size"] // c["patch_size"]) ** 2, hidden))
    yield from _clip_layers(p, c)


def _gemma3(config: Config) -> Tensors:
    text, vision = {**config["text_config"], "tie_word_embeddings": True}, config["vision_config"]
    yield from gemma3_tensors(text, "language_model.model.", "language_model.lm_head")
    yield from _siglip("vision_tower.vision_model.", vision)
    yield Tensor("multi_modal_projector.mm_input_projection_weight", (vision["hidden_size"], text["hidden_size"]))
    yield from _norm("multi_modal_projector.mm_soft_emb_norm", vision["hidden_size"])


# Gemma 4


def _gemma4(config: Config) -> Tensors:
    text, c = config["text_config"], config["vision_config"]
    yield from gemma4_tensors({**text, "tie_word_embeddings": True}, "model.language_model.")
    hidden, size, patch = c["hidden_size"], c["intermediate_size"], 3 * c["patch_size"] ** 2
    p, inner, kv = "model.vision_tower.", c["head_dim"] * c["num_attention_heads"], c["num_key_value_heads"]
    yield Tensor(f"{p}patch_embedder.position_embedding_table", (2, c["position_embedding_size"], hidden))
    yield from _linear(f"{p}patch_embedder.input_proj", hidden, patch, linear=False)
    for layer in range(c["num_hidden_layers"]):
        at = f"{p}encoder.layers.{layer}."
        for name, outputs in (("q", inner), ("k", kv * c["head_dim"]), ("v", kv * c["head_dim"])):
            yield from _linear(f"{at}self_attn.{name}_proj.linear", outputs, hidden, linear=False)
        yield from _linear(f"{at}self_attn.o_proj.linear", hidden, inner, linear=False)
        yield from _norm(f"{at}self_attn.q_norm", c["head_dim"])
        yield from _norm(f"{at}self_attn.k_norm", c["head_dim"])
        for name in ("gate", "up"):
            yield from _linear(f"{at}mlp.{name}_proj.linear", size, hidden, linear=False)
        yield from _linear(f"{at}mlp.down_proj.linear", hidden, size, linear=False)
        yield from _layer_norms(at, hidden, *_GEMMA_NORMS)
    yield from _linear("model.embed_vision.embedding_projection", text["hidden_size"], hidden, linear=False)


# Step 3.7


def _step(config: Config) -> Tensors:
    yield from step_tensors({**config["text_config"], "tie_word_embeddings": False})
    c, p = config["vision_config"], "vision_model."
    hidden, size = c["width"], int(c["width"] * c["mlp_ratio"])
    yield Tensor(f"{p}conv1.weight", (hidden, 3, c["patch_size"], c["patch_size"]))
    yield Tensor(f"{p}positional_embedding", ((c["image_size"] // c["patch_size"]) ** 2, hidden))
    yield from _norm(f"{p}ln_pre", hidden, bias=True)
    for layer in range(c["layers"]):
        at = f"{p}transformer.resblocks.{layer}."
        yield Tensor(f"{at}attn.in_proj_weight", (3 * hidden, hidden))
        yield Tensor(f"{at}attn.in_proj_bias", (3 * hidden,))
        yield from _linear(f"{at}attn.out_proj", hidden, hidden, bias=True, linear=False)
        yield from _linear(f"{at}mlp.c_fc", size, hidden, bias=True, linear=False)
        yield from _linear(f"{at}mlp.c_proj", hidden, size, bias=True, linear=False)
        for name in ("ln_1", "ln_2"):
            yield from _norm(f"{at}{name}", hidden, bias=True)
        for name in ("ls_1", "ls_2"):
            yield Tensor(f"{at}{name}.gamma", (hidden,))
    for number, width in ((1, hidden), (2, 2 * hidden)):
        yield Tensor(f"{p}vit_downsampler{number}.weight", (2 * width, width, 3, 3))
        yield Tensor(f"{p}vit_downsampler{number}.bias", (2 * width,))
    yield from _linear("vit_large_projector", config["text_config"]["hidden_size"], 4 * hidden, linear=False)


# MiniMax-M3


def _minimax_m3(config: Config) -> Tensors:
    text, c, p = config["text_config"], config["vision_config"], "vision_tower.vision_model."
    yield from minimax_m3_tensors(
        {**text, "tie_word_embeddings": False}, "language_model.model.", "language_model.lm_head"
    )
    hidden, outer = c["hidden_size"], text["hidden_size"]
    compression = c["img_token_compression_config"]
    patch = 3, compression["temporal_patch_size"], c["patch_size"], c["patch_size"]
    yield Tensor(f"{p}embeddings.patch_embedding.weight", (hidden, *patch))
    yield from _norm(f"{p}pre_layrnorm", hidden, bias=True)
    yield from _clip_layers(p, c)
    merged = outer * compression["spatial_merge_size"] ** 2
    for projector, inputs in (("multi_modal_projector", hidden), ("patch_merge_mlp", merged)):
        yield from _linear(f"{projector}.linear_1", outer, inputs, bias=True, linear=False)
        yield from _linear(f"{projector}.linear_2", outer, outer, bias=True, linear=False)


# Kimi-K3


def _delta_attention(p: str, c: Config) -> Tensors:
    linear, hidden = c["linear_attn_config"], c["hidden_size"]
    heads, size = linear["num_heads"], linear["head_dim"]
    yield Tensor(f"{p}A_log", (size,), dtype="F32")  # of which the class takes one for each head
    yield Tensor(f"{p}dt_bias", (heads * size,), dtype="F32")
    for name in "qkvg":
        yield from _linear(f"{p}{name}_proj", heads * size, hidden)
    for name in "qkv":
        yield Tensor(f"{p}{name}_conv1d.weight", (heads * size, 1, linear["short_conv_kernel_size"]))
    yield from _linear(f"{p}b_proj", heads, hidden, linear=False)
    yield from _linear(f"{p}f_a_proj", size, hidden, linear=False)
    yield from _linear(f"{p}f_b_proj", heads * size, size, linear=False)
    yield from _norm(f"{p}o_norm", size)
    yield from _linear(f"{p}o_proj", hidden, heads * size)


def _kimi_k3(config: Config) -> Tensors:
    c, p, v = config["text_config"], "language_model.model.", config["vision_config"]
    hidden, latent, size = c["hidden_size"], c["routed_expert_hidden_size"], c["moe_intermediate_size"]

    def layers() -> Tensors:
        for layer in range(c["num_hidden_layers"]):
            at = f"{p}layers.{layer}."
            if layer + 1 in c["linear_attn_config"]["kda_layers"]:
                yield from _delta_attention(f"{at}self_attn.", c)
            else:
                yield from _latent_attention(f"{at}self_attn.", c)
                yield from _linear(f"{at}self_attn.g_proj", c["num_attention_heads"] * c["v_head_dim"], hidden)
            if layer < c["first_k_dense_replace"]:
                yield from _mlp(f"{at}mlp.", hidden, c["intermediate_size"])
            else:
                moe = f"{at}block_sparse_moe."
                yield from _linear(f"{moe}gate", c["num_experts"], hidden, linear=False)
                yield Tensor(f"{moe}gate.e_score_correction_bias", (c["num_experts"],))
                yield from _linear(f"{moe}routed_expert_down_proj", latent, hidden, linear=False)
                yield from _norm(f"{moe}routed_expert_norm", latent)
                yield from _linear(f"{moe}routed_expert_up_proj", hidden, latent, linear=False)
                yield from _experts(moe, c["num_experts"], latent, size, names=("w1", "w3", "w2"))
                yield from _mlp(f"{moe}shared_experts.", hidden, c["num_shared_experts"] * size)
            names = "input_layernorm", "post_attention_layernorm", "self_attention_res_norm", "mlp_res_norm"
            yield from _layer_norms(at, hidden, *names)
            for name in ("self_attention", "mlp"):
                yield from _linear(f"{at}{name}_res_proj", 1, hidden, linear=False)

    yield from _around(p, {**c, "tie_word_embeddings": False}, layers(), head="language_model.lm_head")
    yield from _norm(f"{p}output_attn_res_norm", hidden)
    yield from _linear(f"{p}output_attn_res_proj", 1, hidden, linear=False)
    width, inner, patch, q = v["vt_hidden_size"], v["vt_intermediate_size"], v["patch_size"], v["qkv_hidden_size"]
    yield Tensor("vision_tower.patch_embed.proj.weight", (width, 3, patch, patch))
    positions = v["init_pos_emb_height"], v["init_pos_emb_width"], width
    yield Tensor("vision_tower.patch_embed.pos_emb.weight", positions)
    for layer in range(v["vt_num_hidden_layers"]):
        at = f"vision_tower.encoder.blocks.{layer}."
        yield from _layer_norms(at, width, "norm0", "norm1")
        for name, shape in (("mlp.fc0", (inner, width)), ("mlp.fc1", (width, inner)), ("wqkv", (3 * q, width))):
            yield from _linear(f"{at}{name}", *shape, linear=False)
        yield from _linear(f"{at}wo", width, q, linear=False)
    yield from _norm("vision_tower.encoder.final_layernorm", width)
    merged = width * 4
    yield from _linear("mm_projector.proj.0", merged, merged, linear=False)
    yield from _linear("mm_projector.proj.2", hidden, merged, linear=False)
    yield from _norm("mm_projector.post_norm", hidden)


IMAGE_TENSORS: Mapping[str, Callable[[Config], Tensors]] = {
    "Gemma3ForConditionalGeneration": _gemma3,
    "Gemma4ForConditionalGeneration": _gemma4,
    "Step3p7ForConditionalGeneration": _step,
    "MiniMaxM3SparseForConditionalGeneration": _minimax_m3,
    "KimiK3ForConditionalGeneration": _kimi_k3,
}


# Tiny models

GEMMA3: Config = {
    **_DECODER, **_OUTER, "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
    "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 128,
    "sliding_window": 64, "rope_local_base_freq": 10000.0, "rope_theta": 1000000.0,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}  # fmt: skip
_SIGLIP: Config = {
    "model_type": "siglip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "num_channels": 3, "vision_use_head": False,
}  # fmt: skip
_GEMMA4_VISION: Config = {
    "model_type": "gemma4_vision", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "patch_size": 16, "pooling_kernel_size": 3,
    "position_embedding_size": 16, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
}  # fmt: skip

IMAGE_TINY: Mapping[str, TinyModel] = {
    "gemma3_images": TinyModel(
        {
            **_OUTER, "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
            "tie_word_embeddings": True, "text_config": GEMMA3, "vision_config": _SIGLIP, "mm_tokens_per_image": 4,
            "boi_token_index": 500, "eoi_token_index": 501, "image_token_index": 502,
        },
        _DENSE_LINES, degrees=((2, 1),),
    ),
    "gemma4_images": TinyModel(
        {
            **_OUTER, "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4",
            "tie_word_embeddings": True, "vision_config": _GEMMA4_VISION, "image_token_id": 500,
            "text_config": {
                **GEMMA4, "enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": 2,
                "moe_intermediate_size": 256, "attention_k_eq_v": True, "global_head_dim": 256,
                "num_global_key_value_heads": 1,
            },
        },
        {**_DENSE_LINES, "*.experts.*": "fp8", "*.layers.1.experts.{0..2}.*": "bf16"},
        options=TRITON, degrees=((2, 2),),
    ),
    "step3p7": TinyModel(
        {
            **_OUTER, "architectures": ["Step3p7ForConditionalGeneration"], "model_type": "step3p7",
            "text_config": {**STEP, "dtype": "bfloat16"}, "image_token_id": 500,
            "vision_config": {
                "model_type": "perception_encoder", "width": 64, "layers": 1, "heads": 2, "image_size": 28,
                "patch_size": 14, "mlp_ratio": 2.0,
            },
        },
        STEP_LINES, degrees=((2, 1), (2, 2)), norms_add_one=True,
    ),
    "minimax_m3_images": TinyModel(
        {
            **_OUTER, "architectures": ["MiniMaxM3SparseForConditionalGeneration"], "model_type": "minimax_m3_vl",
            "text_config": {**MINIMAX_M3, "model_type": "minimax_m2", "dtype": "bfloat16"}, "image_token_index": 500,
            "video_token_index": 501, "projector_hidden_act": "gelu", "multimodal_projector_bias": True,
            "vision_config": {
                "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128,
                "num_hidden_layers": 1, "num_attention_heads": 2, "num_channels": 3, "image_size": 28,
                "patch_size": 14, "hidden_act": "gelu", "layer_norm_eps": 1e-5, "position_embedding_type": "rope",
                "rope_mode": "3d", "rope_theta": 10000.0, "vision_segment_max_frames": None,
                "img_token_compression_config": {"temporal_patch_size": 2, "spatial_merge_size": 2},
            },
        },
        MINIMAX_M3_LINES, degrees=((2, 1), (2, 2)), norms_add_one=True,
    ),
    "kimi_k3": TinyModel(
        {
            **_OUTER, "architectures": ["KimiK3ForConditionalGeneration"], "model_type": "kimi_k3", "pad_token_id": 0,
            "media_placeholder_token_id": 500,
            "text_config": {
                **{key: value for key, value in _DECODER.items() if key != "head_dim"}, **_MLA,
                "model_type": "kimi_linear", "dtype": "bfloat16", "hidden_act": "situ", "activation_situ_beta": 4.0,
                "activation_situ_linear_beta": 25.0, "attn_res_block_size": 2, "first_k_dense_replace": 1,
                "latent_moe_use_norm": True, "mla_use_nope": True, "mla_use_output_gate": True,
                "moe_intermediate_size": 256, "moe_layer_freq": 1, "moe_renormalize": True, "num_expert_group": 1,
                "moe_router_activation_func": "sigmoid", "num_experts": EXPERTS, "num_experts_per_token": 2,
                "num_shared_experts": 2, "routed_expert_hidden_size": 128, "routed_scaling_factor": 1.0,
                "topk_group": 1, "topk_method": "noaux_tc", "use_grouped_topk": True, "num_nextn_predict_layers": 0,
                "linear_attn_config": {
                    "full_attn_layers": [3], "kda_layers": [1, 2], "gate_lower_bound": -5.0, "head_dim": 128,
                    "num_heads": 4, "short_conv_kernel_size": 4, "use_full_rank_gate": True,
                },
            },
            "vision_config": {
                "activation_func": "gelu_pytorch_tanh", "attn_bias": False, "init_pos_emb_height": 4,
                "init_pos_emb_time": 4, "init_pos_emb_width": 4, "linear_bias": False, "merge_kernel_size": [2, 2],
                "merge_type": "sd2_tpool", "mlp_type": "mlp2", "mm_hidden_size": 64,
                "mm_projector_type": "patchmergerv2", "norm_type": "rmsnorm", "patch_embed_proj_bias": False,
                "patch_size": 14, "pos_emb_interpolation_mode": "bilinear", "pos_emb_type": "divided_fixed",
                "projector_hidden_act": "gelu", "projector_ln_eps": 1e-5, "qkv_hidden_size": 64,
                "text_hidden_size": 256, "vt_hidden_size": 64, "vt_intermediate_size": 128,
                "vt_num_attention_heads": 2, "vt_num_hidden_layers": 1,
            },
        },
        {
            "*.self_attn.{q_proj,k_proj,v_proj,g_proj,q_b_proj}": "fp8",
            "*.block_sparse_moe.experts.*": "mxfp4", "*.layers.1.block_sparse_moe.experts.{0..2}.*": "fp8",
            "*.layers.1.block_sparse_moe.experts.{3,5}.*": "int4", "*.layers.1.block_sparse_moe.experts.6.*": "bf16",
            "*.layers.2.*.shared_experts.*": "fp8", "*.layers.0.mlp.*": "int4",
        },
        dense=_A_PROJECTIONS, options=_HYBRID,
    ),
}  # fmt: skip
_K3 = IMAGE_TINY["kimi_k3"]
KIMI_K3_WIDE = replace(
    _K3,
    config={
        **_K3.config,
        "text_config": {
            **_K3.config["text_config"],
            "hidden_size": 512,
            "routed_expert_hidden_size": 256,
            "num_experts": 16,
        },
        "vision_config": {**_K3.config["vision_config"], "text_hidden_size": 512},
    },
)
"""Experts of sizes to which SGLang's own method for MXFP4 pads none; it cannot load those that it pads. There are so
many that their inputs, the last columns of a product, begin at a multiple of 32 bytes, as FP8's kernel wants."""
