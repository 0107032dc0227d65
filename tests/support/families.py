"""Names and shapes of all tensors in unquantized checkpoints of model families.

    for tensor in tensors_of(config): ...      # of a config.json, of the published sizes or of tiny ones
    TINY["qwen3_5_moe"].config                 # a tiny model of the family

Names are those of the published releases, with separate tensors for experts; :data:`STACKED` lists the unquantized
releases that have all experts of a layer in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from support.deepseek_v4 import deepseek_v4_tensors, tiny_deepseek_v4
from support.family_parts import (
    _A_PROJECTIONS,
    _DECODER,
    _DEEPSEEK,
    _DELTA_NET,
    _DENSE_LINES,
    _EXPERT_LINES,
    _HEADS_OF_HIDDEN,
    _HYBRID,
    _IMAGES,
    _INDEXER,
    _KIMI_K25,
    _MLA_LINES,
    _MOE,
    _MROPE,
    _OUTER,
    _SHARED,
    _SHARED_EXPERT,
    _VISION,
    EXPERTS,
    Config,
    Tensor,
    Tensors,
    TinyModel,
    _around,
    _attention,
    _delta_net,
    _dense,
    _experts,
    _image_encoder,
    _latent_attention,
    _layer_norms,
    _linear,
    _mlp,
    _norm,
)
from support.image_families import GEMMA3, IMAGE_TENSORS, IMAGE_TINY, gemma3_tensors
from support.mistral_large import LARGE_TENSORS, LARGE_TINY
from support.more_families import MORE_TENSORS, MORE_TINY

__all__ = ["STACKED", "TINY", "StackedRelease", "Tensor", "TinyModel", "tensors_of"]


class StackedRelease(NamedTuple):
    """How an unquantized release stores all experts of a layer in one tensor, without ``.weight``."""

    transposed: bool
    """``[E, K, N]`` instead of ``[E, N, K]``."""
    ups: tuple[str, str] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    names: tuple[str, ...] = ("experts.gate_up_proj", "experts.down_proj")
    """Of the tensors of gate and up, together or each, and of down, after the MoE block's; of three, after the
    layer's."""


_STEP = StackedRelease(False, names=("moe.gate_proj.weight", "moe.up_proj.weight", "moe.down_proj.weight"))

STACKED: Mapping[str, StackedRelease] = {
    "Qwen3_5MoeForConditionalGeneration": StackedRelease(False),
    "Qwen3VLMoeForConditionalGeneration": StackedRelease(True),
    "Llama4ForConditionalGeneration": StackedRelease(True),
    "Gemma4ForCausalLM": StackedRelease(False),
    "Gemma4ForConditionalGeneration": StackedRelease(False),
    "Step3p5ForCausalLM": _STEP,
    "Step3p7ForConditionalGeneration": _STEP,
    "GraniteMoeForCausalLM": StackedRelease(False, ("w1", "w3"), "w2", ("input_linear.weight", "output_linear.weight")),
}


def tensors_of(config: Config) -> Tensors:
    """All tensors in the order of layers."""
    yield from _FAMILIES[config["architectures"][0]](config)


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


def _qwen3_layers(p: str, c: Config) -> Tensors:
    for layer in range(c["num_hidden_layers"]):
        at = f"{p}layers.{layer}."
        yield from _attention(f"{at}self_attn.", c)
        if c.get("num_experts"):
            yield from _linear(f"{at}mlp.gate", c["num_experts"], c["hidden_size"], linear=False)
            yield from _experts(f"{at}mlp.", c["num_experts"], c["hidden_size"], c["moe_intermediate_size"])
        else:
            yield from _mlp(f"{at}mlp.", c["hidden_size"], c["intermediate_size"])
        yield from _layer_norms(at, c["hidden_size"])


def _qwen3(config: Config) -> Tensors:
    yield from _around("model.", config, _qwen3_layers("model.", config))


def _qwen3_vl_moe(config: Config) -> Tensors:
    text, p = config["text_config"], "model.language_model."
    tied = {**text, "tie_word_embeddings": config.get("tie_word_embeddings", False)}
    yield from _around(p, tied, _qwen3_layers(p, text))
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
    for number in range(config.get("num_nextn_predict_layers", 0)):
        yield from _layer_norms("model.", hidden, f"mtp_emb_norm.{number}", f"mtp_hidden_norm.{number}")
        yield from _linear(f"model.mtp_linear_proj.{number}", hidden, 2 * hidden, linear=False)
        yield from _attention(f"model.mtp_block.{number}.self_attn.", config, norms="none")
        yield from _mlp(f"model.mtp_block.{number}.mlp.", hidden, config["intermediate_size"])
        yield from _layer_norms(f"model.mtp_block.{number}.", hidden)


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


def _cohere2(config: Config) -> Tensors:
    yield from _dense(config, around=("input_layernorm",), norms="apart" if config.get("use_qk_norm") else "none")


