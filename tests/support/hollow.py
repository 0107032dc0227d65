"""Checkpoints with real names, shapes and dtypes, but holes in the files instead of data.

    write_hollow(folder, "Qwen3-235B-A22B", "gptq_int4")
    write_hollow(folder, "DeepSeek-V3", "fp8_block", layers=4, experts=8)

A checkpoint has ``config.json``, shards with complete headers, their index, and placeholders for the tokenizer and
generation files. The data of a shard is a hole (``truncate``), so a checkpoint of 470 GB takes a few megabytes of disk:
``inspect`` and ``plan`` see the real model, readers of data see zeros.

A *family* function lists the modules of an architecture with their unquantized shapes, a *layout* function the tensors
that a linear of one format is stored as, and ``_release`` the dtypes of a published variant. ``bf16``, ``fp8_block`` of
Qwen3 and DeepSeek,
``fp8_channel`` of Llama 3.3 and ``gptq_int4`` of Qwen3 follow published checkpoints; the other pairs follow
the tools that write them.
"""

from __future__ import annotations

import copy
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from support.families import STACKED, tensors_of

__all__ = ["MODELS", "VARIANTS", "Tensor", "hollow_config", "hollow_tensors", "write_hollow", "write_shard"]

Shape = tuple[int, ...]
Config = dict[str, Any]

SHARD_BYTES = 5_000_000_000
BLOCK = 128
GROUP = 128
PACK = 8  # int4 values in one int32

# The safetensors library orders a file by dtype, widest first, then by name.
_DTYPE_BYTES = {
    "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "U8": 1,
}  # fmt: skip
_DTYPE_ORDER = {dtype: order for order, dtype in enumerate(_DTYPE_BYTES)}


