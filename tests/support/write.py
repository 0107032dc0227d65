"""Small real checkpoints, written by the safetensors library.

    write_tiny(folder, LLAMA, "bf16")
    write_tiny(folder, QWEN3_MOE, "gptq_int4", group_size=64)
    write_tiny(folder, DEEPSEEK, "fp8_block", skip=["*.kv_b_proj"])

The fields of a :class:`Tiny` determine its weights, so that all variants are of the same model: norms, routers,
embeddings and biases are equal, and linears are rounded to nearest. Sizes are multiples of what SGLang's kernels
require, and no linear is square by accident, so that a transposed one is noticed.

``edit`` gets the tensors and ``config.json`` before they are written, for tests of broken checkpoints.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file

from support import formats

__all__ = [
    "DEEPSEEK",
    "LLAMA",
    "QWEN3_MOE",
    "VARIANTS",
    "Config",
    "Tensors",
    "Tiny",
    "folded_factors",
    "tiny_tensors",
    "write_tiny",
]

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
Config = dict[str, Any]

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


# Models


@dataclass(frozen=True)
class Tiny:
    """A model. ``family`` is its ``model_type``; another ``seed`` makes a fine-tune of the same model."""

    family: str
    layers: int = 2
    hidden: int = 128
    intermediate: int = 256
    experts: int = 4
    vocab: int = 384
    tied: bool = False
    kv_heads: int = 2
    attention_bias: bool = False
    mtp: int = 0
    """The number of layers for multi-token prediction, after the last one (DeepSeek)."""
    gain: float = 1.0
    """The standard deviation of linears' weights, a power of two; with 1/16, logits differ enough to be compared."""
    seed: int = 0


LLAMA = Tiny("llama")
QWEN3_MOE = Tiny("qwen3_moe")
DEEPSEEK = Tiny("deepseek_v3")

# Attention: queries [256, hidden], keys and values [64 kv_heads, hidden]; DeepSeek's through ranks of 128.
_HEADS, _HEAD_DIM = 4, 64
_RANK, _ROPE, _NOPE, _VALUE = 128, 64, 64, 128


class _Module(NamedTuple):
    name: str
    shape: tuple[int, ...]
    linear: bool = False
    bias: bool = False


def _modules(model: Tiny) -> Iterator[_Module]:
    """Yields every module in the order of the state dict; quantizers quantize those with ``linear`` set."""
    deepseek = model.family.startswith("deepseek")
    yield _Module("model.embed_tokens", (model.vocab, model.hidden))
    for layer in range(model.layers + model.mtp):
        prefix = f"model.layers.{layer}"
        if layer >= model.layers:
            yield _Module(f"{prefix}.eh_proj", (model.hidden, 2 * model.hidden))
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield _Module(f"{prefix}.{norm}", (model.hidden,))
            yield _Module(f"{prefix}.shared_head.head", (model.vocab, model.hidden))
        attention = _latent_attention if deepseek else _attention
        yield from attention(model, f"{prefix}.self_attn")
        if not (deepseek or model.family.endswith("_moe")) or (deepseek and layer == 0):
            yield from _mlp(f"{prefix}.mlp", model.hidden, model.intermediate)
        else:
            yield _Module(f"{prefix}.mlp.gate", (model.experts, model.hidden))
            if deepseek:
                yield from _mlp(f"{prefix}.mlp.shared_experts", model.hidden, model.intermediate)
            for expert in range(model.experts):
                yield from _mlp(f"{prefix}.mlp.experts.{expert}", model.hidden, model.intermediate)
        yield _Module(f"{prefix}.input_layernorm", (model.hidden,))
        yield _Module(f"{prefix}.post_attention_layernorm", (model.hidden,))
    yield _Module("model.norm", (model.hidden,))
    if not model.tied:
        yield _Module("lm_head", (model.vocab, model.hidden))


def _mlp(prefix: str, hidden: int, intermediate: int) -> Iterator[_Module]:
    yield _Module(f"{prefix}.gate_proj", (intermediate, hidden), linear=True)
    yield _Module(f"{prefix}.up_proj", (intermediate, hidden), linear=True)
    yield _Module(f"{prefix}.down_proj", (hidden, intermediate), linear=True)


