"""A packer for each format: a weight ``[N, K]`` in float32 -> the tensors that it is stored as, by leaf.

    tensors = gptq(weight, bits=4, group_size=128)      # {"qweight": ..., "qzeros": ..., "scales": ..., "g_idx": ...}
    weight = dequantize(tensors)                        # [N, K], in float32

Values are rounded to nearest, not chosen as by the format's own quantizer; only the layout is real. Written with torch
and without the code under test, on the device of the weight. ``*_config`` functions make the ``quantization_config``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = [
    "awq", "awq_config", "compressed_config", "dense", "dequantize", "fp8_block", "fp8_channel", "fp8_config",
    "fp8_exponents", "fp8_tensor", "gptq", "gptq_config", "int8_block", "int8_channel", "mxfp4", "mxfp4_config",
    "nvfp4", "nvfp4_compressed", "nvfp4_compressed_config", "nvfp4_config", "packed", "packed_config",
    "w4afp8",
]  # fmt: skip

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


def dense(weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """BF16, FP16 or FP32."""
    return {"weight": weight.to(dtype)}


# FP8 and Int8


def _to_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def _to_int8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.round(weight / scale).clamp(-127, 127).to(torch.int8)


def _in_blocks(
    weight: torch.Tensor, block: tuple[int, int], most: int, to: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> Tensors:
    """``weight_scale_inv`` ``[ceil(N / block[0]), ceil(K / block[1])]``: the last blocks may be smaller."""
    (n, k), (rows, columns) = weight.shape, block
    filled = torch.nn.functional.pad(weight, (0, -k % columns, 0, -n % rows))
    blocks = filled.view(filled.shape[0] // rows, rows, filled.shape[1] // columns, columns)
    scale = blocks.abs().amax((1, 3)).clamp(min=1e-8) / most
    full = scale.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
    return {"weight": to(weight, full), "weight_scale_inv": scale}


def _by_channel(weight: torch.Tensor, most: int, dtype: torch.dtype) -> torch.Tensor:
    """``[N, 1]``."""
    return (weight.abs().amax(1, keepdim=True).clamp(min=1e-8) / most).to(dtype)


def fp8_block(weight: torch.Tensor, *, block: tuple[int, int] = (128, 128)) -> Tensors:
    """FP8 (E4M3) with a scale for each block, as DeepSeek and Qwen release it."""
    return _in_blocks(weight, block, 448, _to_fp8)


def fp8_exponents(
    weight: torch.Tensor,
    *,
    block: tuple[int, int] = (128, 128),
    leaf: str = "weight_scale_inv",
    dtype: str = "float8_e8m0fnu",
) -> Tensors:
    """FP8 with a power of two for each block, in E8M0, in bytes or in float32; DeepSeek-V4 names them ``scale``."""

    def rounded_up(scale: torch.Tensor) -> torch.Tensor:
        return torch.exp2(torch.ceil(torch.log2(scale)))

    tensors = _in_blocks(weight, block, 448, lambda values, scale: _to_fp8(values, rounded_up(scale)))
    scale = rounded_up(tensors["weight_scale_inv"])
    if dtype != "float32":
        scale = (torch.log2(scale) + 127).to(torch.uint8).view(getattr(torch, dtype))
    return {"weight": tensors["weight"], leaf: scale}


def fp8_channel(weight: torch.Tensor, *, scale_dtype: torch.dtype = torch.float32) -> Tensors:
    """FP8 with a scale for each output."""
    scale = _by_channel(weight, 448, scale_dtype)
    return {"weight": _to_fp8(weight, scale.float()), "weight_scale": scale}


def fp8_tensor(weight: torch.Tensor, *, scale: float | None) -> Tensors:
    """FP8 with one scale: ``scale``, as in checkpoints that fuse gate and up, or computed from the weight for None."""
    one = weight.abs().amax() / 448 if scale is None else torch.tensor(scale, device=weight.device)
    return {"weight": _to_fp8(weight, one), "weight_scale": one}


def int8_block(weight: torch.Tensor) -> Tensors:
    """Int8 with a scale for each block of 128 x 128."""
    return _in_blocks(weight, (128, 128), 127, _to_int8)


def int8_channel(weight: torch.Tensor) -> Tensors:
    """Int8 with a scale for each output."""
    scale = _by_channel(weight, 127, torch.float32)
    return {"weight": _to_int8(weight, scale), "weight_scale": scale}


def w4afp8(weight: torch.Tensor, *, activations: float = 0.25, dtype: torch.dtype = torch.float32) -> Tensors:
    """Signed 4-bit integers in groups of 128, two a byte, as TensorRT-LLM packs experts; the scale of their inputs."""
    n, k = weight.shape
    scale = (weight.reshape(n, k // 128, 128).abs().amax(2) / 7).clamp(min=1e-8).to(dtype)
    q = torch.round(weight / scale.float().repeat_interleave(128, 1)).clamp(-8, 7).to(torch.int8)
    packed = (q[:, ::2] & 15) | (q[:, 1::2] << 4)
    return {"weight": packed, "weight_scale_inv": scale, "input_scale": torch.full((1,), activations, device=q.device)}


def fp8_config(block: tuple[int, int] | None = (128, 128), activations: str = "dynamic") -> Config:
    """The config of ``fp8_block``; without ``block``, of ``fp8_tensor``."""
    config: Config = {"quant_method": "fp8", "activation_scheme": activations}
    return config if block is None else {**config, "weight_block_size": list(block)}


def compressed_config(strategy: str, kind: str = "float") -> Config:
    """The config of ``fp8_channel`` or, with ``kind="int"``, ``int8_channel``, as compressed-tensors writes it."""
    weights = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, "dynamic": False}
    inputs = {"num_bits": 8, "type": kind, "strategy": "token", "symmetric": True, "dynamic": True}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        "ignore": ["lm_head", "re:.*\\.gate$"],
    }


# Integers in 32-bit words


def gptq(
    weight: torch.Tensor,
    *,
    bits: int = 4,
    group_size: int = 128,
    sym: bool = True,
    g_idx: torch.Tensor | None = None,
    layout: str = "gptq",
) -> Tensors:
    """AutoGPTQ's layout: along inputs, lowest bits first; ``group_size`` -1 is one group.

    ``g_idx [K]`` is the group of each input; None for inputs in order. Zero points are stored minus one in ``layout``
    ``gptq``, as they are in ``gptq_v2``.
    """
    n, k = weight.shape
    size = k if group_size == -1 else group_size
    groups, middle, most = -(-k // size), 1 << (bits - 1), (1 << bits) - 1
    group = (torch.arange(k, device=weight.device) // size) if g_idx is None else g_idx.to(weight.device).long()
    inputs = weight.t()
    if sym:
        scales = (_per_group(inputs.abs(), group, groups, "amax") / (middle - 1)).clamp(min=1e-6).half()
        zeros = torch.full((groups, n), middle, device=weight.device)
    else:
        low, high = (_per_group(inputs, group, groups, which) for which in ("amin", "amax"))
        scales = ((high - low) / most).half()
        zeros = torch.round(-low / scales.float()).clamp(0, most).long()
    q = (torch.round(inputs / scales.float()[group]) + zeros[group]).clamp(0, most)
    return {
        "qweight": _words(q.t(), bits).t().contiguous(),
        "qzeros": _words((zeros - int(layout == "gptq")) & most, bits),
        "scales": scales,
        "g_idx": group.int(),
    }


def _per_group(inputs: torch.Tensor, group: torch.Tensor, groups: int, which: str) -> torch.Tensor:
    """``[K, N]`` -> the largest (``amax``) or least (``amin``) of each group of inputs, ``[G, N]``."""
    out = torch.empty(groups, inputs.shape[1], dtype=inputs.dtype, device=inputs.device)
    return out.scatter_reduce(0, group[:, None].expand_as(inputs), inputs, which, include_self=False)


def gptq_config(
    bits: int = 4, group_size: int = 128, *, sym: bool = True, desc_act: bool = False, layout: str | None = None
) -> Config:
    """The config; ``layout``, as GPTQModel writes it, is left out where None."""
    config: Config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": sym, "desc_act": desc_act}
    return config if layout is None else {**config, "checkpoint_format": layout}


# The order of eight outputs in a word of AWQ, from the lowest bits.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def awq(weight: torch.Tensor, *, group_size: int = 128) -> Tensors:
    """AutoAWQ's layout (gemm): along outputs, with zero points."""
    n, k = weight.shape
    grouped = weight.t().reshape(k // group_size, group_size, n)
    low, high = grouped.amin(1).clamp(max=0), grouped.amax(1).clamp(min=0)
    scales = ((high - low) / 15).clamp(min=1e-6).half()
    zeros = torch.round(-low / scales.float()).clamp(0, 15)
    q = (torch.round(grouped / scales.float()[:, None]) + zeros[:, None]).clamp(0, 15).reshape(k, n)
    return {"qweight": _awq_words(q), "qzeros": _awq_words(zeros), "scales": scales}


def _awq_words(values: torch.Tensor) -> torch.Tensor:
    return _words(values.reshape(len(values), -1, 8)[..., list(_AWQ_ORDER)].flatten(1), 4)


def awq_config(group_size: int = 128) -> Config:
    return {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}


def packed(
    weight: torch.Tensor, *, bits: int = 4, group_size: int = 128, sym: bool = True, g_idx: torch.Tensor | None = None
) -> Tensors:
    """compressed-tensors' ``pack-quantized``: along inputs, offset by half the range; ``group_size`` -1 is one group.

    ``g_idx [K]`` is the group of each input, stored as ``weight_g_idx``; None for inputs in order.
    """
    n, k = weight.shape
    size, middle = k if group_size == -1 else group_size, 1 << (bits - 1)
    group = (torch.arange(k, device=weight.device) // size) if g_idx is None else g_idx.to(weight.device).long()
    grouped = weight[:, group.argsort(stable=True)].reshape(n, k // size, size)
    if sym:
        scale = (grouped.abs().amax(2) / (middle - 1)).clamp(min=1e-6).bfloat16()
        zeros = torch.zeros_like(scale, dtype=torch.float32)
    else:
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        scale = ((high - low) / (2 * middle - 1)).clamp(min=1e-6).bfloat16()
        zeros = (torch.round(-low / scale.float()) - middle).clamp(-middle, middle - 1)
    q = torch.round(weight / scale.float()[:, group]) + zeros[:, group]
    tensors = {
        "weight_packed": _words(q.clamp(-middle, middle - 1) + middle, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([n, k]),
    }
    if not sym:
        tensors["weight_zero_point"] = _words((zeros + middle).t(), bits).t().contiguous()
    return tensors if g_idx is None else {**tensors, "weight_g_idx": group.int()}


def packed_config(
    bits: int = 4, group_size: int = 128, *, sym: bool = True, act: bool = False, ignore: str = "re:.*\\.gate$"
) -> Config:
    weights: Config = {"num_bits": bits, "type": "int", "symmetric": sym, "dynamic": False}
    weights |= {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    if act:
        weights["actorder"] = "group"
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        "ignore": ["lm_head", ignore],
    }


def _words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """``[R, C]`` values -> ``[R, C * bits / 32]`` words in int32, lowest bits first."""
    parts = values.to(torch.int64).reshape(len(values), -1, 32 // bits)
    words = (parts << torch.arange(0, 32, bits, device=values.device)).sum(2)
    # As int32, words whose highest bit is set are negative.
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


# 4-bit floats

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def nvfp4(weight: torch.Tensor, *, scale: float | None = None, activations: float | None = 0.01) -> Tensors:
    """ModelOpt's: two values a byte, E4M3 scales of 16 inputs, and ``scale`` of all, the weight's own where it is None.

    ``activations`` is the scale of the inputs; None for weights alone.
    """
    groups = weight.reshape(len(weight), -1, 16)
    largest = groups.abs().amax(2)
    of_all = largest.amax() / (6 * 448) if scale is None else torch.tensor(scale, device=weight.device)
    scales = (largest / 6 / of_all).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    tensors = {"weight": _pairs(groups / (scales.float() * of_all)[..., None]), "weight_scale": scales}
    tensors["weight_scale_2"] = of_all.float()
    inputs = {} if activations is None else {"input_scale": torch.tensor(activations)}
    return tensors | inputs


def _pairs(values: torch.Tensor) -> torch.Tensor:
    """Values in groups ``[N, G, size]``, rounded to E2M1, two in a byte ``[N, K / 2]``."""
    levels = torch.tensor(_E2M1, device=values.device)
    codes = torch.bucketize(values.abs(), (levels[1:] + levels[:-1]) / 2) | (values < 0).long() << 3
    codes = codes.flatten(1)
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)


def _from_pairs(codes: torch.Tensor, size: int) -> torch.Tensor:
    """The values ``[N, G, size]`` of :func:`_pairs`."""
    codes = codes.view(torch.uint8)
    levels = torch.tensor([*_E2M1, *(-level for level in _E2M1)], device=codes.device)
    return levels[torch.stack([codes & 15, codes >> 4], -1).long()].reshape(len(codes), -1, size)


_MXFP4_LAYOUTS = {
    "quark": ("weight", torch.uint8, "weight_scale", torch.uint8),
    "compressed-tensors": ("weight_packed", torch.uint8, "weight_scale", torch.uint8),
    "deepseek": ("weight", torch.int8, "scale", torch.float8_e8m0fnu),
}


def mxfp4(weight: torch.Tensor, *, layout: str = "quark") -> Tensors:
    """Two values a byte, and for 32 inputs the power of two with which the largest has the exponent of 4 or less."""
    groups = weight.reshape(len(weight), -1, 32)
    exponents = groups.abs().amax(2).clamp(min=2.0**-100).log2().floor() - 2
    values, values_dtype, scales, scales_dtype = _MXFP4_LAYOUTS[layout]
    pairs, codes = _pairs(groups / exponents.exp2()[..., None]), (exponents + 127).to(torch.uint8)
    return {values: pairs.view(values_dtype), scales: codes.view(scales_dtype)}


def mxfp4_config(layout: str = "quark") -> Config:
    if layout == "deepseek":
        return fp8_config()
    if layout == "quark":
        weight = {"dtype": "fp4", "is_dynamic": False, "qscheme": "per_group", "group_size": 32, "scale_format": "e8m0"}
        config = {"weight": weight, "input_tensors": {**weight, "is_dynamic": True}}
        return {
            "quant_method": "quark", "global_quant_config": config, "layer_quant_config": {}, "algo_config": None,
            "exclude": ["lm_head", "re:.*\\.gate$"], "export": {"pack_method": "reorder"},
        }  # fmt: skip
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    group = {"targets": ["Linear"], "weights": {**weights, "dynamic": False}, "input_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head", "re:.*\\.gate$"],
    }  # fmt: skip


def nvfp4_compressed(weight: torch.Tensor, **options: Any) -> Tensors:
    """compressed-tensors': what :func:`nvfp4` makes, by other names, with one over its scales of all."""
    made = nvfp4(weight, **options)
    tensors = {"weight_packed": made["weight"], "weight_scale": made["weight_scale"]}
    tensors["weight_global_scale"] = 1 / made["weight_scale_2"].reshape(1)
    return tensors | ({"input_global_scale": 1 / made["input_scale"].reshape(1)} if "input_scale" in made else {})


def nvfp4_config(**_: Any) -> Config:
    return {
        "quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": ["lm_head", "*mlp.gate"],
        "kv_cache_scheme": None, "producer": {"name": "modelopt", "version": "0.47.0"},
    }  # fmt: skip


def nvfp4_compressed_config(activations: bool = True, **_: Any) -> Config:
    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    inputs = {**weights, "dynamic": "local"} if activations else None
    group = {"targets": ["Linear"], "weights": {**weights, "dynamic": False}, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group}, "ignore": ["lm_head", "re:.*\\.gate$"],
    }  # fmt: skip


# Dequantization


def dequantize(tensors: Tensors, scales: torch.dtype = torch.float32) -> torch.Tensor:
    """The dequantized weight ``[N, K]`` of a module's tensors, in float32.

    Scales of packed weights are first rounded to the dtype ``scales``, as SGLang does to the model's.
    """
    if "qweight" in tensors:
        factors = tensors["scales"].to(scales).float()
        if tensors["qweight"].shape[1] != factors.shape[1]:  # AWQ packs along outputs
            q, zeros = _awq_values(tensors["qweight"]), _awq_values(tensors["qzeros"])
            size = len(q) // len(zeros)
            return ((q - zeros.repeat_interleave(size, 0)) * factors.repeat_interleave(size, 0)).t().contiguous()
        bits = 32 * tensors["qzeros"].shape[1] // factors.shape[1]
        q = _values(tensors["qweight"].t(), bits).t()
        in_order = torch.arange(len(q), device=q.device) // (len(q) // len(factors))
        group = tensors.get("g_idx", in_order).long()
        return (q * factors[group]).t().contiguous()
    scale = tensors.get("weight_scale", tensors.get("scale", torch.empty(0)))
    codes = tensors.get("weight", tensors.get("weight_packed", torch.empty(0)))
    if codes.dtype in (torch.uint8, torch.int8) and scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        powers = (scale.view(torch.uint8).float() - 127).exp2()
        return (_from_pairs(codes, 32) * powers[..., None]).flatten(1)
    if codes.dtype == torch.uint8:
        of_all = tensors["weight_scale_2"] if "weight" in tensors else 1 / tensors["weight_global_scale"]
        return (_from_pairs(codes, 16) * (tensors["weight_scale"].float() * of_all)[..., None]).flatten(1)
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
    if tensors["weight"].dtype == torch.int8 and "input_scale" in tensors:  # two 4-bit values a byte
        pairs = torch.stack([(tensors["weight"] << 4) >> 4, tensors["weight"] >> 4], -1)
        return pairs.flatten(1).float() * tensors["weight_scale_inv"].to(scales).float().repeat_interleave(128, 1)
    weight = tensors["weight"].float()
    scale = tensors.get("weight_scale_inv", tensors.get("weight_scale", tensors.get("scale")))
    if scale is None:
        return weight
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        scale = torch.exp2(scale.view(torch.uint8).float() - 127)
    if scale.dim() == 2 and len(scale) < len(weight):
        # Blocks are powers of two, of which the last may be partial.
        for dim, size in enumerate(weight.shape):
            block = 1 << (-(-size // scale.shape[dim]) - 1).bit_length()
            scale = scale.repeat_interleave(block, dim).narrow(dim, 0, size)
    return weight * scale


def _awq_values(words: torch.Tensor) -> torch.Tensor:
    out = torch.empty(*words.shape, 8, dtype=torch.float32, device=words.device)
    for place, output in enumerate(_AWQ_ORDER):
        out[..., output] = (words >> (4 * place)) & 15
    return out.flatten(1)


def _values(words: torch.Tensor, bits: int) -> torch.Tensor:
    """``[R, C]`` words, lowest bits first -> ``[R, C * 32 / bits]`` values around 0."""
    shifts = torch.arange(0, 32, bits, device=words.device)
    values = (words.long()[:, :, None] >> shifts) & ((1 << bits) - 1)
    return values.flatten(1).float() - (1 << (bits - 1))