class Tensor(NamedTuple):
    """One tensor of a checkpoint, as its header describes it."""

    name: str
    dtype: str
    shape: Shape

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the data section."""
        return self.elements * _DTYPE_BYTES[self.dtype]


# --------------------------------------------------------------------------------------------------------
# Models: the published config.json, without ``quantization_config``
# --------------------------------------------------------------------------------------------------------

_QWEN3_MOE: Config = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

_LLAMA3: Config = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}


def _llama3_rope(factor: float) -> Config:
    return {
        "factor": factor,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }


MODELS: dict[str, Config] = {
    "Qwen3-235B-A22B": {
        **_QWEN3_MOE,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "max_window_layers": 94,
        "moe_intermediate_size": 1536,
        "num_attention_heads": 64,
        "num_hidden_layers": 94,
    },
    "Qwen3-30B-A3B": {
        **_QWEN3_MOE,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_window_layers": 48,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_hidden_layers": 48,
    },
    "Llama-3.3-70B-Instruct": {
        **_LLAMA3,
        "eos_token_id": [128001, 128008, 128009],
        "head_dim": 128,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "rope_scaling": _llama3_rope(8.0),
        "tie_word_embeddings": False,
        "transformers_version": "4.47.0.dev0",
    },
    "Llama-3.2-1B": {
        **_LLAMA3,
        "eos_token_id": 128001,
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "rope_scaling": _llama3_rope(32.0),
        "tie_word_embeddings": True,
        "transformers_version": "4.45.0.dev0",
    },
    "Qwen2.5-7B-Instruct": {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "DeepSeek-V3": {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_deepseek.DeepseekV3Config",
            "AutoModel": "modeling_deepseek.DeepseekV3Model",
            "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        },
        "aux_loss_alpha": 0.001,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "initializer_range": 0.02,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "pretraining_tp": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "transformers_version": "4.33.1",
        "use_cache": True,
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
}

_QWEN3_6_TEXT: Config = {
    "attention_bias": False,
    "attn_output_gate": True,
    "eos_token_id": 248044,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "layer_types": [*["linear_attention"] * 3, "full_attention"] * 10,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 262144,
    "model_type": "qwen3_5_moe_text",
    "moe_intermediate_size": 512,
    "mtp_num_hidden_layers": 1,
    "num_attention_heads": 16,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "vocab_size": 248320,
}

# Described in `support.families`
MODELS |= {
    "Qwen3.6-35B-A3B": {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "image_token_id": 248056,
        "model_type": "qwen3_5_moe",
        "text_config": _QWEN3_6_TEXT,
        "tie_word_embeddings": False,
        "transformers_version": "5.3.0",
        "video_token_id": 248057,
        "vision_config": {
            "deepstack_visual_indexes": [],
            "depth": 27,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 1152,
            "in_channels": 3,
            "intermediate_size": 4304,
            "model_type": "qwen3_5_moe",
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "out_hidden_size": 2048,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    },
    "Qwen3-Next-80B-A3B-Instruct": {
        **{key: value for key, value in _QWEN3_MOE.items() if key not in ("num_experts", "num_key_value_heads")},
        "architectures": ["Qwen3NextForCausalLM"],
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_size": 2048,
        "intermediate_size": 5120,
        "layer_types": [*["linear_attention"] * 3, "full_attention"] * 12,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_value_head_dim": 128,
        "model_type": "qwen3_next",
        "moe_intermediate_size": 512,
        "mtp_num_hidden_layers": 1,
        "num_attention_heads": 16,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "num_hidden_layers": 48,
        "num_key_value_heads": 2,
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "shared_expert_intermediate_size": 512,
    },
    "GLM-4.5-Air": {
        "architectures": ["Glm4MoeForCausalLM"],
        "attention_bias": True,
        "bos_token_id": 151331,
        "eos_token_id": [151329, 151336, 151338],
        "first_k_dense_replace": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "max_position_embeddings": 131072,
        "model_type": "glm4_moe",
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 96,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 46,
        "num_key_value_heads": 8,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000,
        "routed_scaling_factor": 1.0,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "transformers_version": "4.54.0",
        "use_qk_norm": False,
        "vocab_size": 151552,
    },
    "DeepSeek-V3.1": {**MODELS["DeepSeek-V3"], "transformers_version": "4.44.2"},
    "DeepSeek-V4-Flash": {
        "architectures": ["DeepseekV4ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "compress_rope_theta": 160000,
        "eos_token_id": 1,
        "expert_dtype": "fp4",
        "hc_eps": 1e-06,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "head_dim": 512,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "index_head_dim": 128,
        "index_n_heads": 64,
        "index_topk": 512,
        "initializer_range": 0.02,
        "max_position_embeddings": 1048576,
        "model_type": "deepseek_v4",
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts_per_tok": 6,
        "num_hash_layers": 3,
        "num_hidden_layers": 43,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "q_lora_rank": 1024,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 128,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "transformers_version": "4.57.1",
        "use_cache": True,
        "vocab_size": 129280,
        "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "type": "yarn",
        },
    },
}

_TOKENIZER_CLASS = {
    "qwen3_5_moe": "Qwen2Tokenizer",
    "qwen3_next": "Qwen2Tokenizer",
    "glm4_moe": "PreTrainedTokenizerFast",
    "qwen3_moe": "Qwen2Tokenizer",
    "qwen2": "Qwen2Tokenizer",
    "llama": "PreTrainedTokenizerFast",
    "deepseek_v3": "LlamaTokenizerFast",
    "deepseek_v4": "PreTrainedTokenizerFast",
}


# --------------------------------------------------------------------------------------------------------
# Families: which modules an architecture has. ``mtp`` asks for the layers after ``num_hidden_layers``
# --------------------------------------------------------------------------------------------------------


class Module(NamedTuple):
    """A module before any quantization.

    ``shape`` is its weight's: ``[N, K]`` of a linear layer, ``[vocab, hidden]`` of an embedding, ``[N]`` of
    a norm. ``linear`` is set for layers that are quantized in quantized checkpoints, never for routers, embeddings,
    ``lm_head`` and ``eh_proj``. ``bias_name`` is the suffix of a second tensor ``[N]``, if there is one; its dtype is
    ``bias_dtype``, or that of unquantized tensors.
    """

    shape: Shape
    linear: bool = False
    bias_name: str = ""
    bias_dtype: str = ""
    parameter: str = ""
    """The dtype of a parameter without a weight."""


Modules = Iterator[tuple[str, Module]]


def _mlp(prefix: str, hidden: int, intermediate: int) -> Modules:
    """gate_proj and up_proj [intermediate, hidden], down_proj [hidden, intermediate]."""
    yield f"{prefix}.gate_proj", Module((intermediate, hidden), linear=True)
    yield f"{prefix}.up_proj", Module((intermediate, hidden), linear=True)
    yield f"{prefix}.down_proj", Module((hidden, intermediate), linear=True)


def _grouped_query_attention(prefix: str, config: Config) -> Modules:
    """q_proj [Q, hidden], k_proj and v_proj [KV, hidden], o_proj [hidden, Q]; KV has fewer heads than Q."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    queries, keys = heads * head_dim, config["num_key_value_heads"] * head_dim
    bias = "bias" if config["model_type"] == "qwen2" else ""
    yield f"{prefix}.q_proj", Module((queries, hidden), linear=True, bias_name=bias)
    yield f"{prefix}.k_proj", Module((keys, hidden), linear=True, bias_name=bias)
    yield f"{prefix}.v_proj", Module((keys, hidden), linear=True, bias_name=bias)
    yield f"{prefix}.o_proj", Module((hidden, queries), linear=True)
    if config["model_type"] == "qwen3_moe":
        yield f"{prefix}.q_norm", Module((head_dim,))
        yield f"{prefix}.k_norm", Module((head_dim,))