def _attention(model: Tiny, prefix: str) -> Iterator[_Module]:
    queries, keys = _HEADS * _HEAD_DIM, model.kv_heads * _HEAD_DIM
    for name, outputs in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        yield _Module(f"{prefix}.{name}", (outputs, model.hidden), linear=True, bias=model.attention_bias)
    yield _Module(f"{prefix}.o_proj", (model.hidden, queries), linear=True)
    if model.family == "qwen3_moe":
        yield _Module(f"{prefix}.q_norm", (_HEAD_DIM,))
        yield _Module(f"{prefix}.k_norm", (_HEAD_DIM,))


def _latent_attention(model: Tiny, prefix: str) -> Iterator[_Module]:
    """As in DeepSeek-V3, kv_a_proj_with_mqa [192, hidden] ends inside a block of 128."""
    yield _Module(f"{prefix}.q_a_proj", (_RANK, model.hidden), linear=True)
    yield _Module(f"{prefix}.q_a_layernorm", (_RANK,))
    yield _Module(f"{prefix}.q_b_proj", (_HEADS * (_NOPE + _ROPE), _RANK), linear=True)
    yield _Module(f"{prefix}.kv_a_proj_with_mqa", (_RANK + _ROPE, model.hidden), linear=True)
    yield _Module(f"{prefix}.kv_a_layernorm", (_RANK,))
    yield _Module(f"{prefix}.kv_b_proj", (_HEADS * (_NOPE + _VALUE), _RANK), linear=True)
    yield _Module(f"{prefix}.o_proj", (model.hidden, _HEADS * _VALUE), linear=True)


def _config(model: Tiny) -> Config:
    config: Config = {
        "model_type": model.family,
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_attention_heads": _HEADS,
        "num_hidden_layers": model.layers,
        "num_key_value_heads": model.kv_heads,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": model.tied,
        "vocab_size": model.vocab,
    }
    if model.family == "qwen3_moe":
        config |= {"num_experts": model.experts, "num_experts_per_tok": 2, "moe_intermediate_size": model.intermediate}
    if model.family.startswith("deepseek"):
        config |= {"n_routed_experts": model.experts, "first_k_dense_replace": 1, "n_shared_experts": 1}
        config |= {"q_lora_rank": _RANK, "kv_lora_rank": _RANK, "num_nextn_predict_layers": model.mtp}
        config |= {"qk_nope_head_dim": _NOPE, "qk_rope_head_dim": _ROPE, "v_head_dim": _VALUE}
    else:
        config["head_dim"] = _HEAD_DIM
    return config


def _weight(model: Tiny, module: _Module) -> Array:
    """The module's weight in float32, with values that BF16 has exactly; the same for every variant."""
    rng = np.random.default_rng([model.seed, zlib.crc32(module.name.encode())])
    values = rng.standard_normal(module.shape, dtype=np.float32)
    if len(module.shape) == 1:
        values = 1 + values / 8
    elif module.linear:
        values *= np.float32(model.gain)
    return values.astype(BF16).astype(np.float32)


# Activation scales folded into preceding weights


def _folded(model: Tiny, spread: float) -> dict[str, Array]:
    """The weights after AutoAWQ's ``scale_ln_fcs`` and ``scale_fc_fc``: the same function of other weights.

    ``spread`` is the standard deviation of the scales' logarithms.
    """
    weights = {module.name: _weight(model, module) for module in _modules(model)}
    linears = {module.name for module in _modules(model) if module.linear}

    def fold(before: str, after: Iterable[str]) -> None:
        rng = np.random.default_rng([model.seed, zlib.crc32(before.encode()), 1])
        scales = np.exp(spread * rng.standard_normal(len(weights[before]))).astype(np.float32)
        weights[before] = (weights[before].T / scales).T
        for name in after:
            weights[name] = weights[name] * scales

    for layer in range(model.layers):
        prefix = f"model.layers.{layer}."
        mine = [name for name in weights if name.startswith(prefix)]
        fold(f"{prefix}input_layernorm", [n for n in mine if n.endswith(("q_proj", "k_proj", "v_proj"))])
        fold(f"{prefix}post_attention_layernorm", [n for n in mine if n.endswith(("gate_proj", "up_proj", "mlp.gate"))])
        for name in mine:
            if name.endswith("up_proj"):
                fold(name, [name.replace("up_proj", "down_proj")])
        value, out = f"{prefix}self_attn.v_proj", f"{prefix}self_attn.o_proj"
        if {value, out} <= linears and weights[value].shape == weights[out].shape:
            fold(value, [out])
    return weights


