"""Small checkpoints with the tensors of a producer: AutoRound, GPTQModel, AutoAWQ, Quark, ModelOpt, llm-compressor, and
vendors of FP8 models.

    checkpoint = Checkpoint(qwen3_moe(), {"*_proj": NVFP4})
    checkpoint.write(folder, real_config("nvidia-qwen3-235b-nvfp4"))

A :class:`Skeleton` has the modules of a model family, named as in its releases, with few layers, two experts, and sizes
that fit all groups, blocks and kernels. A :class:`Storage` makes the tensors that a producer stores for a linear.
Weights depend on names only, so that what is read can be compared with what was stored.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from support.write import VARIANTS

__all__ = [
    "AUTO_ROUND_AWQ",
    "AUTO_ROUND_GPTQ",
    "AWQ",
    "BF16",
    "CONFIGS",
    "CT_FP8_BLOCK",
    "CT_FP8_CHANNEL",
    "CT_FP8_TENSOR_W8A16",
    "CT_INT4_F32",
    "CT_INT4_G32",
    "CT_INT4_G128",
    "CT_MXFP4",
    "CT_MXFP8",
    "CT_NVFP4",
    "CT_NVFP4_A16",
    "CT_W4A8",
    "DSV4_FP8",
    "DSV4_MXFP4",
    "F32",
    "FP8_BLOCK",
    "FP8_FUSED",
    "GPTQ_3BIT",
    "GPTQ_G32_ACT_ORDER",
    "GPTQ_G128",
    "MODELOPT_FP8",
    "MXFP8",
    "NVFP4",
    "NVFP4_A16",
    "QUARK_AWQ",
    "QUARK_FP8_E8M0",
    "QUARK_MXFP4",
    "W4AFP8",
    "Checkpoint",
    "Part",
    "Skeleton",
    "Storage",
    "deepseek",
    "deepseek_v4",
    "gpt_oss",
    "gpt_oss_stacked",
    "kimi_k3",
    "llama",
    "llama4",
    "minimax",
    "nemotron",
    "qwen3_5",
    "qwen3_moe",
    "real_config",
    "step3",
    "weight_of",
]

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
Config = dict[str, Any]

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
"""Configurations of released checkpoints, without the entries that do not concern weights."""

HIDDEN, INTERMEDIATE, QUERIES, KEYS, VOCAB, EXPERTS = 256, 256, 256, 128, 256, 2


def real_config(name: str) -> Config:
    """``{"config": ..., "hf_quant_config": ...}`` of a released checkpoint; either may be missing or None."""
    data: Config = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return data


# How producers store a linear


@dataclass(frozen=True)
class Storage:
    """How a producer stores a linear, and how mixprec must read it."""

    store: Callable[[Array], Tensors]
    """A weight ``[N, K]`` in float32 -> its tensors by leaf; ``[E, N, K]`` for all experts in one tensor."""
    kind: str = ""
    """The kind that it is read as; empty where it is refused."""
    named: str = ""
    """A word that the refusal must contain."""
    error: float = 0.0
    """The largest allowed relative error of the dequantized weight, as a norm."""


def _e8m0(scale: Array) -> Array:
    """The exponent of the power of two at or above each scale, biased by 127."""
    return (np.ceil(np.log2(np.maximum(scale, 1e-30))) + 127).astype(np.uint8)


def _groups(weight: Array, size: int) -> Array:
    """The largest magnitude in each group of inputs: ``[..., K / size]``."""
    largest: Array = abs(weight).reshape(*weight.shape[:-1], -1, size).max(axis=-1)
    return largest


def _fours(weight: Array) -> tuple[Array, Array]:
    """Two E2M1 codes in a byte, ``[..., K / 2]``, and the exponents of blocks of 32, ``[..., K / 32]``."""
    exponents = _e8m0(_groups(weight, 32) / 6)
    values = weight / np.exp2(exponents.astype(np.float32) - 127).repeat(32, axis=-1)
    codes = values.astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    packed: Array = codes[..., ::2] | codes[..., 1::2] << 4
    return packed, exponents


def _fp8(weight: Array, scale: Array) -> Array:
    return (weight / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)


def _blocks(weight: Array, block: tuple[int, int] = (128, 128)) -> tuple[Array, Array]:
    """FP8 values and a scale for each block of a weight whose sizes are multiples of the block."""
    *experts, n, k = weight.shape
    grid = abs(weight).reshape(*experts, n // block[0], block[0], k // block[1], block[1])
    scale = (grid.max(axis=(-3, -1)) / 448).astype(np.float32)
    spread = scale.repeat(block[0], axis=-2).repeat(block[1], axis=-1)
    return _fp8(weight, spread), scale


def _fp8_block(leaf: str = "weight_scale_inv", fused: bool = False) -> Callable[[Array], Tensors]:
    def store(weight: Array) -> Tensors:
        values, scale = _blocks(weight)
        return {"": values, "_scale_inv": scale} if fused else {"weight": values, leaf: scale}

    return store


def _fp8_e8m0(leaf: str) -> Callable[[Array], Tensors]:
    def store(weight: Array) -> Tensors:
        exponents = _e8m0(_blocks(weight)[1])
        scale = np.exp2(exponents.astype(np.float32) - 127)
        values = _fp8(weight, scale.repeat(128, axis=-2).repeat(128, axis=-1))
        return {"weight": values, leaf: exponents.view(ml_dtypes.float8_e8m0fnu)}

    return store


def _fp8_tensor(*, static: bool) -> Callable[[Array], Tensors]:
    # One scale, since producers equalize it for modules that engines fuse.
    return partial(VARIANTS["fp8_tensor"].store, activations="static" if static else "dynamic", scale=1 / 2048)


def _mxfp8(leaf: str) -> Callable[[Array], Tensors]:
    def store(weight: Array) -> Tensors:
        exponents = _e8m0(_groups(weight, 32) / 448)
        values = _fp8(weight, np.exp2(exponents.astype(np.float32) - 127).repeat(32, axis=-1))
        return {"weight": values, leaf: exponents}

    return store


def _nvfp4(producer: str, *, activations: bool) -> Callable[[Array], Tensors]:
    """With one scale of all, as producers equalize it over what engines fuse."""
    return partial(VARIANTS[producer].store, activations=activations, scale=1 / 2688)


def _mxfp4(leaf: str, scales: str = "weight_scale") -> Callable[[Array], Tensors]:
    def store(weight: Array) -> Tensors:
        values, exponents = _fours(weight)
        if scales == "scale":  # DeepSeek-V4
            return {leaf: values.view(np.int8), scales: exponents.view(ml_dtypes.float8_e8m0fnu)}
        return {leaf: values, scales: exponents}

    return store


def _w4afp8(weight: Array) -> Tensors:
    """TensorRT-LLM's layout: signed nibbles, groups of 128 inputs."""
    scale = _groups(weight, 128) / 7
    q = (weight / scale.repeat(128, axis=1)).round().clip(-8, 7).astype(np.int8)
    packed = (q[:, ::2] & 15 | q[:, 1::2] << 4).astype(np.int8)
    scales = scale.astype(ml_dtypes.bfloat16)
    return {"weight": packed, "weight_scale_inv": scales, "input_scale": np.array([0.25], np.float32)}