_FAMILIES: Mapping[str, Callable[[Config], Tensors]] = {
    "Mistral3ForConditionalGeneration": _mistral3,
    "Ernie4_5_ForCausalLM": _dense,
    "Ernie4_5_MoeForCausalLM": _ernie_moe,
    "OlmoeForCausalLM": _olmoe,
    "Gemma3ForCausalLM": gemma3_tensors,
    "CohereForCausalLM": _cohere2,
    "Cohere2ForCausalLM": _cohere2,
    "Phi3ForCausalLM": _phi3,
    "GraniteForCausalLM": _dense,
    "DeepseekV4ForCausalLM": deepseek_v4_tensors,
    "Qwen2MoeForCausalLM": _qwen2_moe,
    "Qwen3MoeForCausalLM": _qwen3,
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
    **MORE_TENSORS,
    **IMAGE_TENSORS,
    **LARGE_TENSORS,
}


# Tiny models


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
    "deepseek_v3": TinyModel(
        {**_DEEPSEEK, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"},
        _MLA_LINES, dense=_A_PROJECTIONS, degrees=((2, 1), (2, 2)),
    ),
    "kimi_k25": TinyModel(_KIMI_K25, _MLA_LINES, dense=_A_PROJECTIONS, degrees=((2, 1), (2, 2))),
    "kimi_k25_packed": TinyModel(
        _KIMI_K25, {**_MLA_LINES, "*.mlp.experts.*": "packed", "*.layers.1.mlp.experts.{0..2}.*": "fp8"},
        degrees=((2, 1), (2, 2)),
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
        _MLA_LINES, dense=(*_A_PROJECTIONS, "indexer.wk", "indexer.wq_b"), degrees=((2, 1), (2, 2)),
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
        _DENSE_LINES, degrees=((2, 1),),
    ),
    "ernie4_5": TinyModel(
        {**_DECODER, **_OUTER, "architectures": ["Ernie4_5_ForCausalLM"], "model_type": "ernie4_5", "use_bias": False},
        _DENSE_LINES, degrees=((2, 1),),
    ),
    "ernie4_5_moe": TinyModel(
        {
            **_DECODER, **_OUTER, "architectures": ["Ernie4_5_MoeForCausalLM"], "model_type": "ernie4_5_moe",
            "moe_intermediate_size": 256, "moe_num_experts": EXPERTS, "moe_k": 2, "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1, "moe_layer_end_index": 2, "moe_layer_interval": 1, "use_bias": False,
            "num_nextn_predict_layers": 1,
        },
        {"*.self_attn.*": "fp8", **_EXPERT_LINES, "*.shared_experts.*": "int4"}, degrees=((2, 1), (2, 2)),
    ),
    "olmoe": TinyModel(
        {
            **_HEADS_OF_HIDDEN, **_OUTER, "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe",
            "intermediate_size": 256, "num_experts": EXPERTS, "num_experts_per_tok": 2, "norm_topk_prob": False,
            "rms_norm_eps": 1e-5,  # SGLang's class has it fixed
        },
        {"*.self_attn.*": "fp8", **_EXPERT_LINES}, degrees=((2, 1), (2, 2)),
    ),
    "gemma3": TinyModel(GEMMA3, _DENSE_LINES, degrees=((2, 1),)),
    "cohere": TinyModel(
        {
            **_HEADS_OF_HIDDEN, **_OUTER, "architectures": ["CohereForCausalLM"], "model_type": "cohere",
            "tie_word_embeddings": True, "layer_norm_eps": 1e-5, "logit_scale": 0.25, "use_qk_norm": True,
        },
        _DENSE_LINES, degrees=((2, 1),),
    ),
    "cohere2": TinyModel(
        {
            **_HEADS_OF_HIDDEN, **_OUTER, "architectures": ["Cohere2ForCausalLM"], "model_type": "cohere2",
            "tie_word_embeddings": True, "layer_norm_eps": 1e-5, "logit_scale": 0.25, "sliding_window": 64,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        _DENSE_LINES, degrees=((2, 1),),
    ),
    "phi3": TinyModel(
        {
            **_HEADS_OF_HIDDEN, **_OUTER, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3",
            "original_max_position_embeddings": 2048, "rope_scaling": None,
            # On four ranks: fewer key-value heads, and 192 columns of the MLP, one and a half blocks.
            "hidden_size": 512, "num_attention_heads": 4, "intermediate_size": 768,
        },
        _DENSE_LINES, degrees=((2, 1),),
    ),
    "granite": TinyModel(
        {
            **_HEADS_OF_HIDDEN, **_OUTER, "architectures": ["GraniteForCausalLM"], "model_type": "granite",
            "attention_multiplier": 0.1, "embedding_multiplier": 12.0, "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
        },
        _DENSE_LINES, degrees=((2, 1),),
    ),
    "deepseek_v4": tiny_deepseek_v4(),
    **MORE_TINY,
    **IMAGE_TINY,
    **LARGE_TINY,
}  # fmt: skip
