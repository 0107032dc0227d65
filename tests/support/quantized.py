"""One set of linears stored in every format that is read, each a checkpoint of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file

from support import formats
from support.formats import Config, Tensors

__all__ = ["VARIANTS", "write_linears"]

_AUTO_ROUND: Config = {
    "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": 4, "group_size": 128, "sym": True,
    "data_type": "int",
}  # fmt: skip


def _order(weight: torch.Tensor) -> torch.Tensor:
    """The group of each input, of 128 that may be anywhere."""
    return torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1)) // 128


VARIANTS: Mapping[str, tuple[Callable[[torch.Tensor], Tensors], Config | None]] = {
    "BF16": (formats.dense, None),
    "FP16": (partial(formats.dense, dtype=torch.float16), None),
    "FP32": (partial(formats.dense, dtype=torch.float32), None),
    "FP8, blocks": (formats.fp8_block, formats.fp8_config()),
    "FP8, blocks, powers of two": (formats.fp8_exponents, formats.fp8_config()),
    "FP8, channels": (formats.fp8_channel, formats.compressed_config("channel")),
    "FP8, tensor": (partial(formats.fp8_tensor, scale=None), formats.fp8_config(None)),
    "Int8, channels": (formats.int8_channel, formats.compressed_config("channel", "int")),
    "Int8, blocks": (formats.int8_block, {"quant_method": "blockwise_int8", "weight_block_size": [128, 128]}),
    "GPTQ": (formats.gptq, formats.gptq_config()),
    "GPTQ, zero points": (partial(formats.gptq, sym=False), formats.gptq_config(sym=False)),
    "GPTQ, act-order": (lambda weight: formats.gptq(weight, g_idx=_order(weight)), formats.gptq_config(desc_act=True)),
    "GPTQ, 8 bit": (partial(formats.gptq, bits=8), formats.gptq_config(bits=8)),
    "AutoRound": (formats.gptq, _AUTO_ROUND),
    "AWQ": (formats.awq, formats.awq_config()),
    "compressed-tensors Int4": (formats.packed, formats.packed_config()),
    "compressed-tensors Int4, zero points": (partial(formats.packed, sym=False), formats.packed_config(sym=False)),
    "compressed-tensors Int4, act-order": (
        lambda weight: formats.packed(weight, g_idx=_order(weight)),
        formats.packed_config(act=True),
    ),
    "compressed-tensors Int8": (partial(formats.packed, bits=8), formats.packed_config(8)),
    "NVFP4": (formats.nvfp4, formats.nvfp4_config()),
    "NVFP4, compressed-tensors": (formats.nvfp4_compressed, formats.nvfp4_compressed_config()),
    "MXFP4": (formats.mxfp4, formats.mxfp4_config()),
    "MXFP4, DeepSeek": (partial(formats.mxfp4, layout="deepseek"), formats.mxfp4_config("deepseek")),
    "W4AFP8": (formats.w4afp8, {**formats.fp8_config(), "quant_method": "w4afp8"}),
}
"""Name -> what packs a weight ``[N, K]``, and the ``quantization_config``."""


def write_linears(folder: Path, variant: str, weights: Mapping[str, torch.Tensor]) -> Tensors:
    """Writes ``weights``, by the names of their modules, in one format. Returns the tensors that were written."""
    packer, quantization = VARIANTS[variant]
    folder.mkdir(parents=True)
    config: Config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
    (folder / "config.json").write_text(
        json.dumps(config if quantization is None else {**config, "quantization_config": quantization})
    )
    tensors = {
        f"{name}.{leaf}": tensor.cpu().contiguous()
        for name, weight in weights.items()
        for leaf, tensor in packer(weight.float()).items()
    }
    save_file(tensors, folder / "model.safetensors")
    return tensors
