"""Checkpoints that SGLang and transformers can run, of any size, in every format: made by torch, on a GPU if there is.

    sources = write_sources(folder, QWEN3_MOE, ["bf16", "fp8_block", "gptq_int4"])   # {"bf16": folder/bf16, ...}

All variants are roundings of the same random weights, whose spread is that of trained ones (with a few strong
input channels), so that logits mean something and errors of formats can be compared. Nothing here uses mixprec.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

__all__ = [
    "DEEPSEEK",
    "LLAMA",
    "MIXTRAL",
    "QWEN2",
    "QWEN3",
    "QWEN3_MOE",
    "Shape",
    "dequantize",
    "quantize",
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
QWEN3_MOE = Shape("qwen3_moe", "Qwen3MoeForCausalLM", experts=8)
MIXTRAL = Shape("mixtral", "MixtralForCausalLM", experts=8)
DEEPSEEK = Shape("deepseek_v3", "DeepseekV3ForCausalLM", experts=8)

# DeepSeek's attention: low ranks, and heads of two parts. SGLang's kernels know the sizes of V2 and V3.
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
    if shape.family == "qwen2":
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
    if shape.family in ("llama", "qwen3", "qwen3_moe"):
        config |= {"head_dim": shape.head_dim, "attention_bias": False}
    return config


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


# Formats: weight [N, K] in float32 -> its tensors


def _dense(weight: torch.Tensor) -> Tensors:
    return {"weight": weight.to(torch.bfloat16)}


def _fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def _blocks(weight: torch.Tensor, most: int, store: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Tensors:
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -k % 128, 0, -n % 128))
    blocks = padded.view(padded.shape[0] // 128, 128, padded.shape[1] // 128, 128)
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-8) / most
    full = scale.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    return {"weight": store(weight, full), "weight_scale_inv": scale}


def _fp8_channel(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 448
    return {"weight": _fp8(weight, scale), "weight_scale": scale}


def _fp8_tensor(weight: torch.Tensor) -> Tensors:
    # One scale for all: gate and up of an expert must share theirs.
    scale = torch.tensor(0.5 / 448, device=weight.device)
    return {"weight": _fp8(weight, scale), "weight_scale": scale}


def _gptq(weight: torch.Tensor, *, bits: int = 4, group_size: int = 128, desc_act: bool = False) -> Tensors:
    """Round to nearest, in AutoGPTQ's layout; with ``desc_act`` the inputs are grouped in another order."""
    n, k = weight.shape
    size = k if group_size == -1 else group_size
    order = torch.arange(k, device=weight.device)
    if desc_act:
        order = torch.randperm(k, generator=torch.Generator().manual_seed(k)).to(weight.device)
    group = torch.empty(k, dtype=torch.long, device=weight.device)
    group[order] = torch.arange(k, device=weight.device) // size
    half = 1 << (bits - 1)
    grouped = weight.t()[order].view(k // size, size, n)
    scales = (grouped.abs().amax(1) / (half - 1)).clamp(min=1e-6).to(torch.float16)
    q = torch.clamp(torch.round(weight.t() / scales.float()[group]) + half, 0, 2 * half - 1).to(torch.int64)
    pack = 32 // bits
    shifts = bits * torch.arange(pack, device=weight.device)
    qweight = (q.view(k // pack, pack, n) << shifts[None, :, None]).sum(1)
    word = sum((half - 1) << (bits * i) for i in range(pack))
    return {
        "qweight": _int32(qweight),
        "qzeros": _int32(torch.full((k // size, n // pack), word, device=weight.device)),
        "scales": scales,
        "g_idx": group.to(torch.int32),
    }


def _int32(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


# In a word of AWQ's, from the lowest bits up, lie the outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _awq(weight: torch.Tensor, *, group_size: int = 128) -> Tensors:
    """Round to nearest with zero points, in AutoAWQ's layout (gemm)."""
    n, k = weight.shape
    grouped = weight.t().reshape(k // group_size, group_size, n)
    low, high = grouped.amin(1).clamp(max=0), grouped.amax(1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-6).to(torch.float16)
    zeros = torch.round(-low / scales.float()).clamp(0, 15)
    q = (torch.round(grouped / scales.float()[:, None]) + zeros[:, None]).clamp(0, 15).reshape(k, n)
    return {"qweight": _awq_words(q), "qzeros": _awq_words(zeros), "scales": scales}


def _awq_words(values: torch.Tensor) -> torch.Tensor:
    eights = values.to(torch.int64).reshape(len(values), -1, 8)
    return _int32(sum(eights[..., output] << (4 * place) for place, output in enumerate(_AWQ_ORDER)))


def _awq_values(words: torch.Tensor) -> torch.Tensor:
    out = torch.empty(*words.shape, 8, dtype=torch.float32, device=words.device)
    for place, output in enumerate(_AWQ_ORDER):
        out[..., output] = (words >> (4 * place)) & 15
    return out.flatten(1)


def _awq_config(group_size: int = 128) -> dict[str, Any]:
    return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}


def _gptq_config(bits: int = 4, group_size: int = 128, desc_act: bool = False) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": True, "desc_act": desc_act}


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


_FP8_BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
_FP8_TENSOR = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def _compressed(strategy: str, kind: str = "float") -> dict[str, Any]:
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False}
    inputs = {"num_bits": 8, "type": kind, "strategy": "token", "symmetric": True, "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        "ignore": ["lm_head", "re:.*\\.gate$"],
    }


def _int8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.round(weight / scale).clamp(-127, 127).to(torch.int8)


def _int8_channel(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / 127
    return {"weight": _int8(weight, scale), "weight_scale": scale}


def _packed(
    weight: torch.Tensor, *, bits: int = 4, group_size: int = 128, sym: bool = True, act: bool = False
) -> Tensors:
    """Round to nearest, as compressed-tensors packs it (pack-quantized)."""
    n, k = weight.shape
    size, half = k if group_size == -1 else group_size, 1 << (bits - 1)
    group = torch.arange(k, device=weight.device) // size
    if act:  # inputs in another order
        group = group[torch.randperm(k, generator=torch.Generator().manual_seed(k)).to(weight.device)]
    grouped = weight[:, group.argsort(stable=True)].reshape(n, k // size, size)
    if sym:
        scale = (grouped.abs().amax(2) / (half - 1)).clamp(min=1e-6).to(torch.bfloat16)
        zeros = torch.zeros_like(scale, dtype=torch.float32)
    else:
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        scale = ((high - low) / (2 * half - 1)).clamp(min=1e-6).to(torch.bfloat16)
        zeros = (torch.round(-low / scale.float()) - half).clamp(-half, half - 1)
    q = torch.round(weight / scale.float()[:, group]) + zeros[:, group]
    tensors = {
        "weight_packed": _words(q.clamp(-half, half - 1) + half, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([n, k]),
    }
    if not sym:
        tensors["weight_zero_point"] = _words((zeros + half).t(), bits).t().contiguous()
    return tensors | ({"weight_g_idx": group.to(torch.int32)} if act else {})


def _words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """``[R, C]`` values -> ``[R, C * bits / 32]`` words, lowest bits first."""
    parts = values.to(torch.int64).reshape(len(values), -1, 32 // bits)
    return _int32((parts << torch.arange(0, 32, bits, device=values.device)).sum(2))


def _packed_config(bits: int = 4, group_size: int = 128, sym: bool = True, act: bool = False) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": sym, "dynamic": False}
    weights |= {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    if act:
        weights["actorder"] = "group"
    config = _compressed("channel")
    config["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {**config, "format": "pack-quantized"}


def _compressed_blocks() -> dict[str, Any]:
    config = _compressed("block")
    group = config["config_groups"]["group_0"]
    group["weights"]["block_structure"] = [128, 128]
    group["input_activations"] |= {"strategy": "group", "group_size": 128}
    return config


def _weight_only() -> dict[str, Any]:
    config = _compressed("channel")
    config["config_groups"]["group_0"]["input_activations"] = None
    return config


_VARIANTS: Mapping[str, tuple[Callable[[torch.Tensor], Tensors], dict[str, Any] | None]] = {
    "bf16": (_dense, None),
    "fp8_block": (lambda w: _blocks(w, 448, _fp8), _FP8_BLOCK),
    "fp8_channel": (_fp8_channel, _compressed("channel")),
    "fp8_tensor": (_fp8_tensor, _FP8_TENSOR),
    "int8_channel": (_int8_channel, _compressed("channel", "int")),
    "int8_block": (lambda w: _blocks(w, 127, _int8), {**_FP8_BLOCK, "quant_method": "blockwise_int8"}),
    "gptq_int4": (_gptq, _gptq_config()),
    "gptq_int4_g64": (lambda w: _gptq(w, group_size=64), _gptq_config(group_size=64)),
    "gptq_int4_act": (lambda w: _gptq(w, desc_act=True), _gptq_config(desc_act=True)),
    "gptq_int8": (lambda w: _gptq(w, bits=8), _gptq_config(bits=8)),
    "auto_round_int4": (
        lambda w: {leaf: tensor for leaf, tensor in _gptq(w).items() if leaf != "g_idx"},
        _auto_round_config(),
    ),
    "ct_fp8_block": (
        lambda w: {leaf.removesuffix("_inv"): t for leaf, t in _blocks(w, 448, _fp8).items()},
        _compressed_blocks(),
    ),
    "ct_fp8_weight": (_fp8_channel, _weight_only()),
    "ct_int4": (_packed, _packed_config()),
    "ct_int4_g32": (lambda w: _packed(w, group_size=32), _packed_config(group_size=32)),
    "ct_int4_asym": (lambda w: _packed(w, sym=False), _packed_config(sym=False)),
    "ct_int4_act": (lambda w: _packed(w, act=True), _packed_config(act=True)),
    "ct_int8": (lambda w: _packed(w, bits=8, group_size=-1), _packed_config(8, -1)),
    "awq_int4": (_awq, _awq_config()),
    "awq_int4_g64": (lambda w: _awq(w, group_size=64), _awq_config(64)),
}


def quantize(weight: torch.Tensor, variant: str) -> tuple[Tensors, torch.Tensor]:
    """A weight ``[N, K]`` in a format, and what that stands for, in float32."""
    tensors = _VARIANTS[variant][0](weight)
    return tensors, dequantize(tensors, torch.bfloat16)


def dequantize(tensors: Tensors, scales: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight ``[N, K]`` that the tensors of a module stand for, in float32.

    SGLang rounds the scales of packed weights to the dtype of the model, ``scales``.
    """
    if "qweight" in tensors:
        factors = tensors["scales"].to(scales).float()
        if tensors["qweight"].shape[1] != factors.shape[1]:  # AWQ's words go along outputs
            q, zeros = _awq_values(tensors["qweight"]), _awq_values(tensors["qzeros"])
            size = len(q) // len(zeros)
            return ((q - zeros.repeat_interleave(size, 0)) * factors.repeat_interleave(size, 0)).t().contiguous()
        bits = 32 * tensors["qzeros"].shape[1] // factors.shape[1]
        q = _values(tensors["qweight"].t(), bits).t()
        in_order = torch.arange(len(q), device=q.device) // (len(q) // len(factors))
        group = tensors.get("g_idx", in_order).long()
        return (q * factors[group]).t().contiguous()
    if "weight_packed" in tensors:
        k = int(tensors["weight_shape"][1])
        bits = 32 * tensors["weight_packed"].shape[1] // k
        factors = tensors["weight_scale"].to(scales).float()
        group = torch.arange(k, device=factors.device) // (k // factors.shape[1])
        group = tensors.get("weight_g_idx", group).long()
        q = _values(tensors["weight_packed"], bits)
        if "weight_zero_point" in tensors:
            q -= _values(tensors["weight_zero_point"].t(), bits).t()[:, group]
        return q * factors[:, group]
    weight = tensors["weight"].float()
    scale = tensors.get("weight_scale_inv", tensors.get("weight_scale"))
    if scale is None:
        return weight
    if scale.dim() == 2 and len(scale) < len(weight):
        scale = scale.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)[:, : weight.shape[1]]
    return weight * scale


def _values(words: torch.Tensor, bits: int) -> torch.Tensor:
    """``[R, C]`` words, lowest bits first -> ``[R, C * 32 / bits]`` values around 0."""
    shifts = torch.arange(0, 32, bits, device=words.device)
    values = (words.long()[:, :, None] >> shifts) & ((1 << bits) - 1)
    return values.flatten(1).float() - (1 << (bits - 1))


def write_sources(
    folder: Path,
    shape: Shape,
    variants: Iterable[str],
    *,
    skip: Sequence[str] = ("*.kv_b_proj", "*.q_a_proj", "*.kv_a_proj_with_mqa"),
    shard_bytes: int = 2 << 30,
) -> dict[str, Path]:
    """Writes ``folder/{variant}`` for each of ``variants``; modules that match ``skip`` stay dense."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shards = {variant: _Shards(folder / variant, shard_bytes) for variant in variants}
    for name, size in _modules(shape):
        weight = _weight(name, size, device)
        for variant, writer in shards.items():
            quantized = _is_linear(name) and not any(fnmatchcase(name, pattern) for pattern in skip)
            store = _VARIANTS[variant][0] if quantized else _dense
            for leaf, tensor in store(weight).items():
                writer.add(name if name.endswith("bias") else f"{name}.{leaf}", tensor)
    for variant, writer in shards.items():
        config = _config(shape)
        quantization = _VARIANTS[variant][1]
        if quantization is not None:
            config["quantization_config"] = {**quantization, **_left_out(quantization, skip, shape)}
        writer.finish(config)
    return {variant: folder / variant for variant in shards}


def _left_out(quantization: Mapping[str, Any], skip: Sequence[str], shape: Shape) -> dict[str, Any]:
    """How a release says which modules it leaves alone, so that SGLang serves it natively too."""
    if quantization["quant_method"] == "awq":
        # Parts of names: with their dots, so that `gate` is not taken for a part of `gate_proj`.
        return {"modules_to_not_convert": ["lm_head", "mlp.gate.", *(f".{pattern[2:]}" for pattern in skip)]}
    if quantization["quant_method"] == "compressed-tensors":
        return {"ignore": [*quantization["ignore"], *(f"re:.*{pattern.removeprefix('*')}$" for pattern in skip)]}
    skipped = [name for name, _ in _modules(shape) if any(fnmatchcase(name, pattern) for pattern in skip)]
    if quantization["quant_method"] != "fp8" or not skipped:
        return {}
    # SGLang asks for the fused name, which it knows of no parts of.
    fused = {name.replace(".q_a_proj", ".fused_qkv_a_proj_with_mqa") for name in skipped if ".q_a_proj" in name}
    return {"modules_to_not_convert": [*skipped, *sorted(fused)]}


class _Shards:
    """Writes tensors to safetensors files as they come, and an index."""

    def __init__(self, folder: Path, most: int):
        self._folder, self._most = folder, most
        self._pending: Tensors = {}
        self._map: dict[str, str] = {}
        folder.mkdir(parents=True)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._pending[name] = tensor.contiguous().cpu()
        if sum(t.nbytes for t in self._pending.values()) >= self._most:
            self._flush()

    def _flush(self) -> None:
        file = f"model-{len(set(self._map.values())) + 1:05}.safetensors"
        save_file(self._pending, self._folder / file, metadata={"format": "pt"})
        self._map |= dict.fromkeys(self._pending, file)
        self._pending = {}

    def finish(self, config: Mapping[str, Any]) -> None:
        self._flush()
        index = {"metadata": {}, "weight_map": self._map}
        for name, content in (("config.json", config), ("model.safetensors.index.json", index)):
            (self._folder / name).write_text(json.dumps(content, indent=2))
