"""Checkpoints of any size, in every format, that SGLang and transformers can run.

    sources = write_sources(folder, QWEN3_MOE, ["bf16", "fp8_block", "gptq_int4"])   # {"bf16": folder/bf16, ...}

All variants are rounded from the same random weights. These are distributed as trained ones, with a few strong input
channels, so that errors of formats can be compared. Made by torch, on a GPU if there is one, without mixprec.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support import formats

__all__ = [
    "DEEPSEEK",
    "LLAMA",
    "MIXTRAL",
    "QWEN2",
    "QWEN2_MOE",
    "QWEN3",
    "QWEN3_MOE",
    "Shape",
    "config_of",
    "quantize",
    "tensors_of",
    "write_sources",
]

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """A decoder. ``family`` is its ``model_type``; ``experts`` of 0 makes it dense."""

    family: str
    architecture: str
    layers: int = 2
    hidden: int = 256
    intermediate: int = 512
    experts: int = 0
    expert_intermediate: int = 256
    top_k: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    vocab: int = 512

    def of(self, **changes: Any) -> Shape:
        return replace(self, **changes)


LLAMA = Shape("llama", "LlamaForCausalLM")
QWEN2 = Shape("qwen2", "Qwen2ForCausalLM")
QWEN3 = Shape("qwen3", "Qwen3ForCausalLM")
QWEN2_MOE = Shape("qwen2_moe", "Qwen2MoeForCausalLM", experts=8)
QWEN3_MOE = Shape("qwen3_moe", "Qwen3MoeForCausalLM", experts=8)
MIXTRAL = Shape("mixtral", "MixtralForCausalLM", experts=8)
DEEPSEEK = Shape("deepseek_v3", "DeepseekV3ForCausalLM", experts=8)

# DeepSeek's attention: low ranks, and heads of two parts, in the sizes of V2 and V3 that SGLang's kernels support.
_RANK, _KV_RANK, _ROPE, _NOPE, _VALUE = 256, 512, 64, 128, 128


def _modules(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every module and the shape of its weight; biases are named in full."""
    yield "model.embed_tokens", (shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        yield from _attention(shape, f"{prefix}.self_attn")
        yield f"{prefix}.input_layernorm", (shape.hidden,)
        yield f"{prefix}.post_attention_layernorm", (shape.hidden,)
        if shape.family == "mixtral":
            yield f"{prefix}.block_sparse_moe.gate", (shape.experts, shape.hidden)
            for expert in range(shape.experts):
                yield from _mlp(f"{prefix}.block_sparse_moe.experts.{expert}", shape, ("w1", "w3", "w2"))
        elif shape.experts and not (shape.family == "deepseek_v3" and layer == 0):
            yield f"{prefix}.mlp.gate", (shape.experts, shape.hidden)
            if shape.family == "deepseek_v3":
                yield f"{prefix}.mlp.gate.e_score_correction_bias", (shape.experts,)
                yield from _mlp(f"{prefix}.mlp.shared_experts", shape)
            if shape.family == "qwen2_moe":
                yield f"{prefix}.mlp.shared_expert_gate", (1, shape.hidden)
                yield from _mlp(f"{prefix}.mlp.shared_expert", replace(shape, expert_intermediate=shape.intermediate))
            for expert in range(shape.experts):
                yield from _mlp(f"{prefix}.mlp.experts.{expert}", shape)
        else:
            yield from _mlp(f"{prefix}.mlp", replace(shape, expert_intermediate=shape.intermediate))
    yield "model.norm", (shape.hidden,)
    yield "lm_head", (shape.vocab, shape.hidden)


def _mlp(prefix: str, shape: Shape, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> Any:
    gate, up, down = names
    yield f"{prefix}.{gate}", (shape.expert_intermediate, shape.hidden)
    yield f"{prefix}.{up}", (shape.expert_intermediate, shape.hidden)
    yield f"{prefix}.{down}", (shape.hidden, shape.expert_intermediate)


def _attention(shape: Shape, prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    if shape.family == "deepseek_v3":
        yield f"{prefix}.q_a_proj", (_RANK, shape.hidden)
        yield f"{prefix}.q_a_layernorm", (_RANK,)
        yield f"{prefix}.q_b_proj", (shape.heads * (_NOPE + _ROPE), _RANK)
        yield f"{prefix}.kv_a_proj_with_mqa", (_KV_RANK + _ROPE, shape.hidden)
        yield f"{prefix}.kv_a_layernorm", (_KV_RANK,)
        yield f"{prefix}.kv_b_proj", (shape.heads * (_NOPE + _VALUE), _KV_RANK)
        yield f"{prefix}.o_proj", (shape.hidden, shape.heads * _VALUE)
        return
    yield f"{prefix}.q_proj", (shape.heads * shape.head_dim, shape.hidden)
    yield f"{prefix}.k_proj", (shape.kv_heads * shape.head_dim, shape.hidden)
    yield f"{prefix}.v_proj", (shape.kv_heads * shape.head_dim, shape.hidden)
    yield f"{prefix}.o_proj", (shape.hidden, shape.heads * shape.head_dim)
    if shape.family.startswith("qwen2"):
        for part, heads in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            yield f"{prefix}.{part}_proj.bias", (heads * shape.head_dim,)
    if shape.family.startswith("qwen3"):
        yield f"{prefix}.q_norm", (shape.head_dim,)
        yield f"{prefix}.k_norm", (shape.head_dim,)


def _config(shape: Shape) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [shape.architecture],
        "model_type": shape.family,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.expert_intermediate if shape.family == "mixtral" else shape.intermediate,
        "max_position_embeddings": 8192,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if shape.family == "deepseek_v3":
        config |= {"n_routed_experts": shape.experts, "first_k_dense_replace": 1, "n_shared_experts": 1}
        config |= {"num_experts_per_tok": shape.top_k, "moe_intermediate_size": shape.expert_intermediate}
        config |= {"n_group": 2, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
        config |= {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "moe_layer_freq": 1}
        config |= {"q_lora_rank": _RANK, "kv_lora_rank": _KV_RANK, "num_nextn_predict_layers": 0}
        config |= {"qk_nope_head_dim": _NOPE, "qk_rope_head_dim": _ROPE, "v_head_dim": _VALUE}
        config |= {"num_key_value_heads": shape.heads, "attention_bias": False}
        yarn = {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
        config["rope_scaling"] = {**yarn, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}
    elif shape.family == "mixtral":
        config |= {"num_local_experts": shape.experts, "num_experts_per_tok": shape.top_k, "sliding_window": None}
    elif shape.experts:
        config |= {"num_experts": shape.experts, "num_experts_per_tok": shape.top_k, "norm_topk_prob": True}
        config |= {"moe_intermediate_size": shape.expert_intermediate, "decoder_sparse_step": 1, "mlp_only_layers": []}
        if shape.family == "qwen2_moe":
            config |= {"shared_expert_intermediate_size": shape.intermediate, "use_sliding_window": False}
    if shape.family in ("llama", "qwen3", "qwen3_moe"):
        config |= {"head_dim": shape.head_dim, "attention_bias": False}
    return config


def tensors_of(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of an unquantized checkpoint and its shape."""
    for name, size in _modules(shape):
        yield name if name.endswith("bias") else f"{name}.weight", size


def config_of(shape: Shape) -> dict[str, Any]:
    """Its ``config.json``."""
    return _config(shape)


def _is_linear(name: str) -> bool:
    return name.endswith("_proj") or "with_mqa" in name or ".experts." in name


def _weight(name: str, shape: tuple[int, ...], device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator, device=device)
    if name.endswith("bias"):
        return values / 100
    if len(shape) == 1:
        return 1 + values / 8
    if name == "model.embed_tokens":
        return values
    strong = torch.randint(shape[1], (max(1, shape[1] // 64),), generator=generator, device=device)
    values[:, strong] *= 4
    return values / shape[1] ** 0.5


# Formats


def _in_another_order(weight: torch.Tensor, size: int) -> torch.Tensor:
    """The group of each input under activation order, ``[K]``, in groups of ``size``."""
    k = weight.shape[1]
    group = torch.empty(k, dtype=torch.long)
    group[torch.randperm(k, generator=torch.Generator().manual_seed(k))] = torch.arange(k) // size
    return group


def _auto_round_config() -> dict[str, Any]:
    return {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "autoround_version": "0.14.2",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "data_type": "int",
        "block_name_to_quantize": "model.layers",
        "extra_config": {r".*mlp\.gate": {"bits": 16, "data_type": "float"}},
    }


def _compressed_blocks() -> dict[str, Any]:
    config = formats.compressed_config("block")
    group = config["config_groups"]["group_0"]
    group["weights"]["block_structure"] = [128, 128]
    group["input_activations"] |= {"strategy": "group", "group_size": 128}
    return config


def _weight_only() -> dict[str, Any]:
    config = formats.compressed_config("channel")
    config["config_groups"]["group_0"]["input_activations"] = None
    return config


def _as_mistral(weight: torch.Tensor) -> Tensors:
    tensors = formats.fp8_tensor(weight, scale=0.5 / 448)
    return {
        "weight": tensors["weight"],
        "weight_scale_inv": tensors["weight_scale"],
        "activation_scale": torch.tensor(0.25, device=weight.device),
    }


VARIANTS: Mapping[str, tuple[Callable[[torch.Tensor], Tensors], dict[str, Any] | None]] = {
    "bf16": (formats.dense, None),
    "fp8_block": (formats.fp8_block, formats.fp8_config()),
    "fp8_channel": (formats.fp8_channel, formats.compressed_config("channel")),
    # One scale for all modules, since gate and up of an expert must share theirs.
    "fp8_tensor": (partial(formats.fp8_tensor, scale=0.5 / 448), formats.fp8_config(None)),
    "int8_channel": (formats.int8_channel, formats.compressed_config("channel", "int")),
    "int8_block": (formats.int8_block, {**formats.fp8_config(), "quant_method": "blockwise_int8"}),
    "gptq_int4": (formats.gptq, formats.gptq_config()),
    "gptq_int4_g64": (partial(formats.gptq, group_size=64), formats.gptq_config(group_size=64)),
    "gptq_int4_act": (
        lambda w: formats.gptq(w, g_idx=_in_another_order(w, 128)),
        formats.gptq_config(desc_act=True),
    ),
    "gptq_int8": (partial(formats.gptq, bits=8), formats.gptq_config(bits=8)),
    "auto_round_int4": (
        lambda w: {leaf: tensor for leaf, tensor in formats.gptq(w).items() if leaf != "g_idx"},
        _auto_round_config(),
    ),
    "ct_fp8_block": (
        lambda w: {leaf.removesuffix("_inv"): t for leaf, t in formats.fp8_block(w).items()},
        _compressed_blocks(),
    ),
    "ct_fp8_weight": (formats.fp8_channel, _weight_only()),
    "ct_int4": (formats.packed, formats.packed_config()),
    "ct_int4_g32": (partial(formats.packed, group_size=32), formats.packed_config(group_size=32)),
    "ct_int4_asym": (partial(formats.packed, sym=False), formats.packed_config(sym=False)),
    "ct_int4_act": (
        lambda w: formats.packed(w, g_idx=_in_another_order(w, 128)),
        formats.packed_config(act=True),
    ),
    "ct_int8": (partial(formats.packed, bits=8, group_size=-1), formats.packed_config(8, -1)),
    # Scales under other producers' names: DeepSeek-V4's, and Mistral's, one of which is of static activations.
    "fp8_block_scale": (
        lambda w: {leaf.replace("weight_scale_inv", "scale"): t for leaf, t in formats.fp8_block(w).items()},
        formats.fp8_config(),
    ),
    "fp8_e8m0": (formats.fp8_exponents, {**formats.fp8_config(), "scale_fmt": "ue8m0"}),
    "fp8_bytes": (
        partial(formats.fp8_exponents, leaf="scale", dtype="uint8"),
        {**formats.fp8_config(), "scale_fmt": "ue8m0"},
    ),
    "fp8_e8m0_32": (
        partial(formats.fp8_exponents, block=(32, 32)),
        {**formats.fp8_config((32, 32)), "scale_fmt": "ue8m0"},
    ),
    "fp8_static": (_as_mistral, formats.fp8_config(None, "static")),
    # One scale for all, as of FP8
    "nvfp4": (partial(formats.nvfp4, scale=1 / 2688), formats.nvfp4_config()),
    "nvfp4_weights": (partial(formats.nvfp4, scale=1 / 2688, activations=None), formats.nvfp4_config()),
    "ct_nvfp4": (partial(formats.nvfp4_compressed, scale=1 / 2688), formats.nvfp4_compressed_config()),
    "mxfp4": (formats.mxfp4, formats.mxfp4_config()),
    "ct_mxfp4": (
        partial(formats.mxfp4, layout="compressed-tensors"),
        formats.mxfp4_config("compressed-tensors"),
    ),
    "deepseek_mxfp4": (partial(formats.mxfp4, layout="deepseek"), formats.mxfp4_config("deepseek")),
    "w4afp8": (partial(formats.w4afp8, dtype=torch.bfloat16), {**formats.fp8_config(), "quant_method": "w4afp8"}),
    "awq_int4": (formats.awq, formats.awq_config()),
    "awq_int4_g64": (partial(formats.awq, group_size=64), formats.awq_config(64)),
}


_BESIDE_EXPERTS = {"w4afp8": "fp8_block"}
"""The variant of other linears, for formats of experts only."""


def quantize(weight: torch.Tensor, variant: str) -> tuple[Tensors, torch.Tensor]:
    """The tensors of a weight ``[N, K]`` in a format, and the dequantized weight in float32."""
    tensors = VARIANTS[variant][0](weight)
    return tensors, formats.dequantize(tensors, torch.bfloat16)


def write_sources(
    folder: Path,
    shape: Shape,
    variants: Iterable[str],
    *,
    skip: Sequence[str] = ("*.kv_b_proj", "*.q_a_proj", "*.kv_a_proj_with_mqa"),
    head: bool = False,
    shard_bytes: int = 2 << 30,
) -> dict[str, Path]:
    """Writes ``folder/{variant}`` for each of ``variants``.

    Modules that match ``skip`` stay dense, and so does ``lm_head`` unless ``head`` is set.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shards = {variant: _Shards(folder / variant, shard_bytes) for variant in variants}
    for name, size in _modules(shape):
        weight = _weight(name, size, device)
        for variant, writer in shards.items():
            quantized = (_is_linear(name) or (head and name == "lm_head")) and not any(
                fnmatchcase(name, pattern) for pattern in skip
            )
            kind = variant if ".experts." in name else _BESIDE_EXPERTS.get(variant, variant)
            store = VARIANTS[kind][0] if quantized else formats.dense
            for leaf, tensor in store(weight).items():
                writer.add(name if name.endswith("bias") else f"{name}.{leaf}", tensor)
    for variant, writer in shards.items():
        config = _config(shape)
        quantization = VARIANTS[variant][1]
        if quantization is not None:
            left_out = _left_out(quantization, skip, shape)
            if head:
                left_out = {key: [name for name in names if name != "lm_head"] for key, names in left_out.items()}
            config["quantization_config"] = {**quantization, **left_out}
        writer.finish(config)
    return {variant: folder / variant for variant in shards}


def _left_out(quantization: Mapping[str, Any], skip: Sequence[str], shape: Shape) -> dict[str, Any]:
    """The entries of a config that list unquantized modules, as releases write them and SGLang reads them."""
    if quantization["quant_method"] == "awq":
        # SGLang looks for these in names: the dots keep `gate` from matching `gate_proj`.
        return {"modules_to_not_convert": ["lm_head", "mlp.gate.", *(f".{pattern[2:]}" for pattern in skip)]}
    if quantization["quant_method"] == "compressed-tensors":
        return {"ignore": [*quantization["ignore"], *(f"re:.*{pattern.removeprefix('*')}$" for pattern in skip)]}
    skipped = [name for name, _ in _modules(shape) if any(fnmatchcase(name, pattern) for pattern in skip)]
    if quantization["quant_method"] != "fp8" or not skipped:
        return {}
    # SGLang looks up the fused name, whose parts it does not know.
    fused = {name.replace(".q_a_proj", ".fused_qkv_a_proj_with_mqa") for name in skipped if ".q_a_proj" in name}
    return {"modules_to_not_convert": [*skipped, *sorted(fused)]}


class _Shards:
    """Writes a stream of tensors to safetensors files, and their index."""

    def __init__(self, folder: Path, most: int):
        self._folder, self._most = folder, most
        self._pending: Tensors = {}
        self._bytes = 0
        self._map: dict[str, str] = {}
        folder.mkdir(parents=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._pending[name] = tensor.contiguous().cpu()
        self._bytes += tensor.nbytes
        if self._bytes >= self._most:
            self._flush()

    def _flush(self) -> None:
        file = f"model-{len(set(self._map.values())) + 1:05}.safetensors"
        save_file(self._pending, self._folder / file, metadata={"format": "pt"})
        self._map |= dict.fromkeys(self._pending, file)
        self._pending, self._bytes = {}, 0

    def finish(self, config: Mapping[str, Any]) -> None:
        self._flush()
        index = {"metadata": {}, "weight_map": self._map}
        for name, content in (("config.json", config), ("model.safetensors.index.json", index)):
            (self._folder / name).write_text(json.dumps(content, indent=2))