def _ct_int4(group_size: int, dtype: npt.DTypeLike = ml_dtypes.bfloat16) -> Callable[[Array], Tensors]:
    def store(weight: Array) -> Tensors:
        tensors: Tensors = VARIANTS["ct_int4"].store(weight, group_size=group_size)
        return tensors | {"weight_scale": tensors["weight_scale"].astype(dtype)}

    return store


def _gptq(group_size: int = 128, *, order: bool = True, **options: Any) -> Callable[[Array], Tensors]:
    def store(weight: Array) -> Tensors:
        tensors: Tensors = VARIANTS["gptq_int4"].store(weight, group_size=group_size, **options)
        return tensors if order else {leaf: value for leaf, value in tensors.items() if leaf != "g_idx"}

    return store


def _gptq_3bit(weight: Array) -> Tensors:
    """Three words for 32 values, along inputs (weights) or outputs (zero points)."""
    n, k = weight.shape
    return {
        "qweight": np.zeros((k // 32 * 3, n), np.int32),
        "qzeros": np.zeros((k // 128, n // 32 * 3), np.int32),
        "scales": np.ones((k // 128, n), np.float16),
        "g_idx": np.arange(k, dtype=np.int32) // 128,
    }


def _awq(group_size: int = 128) -> Callable[[Array], Tensors]:
    def store(weight: Array) -> Tensors:
        tensors: Tensors = VARIANTS["awq_int4"].store(weight, group_size=group_size)
        return tensors

    return store


def _quark_awq(weight: Array) -> Tensors:
    """Quark's ``pack_method: reorder``: AutoAWQ's order of nibbles, in two's complement."""
    unsigned: Tensors = VARIANTS["awq_int4"].store(weight)
    flipped = np.uint32(0x88888888)  # the sign bit of each nibble
    return {
        leaf: (words.view(np.uint32) ^ flipped).view(np.int32) if leaf != "scales" else words
        for leaf, words in unsigned.items()
    }


def _dense(dtype: npt.DTypeLike) -> Callable[[Array], Tensors]:
    return lambda weight: {"weight": weight.astype(dtype)}


BF16 = Storage(_dense(ml_dtypes.bfloat16), "bf16", error=0.01)
F32 = Storage(_dense(np.float32), "fp32")

FP8_BLOCK = Storage(_fp8_block(), "fp8_block", error=0.05)
CT_FP8_BLOCK = Storage(_fp8_block("weight_scale"), "fp8_block", error=0.05)
FP8_FUSED = Storage(_fp8_block(fused=True), named="one tensor")
MODELOPT_FP8 = Storage(_fp8_tensor(static=True), "fp8_tensor", error=0.05)
CT_FP8_TENSOR_W8A16 = Storage(_fp8_tensor(static=False), "fp8_tensor", error=0.05)
CT_FP8_CHANNEL = Storage(VARIANTS["fp8_channel"].store, "fp8_channel", error=0.05)
DSV4_FP8 = Storage(_fp8_e8m0("scale"), "fp8_block", error=0.06)
QUARK_FP8_E8M0 = Storage(_fp8_e8m0("weight_scale"), "fp8_block", error=0.05)
MXFP8 = Storage(_mxfp8("weight_scale_inv"), named="MXFP8")
CT_MXFP8 = Storage(_mxfp8("weight_scale"), named="MXFP8")

NVFP4 = Storage(_nvfp4("nvfp4", activations=True), "nvfp4", error=0.15)
NVFP4_A16 = Storage(_nvfp4("nvfp4", activations=False), "nvfp4", error=0.15)
CT_NVFP4 = Storage(_nvfp4("ct_nvfp4", activations=True), "ct_nvfp4", error=0.15)
CT_NVFP4_A16 = Storage(_nvfp4("ct_nvfp4", activations=False), "ct_nvfp4", error=0.15)
CT_MXFP4 = Storage(_mxfp4("weight_packed"), "mxfp4", error=0.2)
QUARK_MXFP4 = Storage(_mxfp4("weight"), "mxfp4", error=0.2)
DSV4_MXFP4 = Storage(_mxfp4("weight", "scale"), "mxfp4", error=0.2)
W4AFP8 = Storage(_w4afp8, "w4afp8", error=0.2)

GPTQ_G128 = Storage(_gptq(), "gptq_int4", error=0.2)
GPTQ_G32_ACT_ORDER = Storage(_gptq(32, desc_act=True), "gptq_int4", error=0.2)
GPTQ_3BIT = Storage(_gptq_3bit, named="3 bit")
AUTO_ROUND_GPTQ = Storage(_gptq(order=False), "gptq_int4", error=0.2)
AUTO_ROUND_AWQ = Storage(_awq(), "awq_int4", error=0.2)
AWQ = Storage(_awq(), "awq_int4", error=0.2)
QUARK_AWQ = Storage(_quark_awq, named="Quark")
CT_INT4_G32 = Storage(_ct_int4(32), "ct_int4", error=0.2)
CT_INT4_G128 = Storage(_ct_int4(128), "ct_int4", error=0.2)
CT_INT4_F32 = Storage(_ct_int4(128, np.float32), "ct_int4", error=0.2)
CT_W4A8 = Storage(_ct_int4(128), named="W4A8")


# Model families


class Part(NamedTuple):
    """A module of a skeleton."""

    name: str
    shape: tuple[int, ...]
    bare: bool = False
    """Whether the tensor's name has no leaf (``A_log``, experts in one tensor)."""
    bias: bool = False


@dataclass(frozen=True)
class Skeleton:
    """A model family in small."""

    parts: Sequence[Part]
    config: Mapping[str, Any]
    """The entries of ``config.json`` for the model's size."""
    nested: bool = False
    """Whether the sizes are in ``text_config``."""
    layers: int = 2
    draft: int | None = None
    """The release's number of the layer for multi-token prediction, if that follows the others."""


def _sizes(layers: int, **more: Any) -> Config:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": VOCAB,
        **more,
    }


_MOE = {"moe_intermediate_size": INTERMEDIATE, "num_experts_per_tok": 1}


def _mlp(prefix: str, names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")) -> Iterator[Part]:
    gate, up, down = (f"{prefix}.{name}" for name in names)
    yield from (Part(gate, (INTERMEDIATE, HIDDEN)), Part(up, (INTERMEDIATE, HIDDEN)))
    yield Part(down, (HIDDEN, INTERMEDIATE))


def _attention(prefix: str, *, norms: bool = False, gated: bool = False) -> Iterator[Part]:
    yield Part(f"{prefix}.q_proj", (QUERIES * (2 if gated else 1), HIDDEN))
    yield from (Part(f"{prefix}.{name}_proj", (KEYS, HIDDEN)) for name in "kv")
    yield Part(f"{prefix}.o_proj", (HIDDEN, QUERIES))
    yield from (Part(f"{prefix}.{name}_norm", (64,)) for name in "qk" if norms)


def _norms(prefix: str) -> Iterator[Part]:
    yield from (Part(f"{prefix}.{name}", (HIDDEN,)) for name in ("input_layernorm", "post_attention_layernorm"))


def _ends(prefix: str = "model", head: str = "lm_head") -> Iterator[Part]:
    yield from (Part(f"{prefix}.embed_tokens", (VOCAB, HIDDEN)), Part(f"{prefix}.norm", (HIDDEN,)))
    yield Part(head, (VOCAB, HIDDEN))


def llama(layers: int = 2, *, qk_norm: bool = False, family: str = "llama") -> Skeleton:
    """Llama and, with norms of queries and keys, Qwen3."""
    parts = [*_ends()]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        parts += [*_attention(f"{prefix}.self_attn", norms=qk_norm), *_mlp(f"{prefix}.mlp"), *_norms(prefix)]
    architecture = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]
    return Skeleton(parts, _sizes(layers, model_type=family, architectures=[architecture]), layers=layers)


def qwen3_moe(layers: int = 2) -> Skeleton:
    parts = [*_ends()]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        parts += [*_attention(f"{prefix}.self_attn", norms=True), *_norms(prefix)]
        parts += [Part(f"{prefix}.mlp.gate", (EXPERTS, HIDDEN))]
        parts += [part for expert in range(EXPERTS) for part in _mlp(f"{prefix}.mlp.experts.{expert}")]
    config = _sizes(layers, model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], **_MOE)
    return Skeleton(parts, config | {"num_experts": EXPERTS}, layers=layers)


def minimax(layers: int = 2, *, family: str = "minimax_m2", prefix: str = "", dense: int = 0) -> Skeleton:
    """MiniMax-M2 and M3, with Mixtral's names of experts; ``prefix`` is for a model with a vision tower."""
    parts = [*_ends(f"{prefix}model", f"{prefix}lm_head")]
    for layer in range(layers):
        at = f"{prefix}model.layers.{layer}"
        parts += [*_attention(f"{at}.self_attn", norms=True), *_norms(at)]
        if layer < dense:
            parts += _mlp(f"{at}.mlp")
            continue
        parts += [Part(f"{at}.block_sparse_moe.gate", (EXPERTS, HIDDEN))]
        parts += [Part(f"{at}.block_sparse_moe.e_score_correction_bias", (EXPERTS,), bare=True)]
        for expert in range(EXPERTS):
            parts += _mlp(f"{at}.block_sparse_moe.experts.{expert}", ("w1", "w3", "w2"))
    if prefix:
        parts += [Part("vision_tower.blocks.0.attn.qkv", (3 * HIDDEN, HIDDEN), bias=True)]
    config = _sizes(layers, model_type=family, architectures=["MiniMaxM2ForCausalLM"], num_local_experts=EXPERTS)
    return Skeleton(parts, config | {"num_experts_per_tok": 1}, nested=bool(prefix), layers=layers)


def deepseek(
    layers: int = 2,
    *,
    family: str = "deepseek_v3",
    prefix: str = "",
    indexers: Iterable[int] = (),
    draft: int | None = None,
    vision: bool = False,
) -> Skeleton:
    """DeepSeek-V3 and its descendants: V3.2 and GLM-5 (``indexers``: the layers with one), Kimi-K2.5 (``prefix``).

    The first layer is dense; ``draft`` is the release's number of the layer for multi-token prediction.
    """
    rank, latent = 128, 128
    parts = [*_ends(f"{prefix}model", f"{prefix}lm_head")]
    for layer in range(layers + (draft is not None)):
        at = f"{prefix}model.layers.{layer}"
        attention = f"{at}.self_attn"
        parts += [
            Part(f"{attention}.q_a_proj", (rank, HIDDEN)),
            Part(f"{attention}.q_a_layernorm", (rank,)),
            Part(f"{attention}.q_b_proj", (512, rank)),
            Part(f"{attention}.kv_a_proj_with_mqa", (latent, HIDDEN)),
            Part(f"{attention}.kv_a_layernorm", (latent,)),
            Part(f"{attention}.kv_b_proj", (512, latent)),
            Part(f"{attention}.o_proj", (HIDDEN, 512)),
        ]
        if layer in set(indexers):
            parts += [
                Part(f"{attention}.indexer.wq_b", (256, rank)),
                Part(f"{attention}.indexer.wk", (128, HIDDEN)),
                Part(f"{attention}.indexer.weights_proj", (4, HIDDEN)),
                Part(f"{attention}.indexer.k_norm", (128,), bias=True),
            ]
        parts += _norms(at)
        if layer == 0:
            parts += _mlp(f"{at}.mlp")
            continue
        parts += [Part(f"{at}.mlp.gate", (EXPERTS, HIDDEN))]
        parts += [Part(f"{at}.mlp.gate.e_score_correction_bias", (EXPERTS,), bare=True)]
        parts += _mlp(f"{at}.mlp.shared_experts")
        parts += [part for expert in range(EXPERTS) for part in _mlp(f"{at}.mlp.experts.{expert}")]
        if layer == layers:
            parts += [Part(f"{at}.eh_proj", (HIDDEN, 2 * HIDDEN)), Part(f"{at}.shared_head.head", (VOCAB, HIDDEN))]
            parts += [Part(f"{at}.{norm}", (HIDDEN,)) for norm in ("enorm", "hnorm", "shared_head.norm")]
    if vision:
        parts += [Part("vision_tower.encoder.blocks.0.wqkv", (3 * HIDDEN, HIDDEN), bias=True)]
        parts += [Part("mm_projector.proj.0", (HIDDEN, HIDDEN), bias=True)]
    config = _sizes(layers, model_type=family, n_routed_experts=EXPERTS, n_shared_experts=1, **_MOE)
    config |= {"first_k_dense_replace": 1, "q_lora_rank": rank, "kv_lora_rank": latent - 64, "v_head_dim": 128}
    config |= {"qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "num_nextn_predict_layers": int(draft is not None)}
    return Skeleton(parts, config, nested=bool(prefix), layers=layers, draft=draft)


def deepseek_v4(layers: int = 2) -> Skeleton:
    """DeepSeek-V4: names of its own, and ``.scale`` for every scale."""
    parts = [Part("embed", (VOCAB, HIDDEN)), Part("norm", (HIDDEN,)), Part("head", (VOCAB, HIDDEN))]
    for at in [*(f"layers.{layer}" for layer in range(layers)), "mtp.0"]:
        shapes = {"wq_a": (128, HIDDEN), "wq_b": (256, 128), "wkv": (128, HIDDEN), "wo_a": (256, 256)}
        parts += [Part(f"{at}.attn.{name}", shape) for name, shape in (shapes | {"wo_b": (HIDDEN, 256)}).items()]
        parts += [
            Part(f"{at}.attn.q_norm", (128,)),
            Part(f"{at}.attn_norm", (HIDDEN,)),
            Part(f"{at}.ffn_norm", (HIDDEN,)),
        ]
        parts += [Part(f"{at}.ffn.gate", (EXPERTS, HIDDEN), bias=True)]
        parts += _mlp(f"{at}.ffn.shared_experts", ("w1", "w3", "w2"))
        for expert in range(EXPERTS):
            parts += _mlp(f"{at}.ffn.experts.{expert}", ("w1", "w3", "w2"))
    parts += [Part(f"mtp.0.{name}", (HIDDEN, HIDDEN)) for name in ("e_proj", "h_proj")]
    parts += [Part(f"mtp.0.{name}", (HIDDEN,)) for name in ("enorm", "hnorm", "norm")]
    sizes = {"fn": (4, 4 * HIDDEN), "base": (4,), "scale": (1,)}
    parts += [Part(f"mtp.0.hc_head_{name}", shape, bare=True) for name, shape in sizes.items()]
    config = _sizes(layers, model_type="deepseek_v4", n_routed_experts=EXPERTS, n_shared_experts=1, **_MOE)
    return Skeleton(parts, config | {"num_nextn_predict_layers": 1}, layers=layers)


def kimi_k3(layers: int = 2) -> Skeleton:
    """Kimi-K3: linear attention (KDA), and full attention in the last layer."""
    prefix = "language_model.model"
    parts = [*_ends(prefix, "language_model.lm_head")]
    for layer in range(layers):
        at = f"{prefix}.layers.{layer}"
        parts += [*_attention(f"{at}.self_attn"), *_norms(at)]
        if layer < layers - 1:
            parts += [Part(f"{at}.self_attn.{name}", (128, HIDDEN)) for name in ("f_a_proj", "b_proj")]
            parts += [Part(f"{at}.self_attn.A_log", (1, 1, 4, 1), bare=True)]
            parts += [Part(f"{at}.self_attn.dt_bias", (QUERIES,), bare=True)]
            parts += [Part(f"{at}.self_attn.q_conv1d", (QUERIES, 1, 4))]
        parts += [Part(f"{at}.block_sparse_moe.gate", (EXPERTS, HIDDEN))]
        parts += _mlp(f"{at}.block_sparse_moe.shared_experts")
        for expert in range(EXPERTS):
            parts += _mlp(f"{at}.block_sparse_moe.experts.{expert}", ("w1", "w3", "w2"))
    parts += [Part("vision_tower.encoder.blocks.0.wqkv", (3 * HIDDEN, HIDDEN), bias=True)]
    config = _sizes(layers, model_type="kimi_linear", num_experts=EXPERTS, **_MOE)
    return Skeleton(parts, config, nested=True, layers=layers)


def qwen3_5(
    layers: int = 2, *, experts: str = "", draft: bool = True, vision: bool = True, full: Iterable[int] = (1,)
) -> Skeleton:
    """Qwen3.5 and later: full attention in the layers ``full``, linear attention (GDN) in others; a draft is ``mtp.*``.

    ``experts``: ``each`` for separate modules, ``fused`` for all experts of a layer in one tensor; empty for none.
    """
    parts = [*_ends("model.language_model")]
    places = [(f"model.language_model.layers.{layer}", layer in set(full)) for layer in range(layers)]
    for at, attends in [*places, *([("mtp.layers.0", True)] if draft else [])]:
        if attends:
            parts += _attention(f"{at}.self_attn", norms=True, gated=True)
        else:
            parts += [
                Part(f"{at}.linear_attn.in_proj_qkv", (512, HIDDEN)),
                Part(f"{at}.linear_attn.in_proj_z", (256, HIDDEN)),
                Part(f"{at}.linear_attn.in_proj_a", (32, HIDDEN)),
                Part(f"{at}.linear_attn.in_proj_b", (32, HIDDEN)),
                Part(f"{at}.linear_attn.out_proj", (HIDDEN, 256)),
                Part(f"{at}.linear_attn.conv1d", (512, 1, 4)),
                Part(f"{at}.linear_attn.norm", (64,)),
                Part(f"{at}.linear_attn.A_log", (32,), bare=True),
                Part(f"{at}.linear_attn.dt_bias", (32,), bare=True),
            ]
        parts += _norms(at)
        if not experts:
            parts += _mlp(f"{at}.mlp")
            continue
        parts += [Part(f"{at}.mlp.gate", (EXPERTS, HIDDEN)), Part(f"{at}.mlp.shared_expert_gate", (1, HIDDEN))]
        parts += _mlp(f"{at}.mlp.shared_expert")
        if experts == "fused":
            parts += [Part(f"{at}.mlp.experts.gate_up_proj", (EXPERTS, 2 * INTERMEDIATE, HIDDEN), bare=True)]
            parts += [Part(f"{at}.mlp.experts.down_proj", (EXPERTS, HIDDEN, INTERMEDIATE), bare=True)]
        else:
            parts += [part for expert in range(EXPERTS) for part in _mlp(f"{at}.mlp.experts.{expert}")]
    if draft:
        parts += [Part("mtp.fc", (HIDDEN, 2 * HIDDEN))]
        parts += [Part(f"mtp.{norm}", (HIDDEN,)) for norm in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding")]
    if vision:
        parts += [Part("model.visual.blocks.0.attn.qkv", (3 * HIDDEN, HIDDEN), bias=True)]
        parts += [Part("model.visual.blocks.0.mlp.linear_fc1", (HIDDEN, HIDDEN), bias=True)]
        parts += [Part("model.visual.merger.linear_fc1", (HIDDEN, HIDDEN), bias=True)]
    family = "qwen3_5_moe" if experts else "qwen3_5"
    config = _sizes(layers, model_type=f"{family}_text", mtp_num_hidden_layers=int(draft))
    if experts:
        config |= {**_MOE, "num_experts": EXPERTS, "shared_expert_intermediate_size": INTERMEDIATE}
    return Skeleton(parts, config, nested=True, layers=layers)


def nemotron(pattern: str = "ME*E") -> Skeleton:
    """Nemotron-3: a layer is one mixer (M Mamba, E experts, * attention); experts have no gate."""
    parts = [Part("backbone.embeddings", (VOCAB, HIDDEN)), Part("backbone.norm_f", (HIDDEN,))]
    parts += [Part("lm_head", (VOCAB, HIDDEN))]
    for layer, kind in enumerate(pattern):
        at = f"backbone.layers.{layer}"
        parts += [Part(f"{at}.norm", (HIDDEN,))]
        if kind == "M":
            parts += [Part(f"{at}.mixer.in_proj", (640, HIDDEN)), Part(f"{at}.mixer.out_proj", (HIDDEN, 256))]
            parts += [Part(f"{at}.mixer.conv1d", (384, 1, 4), bias=True), Part(f"{at}.mixer.norm", (256,))]
            parts += [Part(f"{at}.mixer.{name}", (4,), bare=True) for name in ("A_log", "D", "dt_bias")]
        elif kind == "*":
            parts += _attention(f"{at}.mixer")
        else:
            parts += [Part(f"{at}.mixer.gate", (EXPERTS, HIDDEN))]
            parts += [Part(f"{at}.mixer.gate.e_score_correction_bias", (EXPERTS,), bare=True)]
            for name in [*(f"experts.{expert}" for expert in range(EXPERTS)), "shared_experts"]:
                parts += [Part(f"{at}.mixer.{name}.up_proj", (INTERMEDIATE, HIDDEN))]
                parts += [Part(f"{at}.mixer.{name}.down_proj", (HIDDEN, INTERMEDIATE))]
    config = _sizes(len(pattern), model_type="nemotron_h", n_routed_experts=EXPERTS, n_shared_experts=1, **_MOE)
    config |= {"hybrid_override_pattern": pattern, "num_nextn_predict_layers": 0}
    return Skeleton(parts, config, layers=len(pattern))


def gpt_oss(layers: int = 2) -> Skeleton:
    """gpt-oss: biases everywhere. Its release keeps all experts of a layer in one tensor: :func:`gpt_oss_stacked`."""
    parts = [*_ends()]
    for layer in range(layers):
        at = f"model.layers.{layer}"
        parts += [part._replace(bias=True) for part in _attention(f"{at}.self_attn")]
        parts += [Part(f"{at}.self_attn.sinks", (4,), bare=True), *_norms(at)]
        parts += [Part(f"{at}.mlp.router", (EXPERTS, HIDDEN), bias=True)]
        for expert in range(EXPERTS):
            home = f"{at}.mlp.experts.{expert}"
            parts += [Part(f"{home}.{part}_proj", (INTERMEDIATE, HIDDEN), bias=True) for part in ("gate", "up")]
            parts += [Part(f"{home}.down_proj", (HIDDEN, INTERMEDIATE), bias=True)]
    return Skeleton(parts, _sizes(layers, model_type="gpt_oss", num_local_experts=EXPERTS), layers=layers)


def gpt_oss_stacked(tensors: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """The experts of a layer in one tensor, in which rows of gate and up alternate."""
    out: dict[str, Tensors] = {}
    found: dict[str, list[Array]] = {}
    for module, own in tensors.items():
        block, inside, rest = module.partition(".mlp.experts.")
        if not inside:
            out[module] = own
            continue
        last = rest.partition(".")[2]
        name = f"{block}{inside}{'down' if last == 'down_proj' else 'gate_up'}_proj"
        for full, value in own.items():
            leaf = {"weight": "blocks", "weight_scale": "scales"}.get(full.rpartition(".")[2], "bias")
            rows = value.reshape(len(value), -1, 16) if leaf == "blocks" else value
            found.setdefault(f"{name}_{leaf}", []).append(rows)
    for name, each in found.items():
        pairs = [each[i : i + 2] for i in range(0, len(each), 2)] if "gate_up" in name else [[one] for one in each]
        out[name] = {name: np.stack([np.stack(pair, 1).reshape(-1, *pair[0].shape[1:]) for pair in pairs])}
    return out


def llama4_stacked(tensors: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """The experts of a layer in one tensor, transposed, with columns of gate before those of up."""
    out: dict[str, Tensors] = {}
    found: dict[str, list[Array]] = {}
    for module, own in tensors.items():
        block, inside, rest = module.partition(".experts.")
        if not inside:
            out[module] = own
            continue
        found.setdefault(f"{block}{inside}{rest.partition('.')[2]}", []).extend(own.values())
    for name in [name for name in found if name.endswith(".gate_proj")]:
        block = name.removesuffix("gate_proj")
        gate, up, down = (np.stack(found[f"{block}{part}_proj"]) for part in ("gate", "up", "down"))
        for last, value in (("gate_up_proj", np.concatenate([gate, up], 1)), ("down_proj", down)):
            out[f"{block}{last}"] = {f"{block}{last}": np.ascontiguousarray(value.transpose(0, 2, 1))}
    return out


def llama4(layers: int = 2) -> Skeleton:
    """Llama 4: experts in every other layer."""
    prefix = "language_model.model"
    parts = [*_ends(prefix, "language_model.lm_head")]
    for layer in range(layers):
        at = f"{prefix}.layers.{layer}"
        parts += [*_attention(f"{at}.self_attn"), *_norms(at)]
        if layer % 2 == 0:
            parts += _mlp(f"{at}.feed_forward")
            continue
        parts += [Part(f"{at}.feed_forward.router", (EXPERTS, HIDDEN))]
        parts += _mlp(f"{at}.feed_forward.shared_expert")
        parts += [part for expert in range(EXPERTS) for part in _mlp(f"{at}.feed_forward.experts.{expert}")]
    config = _sizes(layers, model_type="llama4_text", num_local_experts=EXPERTS, num_experts_per_tok=1)
    return Skeleton(parts, config, nested=True, layers=layers)


def step3(layers: int = 2) -> Skeleton:
    """Step-3.7: layers for multi-token prediction follow the others."""
    parts = [*_ends()]
    for layer in range(layers + 1):
        at = f"model.layers.{layer}"
        parts += [*_attention(f"{at}.self_attn", norms=True), *_norms(at)]
        parts += [Part(f"{at}.self_attn.g_proj", (4, HIDDEN))]
        if layer in (0, layers):
            parts += _mlp(f"{at}.mlp")
        else:
            parts += [Part(f"{at}.moe.gate", (EXPERTS, HIDDEN)), Part(f"{at}.moe.router_bias", (EXPERTS,), bare=True)]
            parts += [part for expert in range(EXPERTS) for part in _mlp(f"{at}.moe.experts.{expert}")]
            parts += _mlp(f"{at}.share_expert")
        if layer == layers:
            parts += [Part(f"{at}.eh_proj", (HIDDEN, 2 * HIDDEN))]
            parts += [Part(f"{at}.{norm}", (HIDDEN,)) for norm in ("enorm", "hnorm", "shared_head.norm")]
    config = _sizes(layers, model_type="step3p7", num_experts=EXPERTS, num_nextn_predict_layers=1, **_MOE)
    return Skeleton(parts, config | {"first_k_dense_replace": 1}, layers=layers)


# Checkpoints


def weight_of(name: str, shape: tuple[int, ...]) -> Array:
    """A module's weight in float32, with values that BF16 has exactly: near 1 for norms, else near 0."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32) / 16
    rounded = (1 + values if len(shape) == 1 and name.endswith("norm") else values).astype(ml_dtypes.bfloat16)
    exact: Array = rounded.astype(np.float32)
    return exact


@dataclass(frozen=True)
class Checkpoint:
    """A skeleton, with patterns of modules and their storage: the first match counts, and BF16 is for the others."""

    skeleton: Skeleton
    stored: Mapping[str, Storage] = field(default_factory=dict)
    kv_scales: Sequence[str] = ()
    """Names of KV cache scales in each attention, such as ``k_proj.k_scale``."""
    beside: Mapping[str, str] = field(default_factory=dict)
    """File -> pattern of its modules, which the index does not list."""
    stack: Callable[[Mapping[str, Tensors]], dict[str, Tensors]] = dict
    """Makes the tensors that are written of those of all modules."""
    edit: Callable[[Config], None] | None = None
    """Changes ``{"config": ..., "hf_quant_config": ...}`` in the size of the skeleton."""

    def storage(self, name: str) -> Storage:
        return next((storage for pattern, storage in self.stored.items() if fnmatchcase(name, pattern)), BF16)

    def unquantized(self) -> Checkpoint:
        """The same model in BF16."""
        return replace(self, stored={}, kv_scales=(), beside={}, stack=dict, edit=None)

    def tensors(self) -> dict[str, Tensors]:
        """Module -> its tensors by full name."""
        found = {}
        for part in self.skeleton.parts:
            weight, storage = weight_of(part.name, part.shape), self.storage(part.name)
            if part.bare and storage is BF16:
                found[part.name] = {part.name: weight.astype(ml_dtypes.bfloat16)}
                continue
            tensors = storage.store(weight)
            if part.bias:
                tensors["bias"] = np.zeros(part.shape[0], ml_dtypes.bfloat16)
            # Names of tensors without a module continue with the leaf, which is empty or begins with an underscore.
            found[part.name] = {
                part.name + (leaf if leaf[:1] in ("", "_") else f".{leaf}"): value for leaf, value in tensors.items()
            }
        for attention in self.attentions() if self.kv_scales else ():
            for scale in self.kv_scales:
                found.setdefault(f"{attention}.{scale}", {})[f"{attention}.{scale}"] = np.array(np.float32(0.5))
        return found

    def attentions(self) -> list[str]:
        """The attention modules of the model's layers, draft layers left out."""
        last = ("k_proj", "kv_a_proj_with_mqa")
        names = [part.name.rpartition(".") for part in self.skeleton.parts]
        return [parent for parent, _, leaf in names if leaf in last and not parent.startswith("mtp.")]

    def write(self, folder: Path, real: Mapping[str, Any] | None = None) -> Path:
        """Writes the checkpoint to ``folder``, with a release's configuration in its size; returns ``folder``."""
        folder.mkdir(parents=True)
        files = self.shrunk(real or {})
        for name, content in files.items():
            if content is not None:
                (folder / f"{name}.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        shards: dict[str, Tensors] = {}
        for module, tensors in self.stack(self.tensors()).items():
            own = (file for file, pattern in self.beside.items() if fnmatchcase(module, pattern))
            shards.setdefault(next(own, "model-00001-of-00001.safetensors"), {}).update(tensors)
        for file, held in shards.items():
            solid = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in held.items()}
            save_file(solid, folder / file, metadata={"format": "pt"})
        listed = {name: file for file, held in shards.items() if file not in self.beside for name in held}
        index = {"metadata": {}, "weight_map": listed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        return folder

    def shrunk(self, real: Mapping[str, Any]) -> Config:
        """``config.json`` and ``hf_quant_config.json`` of a release, with this skeleton's sizes."""
        text = json.dumps({key: value for key, value in real.items() if value is not None})
        if self.skeleton.draft is not None:
            text = re.sub(rf"\blayers\.{self.skeleton.draft}\b", f"layers.{self.skeleton.layers}", text)
        files: Config = json.loads(text)
        config: Config = files.setdefault("config", {})
        nested = self.skeleton.nested
        inner: Config = config.setdefault("text_config", {}) if nested else config
        before = inner.get("num_hidden_layers")
        for key, value in inner.items():
            if isinstance(value, list | str) and before is not None and len(value) == before:
                inner[key] = value[: self.skeleton.layers]
        words = {key: inner[key] for key in ("model_type", "architectures") if key in inner}
        inner |= {**self.skeleton.config, **words}
        if nested:
            outer = inner["model_type"].removesuffix("_text")
            config.setdefault("model_type", outer)
        if self.edit is not None:
            self.edit(files)
        return files