def folded_factors(model: Tiny, spread: float) -> dict[str, Array]:
    """Module -> the factors of its weight's values, where scales were folded."""
    before = {module.name: _weight(model, module) for module in _modules(model)}
    return {name: weight / before[name] for name, weight in _folded(model, spread).items()}


# Variants


def _dense(dtype: npt.DTypeLike, weight: Array) -> Tensors:
    return {"weight": weight.astype(dtype)}


def _as_arrays(weight: Array, packer: Callable[..., dict[str, torch.Tensor]], **options: Any) -> Tensors:
    """The tensors of a packer of :mod:`support.formats`, as arrays."""
    tensors = packer(torch.from_numpy(np.ascontiguousarray(weight, np.float32)), **options)
    return {leaf: _as_array(tensor) for leaf, tensor in tensors.items()}


def _as_array(tensor: torch.Tensor) -> Array:
    # NumPy has no dtype of its own for these two.
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(BF16)
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(FP8)
    array: Array = tensor.numpy()
    return array


def _fp8_block(weight: Array, block: tuple[int, int] = (128, 128), activations: str = "dynamic") -> Tensors:
    return _as_arrays(weight, formats.fp8_block, block=block)


def _fp8_channel(weight: Array, activations: str = "dynamic") -> Tensors:
    return _as_arrays(weight, formats.fp8_channel, scale_dtype=torch.bfloat16) | _input_scale(activations)


def _fp8_tensor(weight: Array, activations: str = "dynamic", scale: float | None = 1 / 64) -> Tensors:
    """``scale`` is common to all modules, as in checkpoints that fuse gate and up; None computes one for each."""
    return _as_arrays(weight, formats.fp8_tensor, scale=scale) | _input_scale(activations)


def _input_scale(activations: str) -> Tensors:
    return {"input_scale": np.array(np.float32(0.25))} if activations == "static" else {}


def _gptq_int4(
    weight: Array,
    group_size: int = 128,
    sym: bool = True,
    desc_act: bool = False,
    layout: str = "gptq",
    zero_bias: bool = False,
) -> Tensors:
    n, k = weight.shape
    g_idx = None
    if desc_act:
        # One order for all linears of a width, since fused ones share their input.
        groups = np.arange(k, dtype=np.int32) // (k if group_size == -1 else group_size)
        g_idx = torch.from_numpy(np.random.default_rng(k).permutation(groups))
    made = _as_arrays(weight, formats.gptq, group_size=group_size, sym=sym, g_idx=g_idx, layout=layout)
    tensors = dict(sorted(made.items()))
    return tensors | ({"bias": np.zeros(n, np.float16)} if zero_bias else {})


def _awq_int4(weight: Array, group_size: int = 128) -> Tensors:
    return _as_arrays(weight, formats.awq, group_size=group_size)


def _ct_int4(weight: Array, group_size: int = 128) -> Tensors:
    return _as_arrays(weight, formats.packed, group_size=group_size)


def _nvfp4(weight: Array, scale: float | None = 1 / 1024, activations: bool = True) -> Tensors:
    """``scale``, the same for all that is fused, or (None) each weight's own."""
    return _as_arrays(weight, formats.nvfp4, scale=scale, activations=0.01 if activations else None)


def _ct_nvfp4(weight: Array, scale: float | None = 1 / 1024, activations: bool = True) -> Tensors:
    return _as_arrays(weight, formats.nvfp4_compressed, scale=scale, activations=0.01 if activations else None)


def _compressed_config(activations: str = "dynamic", **_: object) -> Config:
    return {"quant_method": "compressed-tensors", "format": "float-quantized"}


def _fp8_tensor_config(activations: str = "dynamic", **_: object) -> Config:
    return formats.fp8_config(None, activations)


