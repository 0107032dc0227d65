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


def _act_order(weight: torch.Tensor) -> Tensors:
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1)) // 128
    return formats.gptq(weight, g_idx=order)


VARIANTS: Mapping[str, tuple[Callable[[torch.Tensor], Tensors], Config | None]] = {
    "BF16": (formats.dense, None),
    "FP16": (partial(formats.dense, dtype=torch.float16), None),
    "FP8, blocks": (formats.fp8_block, formats.fp8_config()),
    "FP8, channels": (formats.fp8_channel, formats.compressed_config("channel")),
    "Int8, channels": (formats.int8_channel, formats.compressed_config("channel", "int")),
    "Int8, blocks": (formats.int8_block, {"quant_method": "blockwise_int8", "weight_block_size": [128, 128]}),
    "GPTQ": (formats.gptq, formats.gptq_config()),
    "GPTQ, zero points": (partial(formats.gptq, sym=False), formats.gptq_config(sym=False)),
    "GPTQ, act-order": (_act_order, formats.gptq_config(desc_act=True)),
    "GPTQ, 8 bit": (partial(formats.gptq, bits=8), formats.gptq_config(bits=8)),
    "AutoRound": (formats.gptq, _AUTO_ROUND),
    "AWQ": (formats.awq, formats.awq_config()),
    "compressed-tensors Int4": (formats.packed, formats.packed_config()),
    "compressed-tensors Int4, zero points": (partial(formats.packed, sym=False), formats.packed_config(sym=False)),
    "NVFP4": (formats.nvfp4, formats.nvfp4_config()),
    "MXFP4": (formats.mxfp4, formats.mxfp4_config()),
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
    tensors = {f"{name}.{leaf}": t for name, weight in weights.items() for leaf, t in packer(weight.float()).items()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return tensors