def _latent_attention(prefix: str, config: Config) -> Modules:
    """DeepSeek's MLA: queries through q_lora_rank, keys and values through kv_lora_rank."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    q_rank, kv_rank = config["q_lora_rank"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    yield f"{prefix}.q_a_proj", Module((q_rank, hidden), linear=True)
    yield f"{prefix}.q_a_layernorm", Module((q_rank,))
    yield f"{prefix}.q_b_proj", Module((heads * (nope + rope), q_rank), linear=True)
    yield f"{prefix}.kv_a_proj_with_mqa", Module((kv_rank + rope, hidden), linear=True)
    yield f"{prefix}.kv_a_layernorm", Module((kv_rank,))
    yield f"{prefix}.kv_b_proj", Module((heads * (nope + value), kv_rank), linear=True)
    yield f"{prefix}.o_proj", Module((hidden, heads * value), linear=True)


def _layer_norms(prefix: str, config: Config) -> Modules:
    yield f"{prefix}.input_layernorm", Module((config["hidden_size"],))
    yield f"{prefix}.post_attention_layernorm", Module((config["hidden_size"],))


def _dense_family(config: Config, mtp: bool) -> Modules:
    """Llama and Qwen2: grouped-query attention and one MLP in each layer."""
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield from _grouped_query_attention(f"{prefix}.self_attn", config)
        yield from _mlp(f"{prefix}.mlp", config["hidden_size"], config["intermediate_size"])
        yield from _layer_norms(prefix, config)


def _qwen3_moe_family(config: Config, mtp: bool) -> Modules:
    """Qwen3-MoE: a router [experts, hidden] and routed experts in every layer."""
    hidden = config["hidden_size"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield from _grouped_query_attention(f"{prefix}.self_attn", config)
        yield f"{prefix}.mlp.gate", Module((config["num_experts"], hidden))
        for expert in range(config["num_experts"]):
            yield from _mlp(f"{prefix}.mlp.experts.{expert}", hidden, config["moe_intermediate_size"])
        yield from _layer_norms(prefix, config)


def _deepseek_v3_family(config: Config, mtp: bool) -> Modules:
    """DeepSeek-V3: MLA, a few dense layers first, then routed and shared experts.

    The multi-token-prediction module is the layer after the last one, with its own embedding and head.
    """
    hidden, experts = config["hidden_size"], config["n_routed_experts"]
    expert_size = config["moe_intermediate_size"]
    main_layers = config["num_hidden_layers"]
    for layer in range(main_layers + (config["num_nextn_predict_layers"] if mtp else 0)):
        prefix = f"model.layers.{layer}"
        if layer >= main_layers:
            yield f"{prefix}.embed_tokens", Module((config["vocab_size"], hidden))
            yield f"{prefix}.enorm", Module((hidden,))
            yield f"{prefix}.hnorm", Module((hidden,))
            yield f"{prefix}.eh_proj", Module((hidden, 2 * hidden))
            yield f"{prefix}.shared_head.norm", Module((hidden,))
            yield f"{prefix}.shared_head.head", Module((config["vocab_size"], hidden))
        yield from _latent_attention(f"{prefix}.self_attn", config)
        if layer < config["first_k_dense_replace"]:
            yield from _mlp(f"{prefix}.mlp", hidden, config["intermediate_size"])
        else:
            router = Module((experts, hidden), bias_name="e_score_correction_bias", bias_dtype="F32")
            yield f"{prefix}.mlp.gate", router
            shared_size = expert_size * config["n_shared_experts"]
            yield from _mlp(f"{prefix}.mlp.shared_experts", hidden, shared_size)
            for expert in range(experts):
                yield from _mlp(f"{prefix}.mlp.experts.{expert}", hidden, expert_size)
        yield from _layer_norms(prefix, config)


_FAMILIES: dict[str, Callable[[Config, bool], Modules]] = {
    "llama": _dense_family,
    "qwen2": _dense_family,
    "qwen3_moe": _qwen3_moe_family,
    "deepseek_v3": _deepseek_v3_family,
}


def _modules_of_family(config: Config, mtp: bool) -> Modules:
    """Those of the models that :mod:`support.families` describes."""
    text = config.get("text_config", config)
    quantized_drafts = config["model_type"] == "deepseek_v4"
    modules: dict[str, Module] = {}
    for tensor in tensors_of(config):
        layer = re.match(r"model\.layers\.(\d+)\.", tensor.name)
        draft = tensor.name.startswith("mtp.") or (layer and int(layer[1]) >= text["num_hidden_layers"])
        name, _, leaf = tensor.name.rpartition(".")
        if draft and not mtp:
            continue
        if leaf == "weight":
            modules[name] = Module(tensor.shape, tensor.linear and (quantized_drafts or not draft))
        elif leaf == "bias":
            dtype = "" if tensor.dtype == "BF16" else tensor.dtype
            modules[name] = modules[name]._replace(bias_name="bias", bias_dtype=dtype)
        else:
            modules[tensor.name] = Module(tensor.shape, parameter=tensor.dtype)
    yield from modules.items()


def _stacked(modules: Modules) -> Modules:
    """With all experts of a layer in ``experts.gate_up_proj [E, 2I, H]`` and ``experts.down_proj [E, H, I]``."""
    blocks: dict[str, dict[str, list[Shape]]] = {}
    for name, module in modules:
        block, found, rest = name.partition(".experts.")
        if not found or name.startswith("mtp."):
            yield name, module
        else:
            blocks.setdefault(f"{block}.experts", {}).setdefault(rest.split(".")[1], []).append(module.shape)
    for block, parts in blocks.items():
        (rows, columns), count = parts["gate_proj"][0], len(parts["gate_proj"])
        yield f"{block}.gate_up_proj", Module((count, 2 * rows, columns), parameter="BF16")
        yield f"{block}.down_proj", Module((count, *parts["down_proj"][0]), parameter="BF16")


def _modules(config: Config, mtp: bool) -> Modules:
    """Every module of the model in the order of its state dict."""
    if config["model_type"] not in _FAMILIES:
        yield from _modules_of_family(config, mtp)
        return
    embedding = Module((config["vocab_size"], config["hidden_size"]))
    yield "model.embed_tokens", embedding
    yield from _FAMILIES[config["model_type"]](config, mtp)
    yield "model.norm", Module((config["hidden_size"],))
    if not config["tie_word_embeddings"]:
        yield "lm_head", embedding


# --------------------------------------------------------------------------------------------------------
# Variants: the tensors of a module, and the ``quantization_config``
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Release:
    """How one variant of one model is published.

    ``dense`` is the dtype of unquantized tensors, ``scale`` that of scales. ``mtp`` is whether layers after
    ``num_hidden_layers`` are there; quantizers drop them, because transformers does.
    """

    dense: str = "BF16"
    scale: str = "BF16"
    mtp: bool = True
    left_out: str = ""
    """Matches in the names of linears that stay unquantized."""
    in_fp8: str = ""
    """The same of those in FP8 by blocks, in a variant of another format."""
    scales: str = ""
    """The name of scales, if it is not the usual one."""


_Layout = tuple[tuple[str, str, Shape], ...]


def _dense_layout(shape: Shape, release: Release) -> _Layout:
    """weight [N, K]."""
    return (("weight", release.dense, shape),)


def _fp8_block_layout(shape: Shape, release: Release) -> _Layout:
    """weight F8_E4M3 [N, K], weight_scale_inv [ceil(N / 128), ceil(K / 128)]."""
    scales = tuple(math.ceil(size / BLOCK) for size in shape)
    return ("weight", "F8_E4M3", shape), (release.scales or "weight_scale_inv", release.scale, scales)


def _fp8_channel_layout(shape: Shape, release: Release) -> _Layout:
    """weight F8_E4M3 [N, K], weight_scale [N, 1]."""
    return ("weight", "F8_E4M3", shape), ("weight_scale", release.scale, (shape[0], 1))


def _gptq_int4_layout(shape: Shape, release: Release) -> _Layout:
    """qweight I32 [K / 8, N], qzeros I32 [G, N / 8], scales [G, N], g_idx I32 [K], where G = K / 128."""
    out, in_ = shape
    groups = math.ceil(in_ / GROUP)
    return (
        ("g_idx", "I32", (in_,)),
        ("qweight", "I32", (in_ // PACK, out)),
        ("qzeros", "I32", (groups, out // PACK)),
        ("scales", release.scale, (groups, out)),
    )


def _auto_round_int4_layout(shape: Shape, release: Release) -> _Layout:
    """GPTQ's without g_idx."""
    return tuple(tensor for tensor in _gptq_int4_layout(shape, release) if tensor[0] != "g_idx")