def _gptq_config(
    group_size: int = 128, sym: bool = True, desc_act: bool = False, layout: str = "gptq", **_: object
) -> Config:
    return formats.gptq_config(group_size=group_size, sym=sym, desc_act=desc_act, layout=layout)


def _ct_config(group_size: int = 128) -> Config:
    return formats.packed_config(group_size=group_size, ignore="re:.*\\.mlp\\.gate$")


class _Variant(NamedTuple):
    """A packer of linears, the ``quantization_config``, and the dtype of unquantized tensors."""

    store: Callable[..., Tensors]
    config: Callable[..., Config] | None
    dense: np.dtype[Any]


VARIANTS: Mapping[str, _Variant] = {
    "bf16": _Variant(lambda weight: _dense(BF16, weight), None, BF16),
    "fp16": _Variant(lambda weight: _dense(np.float16, weight), None, np.dtype(np.float16)),
    "fp8_block": _Variant(_fp8_block, formats.fp8_config, BF16),
    "fp8_channel": _Variant(_fp8_channel, _compressed_config, BF16),
    "fp8_tensor": _Variant(_fp8_tensor, _fp8_tensor_config, BF16),
    "gptq_int4": _Variant(_gptq_int4, _gptq_config, np.dtype(np.float16)),
    "awq_int4": _Variant(_awq_int4, formats.awq_config, np.dtype(np.float16)),
    "ct_int4": _Variant(_ct_int4, _ct_config, BF16),
    "nvfp4": _Variant(_nvfp4, formats.nvfp4_config, BF16),
    "ct_nvfp4": _Variant(_ct_nvfp4, formats.nvfp4_compressed_config, BF16),
}


# Checkpoints


def tiny_tensors(
    model: Tiny, variant: str, *, also: Iterable[str] = (), skip: Iterable[str] = (), fold: float = 0, **options: Any
) -> Tensors:
    """Every tensor of ``model`` in ``variant``.

    ``also`` and ``skip`` are patterns of modules to quantize besides the linears, and of linears not to quantize.
    ``fold`` is the spread of scales that are folded into preceding norms and linears, as by AWQ.
    ``options`` are the variant's: ``block``, ``activations``, ``scale``, ``group_size``, ``sym``, ``desc_act``,
    ``layout``, ``zero_bias``.
    """
    chosen = VARIANTS[variant]
    tensors: Tensors = {}
    weights = _folded(model, fold) if fold else {}
    for module in _modules(model):
        weight = weights[module.name] if fold else _weight(model, module)
        quantized = module.linear or any(fnmatchcase(module.name, pattern) for pattern in also)
        if not quantized or any(fnmatchcase(module.name, pattern) for pattern in skip):
            stored = _dense(chosen.dense, weight)
        else:
            stored = chosen.store(weight, **options)
        if module.bias:
            stored["bias"] = weight[:, 0].astype(chosen.dense)
        tensors |= {f"{module.name}.{leaf}": tensor for leaf, tensor in stored.items()}
    return tensors


def write_tiny(
    folder: Path,
    model: Tiny,
    variant: str,
    *,
    edit: Callable[[Tensors, Config], None] | None = None,
    shards: int = 1,
    **options: Any,
) -> Path:
    """Writes a checkpoint to the new ``folder``; returns ``folder``. ``options`` as for :func:`tiny_tensors`."""
    tensors = tiny_tensors(model, variant, **options)
    config = _config(model)
    describe = VARIANTS[variant].config
    if describe is not None:
        config["quantization_config"] = describe(
            **{k: v for k, v in options.items() if k not in ("also", "skip", "fold")}
        )
    if edit is not None:
        edit(tensors, config)
    folder.mkdir(parents=True)
    _write_weights(folder, tensors, shards)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"do_sample": False})
    _write_json(folder / "tokenizer_config.json", {"model_max_length": 512})
    return folder


def _write_weights(folder: Path, tensors: Tensors, shards: int) -> None:
    # save_file ignores strides: a transposed view would be written in the wrong order.
    tensors = {name: np.ascontiguousarray(value).reshape(value.shape) for name, value in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    each = -(-len(tensors) // shards)
    names = list(tensors)
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number * each : (number + 1) * each]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(value.nbytes for value in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, content: Config) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