def _nvfp4_layout(shape: Shape, release: Release) -> _Layout:
    """ModelOpt's: weight U8 [N, K / 2], weight_scale E4M3 [N, K / 16], weight_scale_2 and input_scale F32 []."""
    out, in_ = shape
    return (
        ("input_scale", "F32", ()),
        ("weight", "U8", (out, in_ // 2)),
        ("weight_scale", "F8_E4M3", (out, in_ // 16)),
        ("weight_scale_2", "F32", ()),
    )


def _mxfp4_layout(shape: Shape, release: Release) -> _Layout:
    """Quark's: weight U8 [N, K / 2], weight_scale U8 [N, K / 32]; DeepSeek-V4's: weight I8, scale F8_E8M0."""
    out, in_ = shape
    if release.scales:
        return ("weight", "I8", (out, in_ // 2)), (release.scales, release.scale, (out, in_ // 32))
    return ("weight", "U8", (out, in_ // 2)), ("weight_scale", "U8", (out, in_ // 32))


def _fp8_block_config(config: Config) -> Config:
    quantization: Config = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }
    if config["model_type"] == "deepseek_v3":
        powers = {"scale_fmt": "ue8m0"} if config["transformers_version"] == "4.44.2" else {}  # from V3.1 on
        return {**quantization, **powers}
    if config["model_type"] == "deepseek_v4":
        return {**quantization, "scale_fmt": "ue8m0"}
    skipped = ["lm_head"]
    if config["model_type"] == "qwen3_moe":
        names = ("input_layernorm", "mlp.gate", "post_attention_layernorm")
        skipped += [f"model.layers.{n}.{name}" for n in range(config["num_hidden_layers"]) for name in names]
    return {**quantization, "modules_to_not_convert": skipped}


def _fp8_channel_config(config: Config) -> Config:
    def scheme(dynamic: bool, strategy: str, observer: str | None) -> Config:
        return {
            "actorder": None,
            "block_structure": None,
            "dynamic": dynamic,
            "group_size": None,
            "num_bits": 8,
            "observer": observer,
            "observer_kwargs": {},
            "strategy": strategy,
            "symmetric": True,
            "type": "float",
        }

    routers = [name for name, _ in _modules(config, mtp=False) if name.endswith("mlp.gate")]
    return {
        "config_groups": {
            "group_0": {
                "input_activations": scheme(True, "token", None),
                "output_activations": None,
                "targets": ["Linear"],
                "weights": scheme(False, "channel", "minmax"),
            }
        },
        "format": "float-quantized",
        "global_compression_ratio": None,
        "ignore": [*routers, "lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _gptq_int4_config(config: Config) -> Config:
    """AutoGPTQ's config, which does not list the unquantized modules."""
    return {
        "bits": 4,
        "checkpoint_format": "gptq",
        "damp_percent": 0.01,
        "desc_act": False,
        "group_size": GROUP,
        "model_file_base_name": None,
        "model_name_or_path": None,
        "quant_method": "gptq",
        "static_groups": False,
        "sym": True,
        "true_sequential": True,
    }


def _auto_round_int4_config(config: Config) -> Config:
    """AutoRound's config, with separate settings for the routers."""
    routers = [name for name, _ in _modules(config, mtp=False) if name.endswith("mlp.gate")]
    return {
        "autoround_version": "0.6.0",
        "bits": 4,
        "block_name_to_quantize": "model.language_model.layers" if "text_config" in config else "model.layers",
        "data_type": "int",
        "extra_config": {name: {"bits": 16, "data_type": "float"} for name in routers},
        "group_size": GROUP,
        "packing_format": "auto_round:auto_gptq",
        "quant_method": "auto-round",
        "sym": True,
    }


def _nvfp4_config(config: Config) -> Config:
    routers = [name for name, _ in _modules(config, mtp=False) if name.endswith("mlp.gate")]
    return {
        "group_size": 16,
        "ignore": ["lm_head", *routers],
        "producer": {"name": "modelopt", "version": "0.33.0"},
        "quant_algo": "NVFP4",
        "quant_method": "modelopt",
    }


def _mxfp4_config(config: Config) -> Config:
    """Quark's config of the weights, and of activations that it quantizes as well; DeepSeek-V4 declares FP8 only."""
    if config["model_type"] == "deepseek_v4":
        return _fp8_block_config(config)
    spec = {"dtype": "fp4", "group_size": 32, "qscheme": "per_group", "scale_format": "e8m0", "ch_axis": -1}
    return {
        "algo_config": None,
        "exclude": ["*self_attn*", "*mlp.gate.*", "*lm_head", "model.layers.61.*"],
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
        "global_quant_config": {
            "input_tensors": {**spec, "is_dynamic": True},
            "weight": {**spec, "is_dynamic": False},
        },
        "layer_quant_config": {},
        "quant_method": "quark",
        "quant_mode": "eager_mode",
    }


class Variant(NamedTuple):
    """A format: the layout of its linear layers, its ``quantization_config``, and its usual release."""

    layout: Callable[[Shape, Release], _Layout]
    config: Callable[[Config], Config] | None
    release: Release


VARIANTS: dict[str, Variant] = {
    "bf16": Variant(_dense_layout, None, Release()),
    "fp16": Variant(_dense_layout, None, Release(dense="F16")),
    "fp8_block": Variant(_fp8_block_layout, _fp8_block_config, Release()),
    "fp8_channel": Variant(_fp8_channel_layout, _fp8_channel_config, Release(mtp=False)),
    "gptq_int4": Variant(_gptq_int4_layout, _gptq_int4_config, Release(dense="F16", scale="F16", mtp=False)),
    "nvfp4": Variant(_nvfp4_layout, _nvfp4_config, Release(mtp=False)),
    "mxfp4": Variant(_mxfp4_layout, _mxfp4_config, Release(left_out=r"\.self_attn\.|\.layers\.61\.")),
    "auto_round_int4": Variant(_auto_round_int4_layout, _auto_round_int4_config, Release(scale="F16", mtp=False)),
}

# Releases that differ from the usual one of their variant.
_RELEASES: dict[tuple[str, str], Release] = {
    ("DeepSeek-V3", "fp8_block"): Release(scale="F32"),
    ("DeepSeek-V3", "gptq_int4"): Release(scale="F16", mtp=False),
    ("DeepSeek-V3.1", "fp8_block"): Release(scale="F32"),
    ("DeepSeek-V3.1", "gptq_int4"): Release(scale="F16", mtp=False),
    ("DeepSeek-V4-Flash", "fp8_block"): Release(scale="F8_E8M0", scales="scale"),
    ("DeepSeek-V4-Flash", "mxfp4"): Release(scale="F8_E8M0", scales="scale", in_fp8=r"^(?!.*\.ffn\.experts\.)"),
}


def _release(model: str, variant: str) -> Release:
    return _RELEASES.get((model, variant), VARIANTS[variant].release)


# --------------------------------------------------------------------------------------------------------
# A model in a variant
# --------------------------------------------------------------------------------------------------------


def hollow_config(model: str, variant: str, *, layers: int | None = None, experts: int | None = None) -> Config:
    """``config.json`` of ``model`` in ``variant``, with ``layers`` hidden layers and ``experts`` experts.

    A smaller model stays consistent: DeepSeek keeps a MoE layer, its expert groups divide its experts, and a token is
    routed to no more experts than there are.
    """
    if model not in MODELS:
        raise ValueError(f"unknown model {model!r}; known: {', '.join(MODELS)}")
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; known: {', '.join(VARIANTS)}")
    config = copy.deepcopy(MODELS[model])
    config["torch_dtype"] = {"BF16": "bfloat16", "F16": "float16"}[_release(model, variant).dense]
    if layers is not None:
        _shrink_layers(config, layers)
    if experts is not None:
        _shrink_experts(config, experts)
    quantization = VARIANTS[variant].config
    if quantization is not None:
        config["quantization_config"] = quantization(config)
    return config


def _shrink_layers(config: Config, layers: int) -> None:
    config = config.get("text_config", config)
    if not 1 <= layers <= config["num_hidden_layers"]:
        raise ValueError(f"layers must be 1 to {config['num_hidden_layers']}, not {layers}")
    config["num_hidden_layers"] = layers
    if "max_window_layers" in config:
        config["max_window_layers"] = layers
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    if "first_k_dense_replace" in config:
        config["first_k_dense_replace"] = min(config["first_k_dense_replace"], layers - 1)


def _shrink_experts(config: Config, experts: int) -> None:
    config = config.get("text_config", config)
    key = "n_routed_experts" if "n_routed_experts" in config else "num_experts"
    if key not in config:
        raise ValueError(f"{config['model_type']} has no experts")
    if not 1 <= experts <= config[key]:
        raise ValueError(f"experts must be 1 to {config[key]}, not {experts}")
    config[key] = pickable = experts
    if "n_group" in config:  # a group is scored by its two best experts
        groups = next((g for g in (8, 4, 2) if experts % (2 * g) == 0), 1)
        config["n_group"], config["topk_group"] = groups, min(config["topk_group"], groups)
        pickable = experts // groups * config["topk_group"]
    config["num_experts_per_tok"] = min(config["num_experts_per_tok"], pickable)


def hollow_tensors(
    model: str, variant: str, *, layers: int | None = None, experts: int | None = None
) -> Iterator[Tensor]:
    """All tensors of ``model`` in ``variant``, in the order of the state dict."""
    config = hollow_config(model, variant, layers=layers, experts=experts)
    release, layout = _release(model, variant), VARIANTS[variant].layout

    @cache
    def stored(module: Module, layout: Callable[[Shape, Release], _Layout]) -> _Layout:
        tensors = layout(module.shape, release) if module.linear else _dense_layout(module.shape, release)
        if module.bias_name:
            tensors += ((module.bias_name, module.bias_dtype or release.dense, module.shape[:1]),)
        return tensors

    modules = _modules(config, release.mtp)
    release_of = STACKED.get(config["architectures"][0])
    if variant in ("bf16", "fp16") and release_of is not None and not release_of.transposed:
        modules = _stacked(modules)
    for name, module in modules:
        if module.parameter:
            yield Tensor(name, release.dense if module.parameter == "BF16" else module.parameter, module.shape)
            continue
        plain = bool(release.left_out and re.search(release.left_out, name))
        in_fp8 = bool(release.in_fp8 and re.search(release.in_fp8, name))
        of_format = _fp8_block_layout if in_fp8 else layout
        for suffix, dtype, shape in stored(module._replace(linear=False) if plain else module, of_format):
            yield Tensor(f"{name}.{suffix}", dtype, shape)


def write_hollow(
    folder: Path,
    model: str,
    variant: str,
    *,
    layers: int | None = None,
    experts: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write ``model`` in ``variant`` to ``folder``, which is made if needed, and return ``folder``.

    ``layers`` and ``experts`` make the model smaller; ``shard_bytes`` is the most that a shard has, holes included. A
    single shard has an index, too.
    """
    config = hollow_config(model, variant, layers=layers, experts=experts)
    tensors = hollow_tensors(model, variant, layers=layers, experts=experts)
    shards = _cut(tensors, shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        total += write_shard(folder / name, shard)
        weight_map.update((tensor.name, name) for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", config)
    text = config.get("text_config", config)
    tokens = {
        key: {**text, **config}[key]
        for key in ("bos_token_id", "eos_token_id", "transformers_version")
        if key in {**text, **config}
    }
    _write_json(folder / "generation_config.json", {"_from_model_config": True, **tokens})
    tokenizer = {
        "model_max_length": text["max_position_embeddings"],
        "tokenizer_class": _TOKENIZER_CLASS[config["model_type"]],
    }
    _write_json(folder / "tokenizer_config.json", tokenizer)
    return folder


def _cut(tensors: Iterable[Tensor], shard_bytes: int) -> list[list[Tensor]]:
    """Fill one shard after the other, as ``save_pretrained`` does."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = tensor.nbytes
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards


def write_shard(path: Path, tensors: Iterable[Tensor]) -> int:
    """Write a header and a hole for its data; return the size of the hole in bytes."""
    entries = ['"__metadata__":{"format":"pt"}']
    start = 0
    for tensor in sorted(tensors, key=lambda tensor: (_DTYPE_ORDER[tensor.dtype], tensor.name)):
        name, dtype, shape = tensor
        end = start + tensor.nbytes
        sizes = ",".join(map(str, shape))
        entries.append(f'"{name}":{{"dtype":"{dtype}","shape":[{sizes}],"data_offsets":[{start},{end}]}}')
        start = end
    header = ("{" + ",".join(entries) + "}").encode("ascii")
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + start)
    return start


def _write_json(path: Path, content: Config) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
