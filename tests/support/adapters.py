"""Adapters of LoRA for the attention of the models of :mod:`support.serving`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from support.serving import Shape

__all__ = ["ATTENTION", "write_adapter"]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_RANK, _ALPHA = 8, 16


def write_adapter(folder: Path, shape: Shape) -> dict[str, torch.Tensor]:
    """Writes an adapter as PEFT does; returns what it adds to each weight, ``[N, K]``, by the name of the tensor."""
    heads, kv_heads = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    sizes = {
        "q_proj": (heads, shape.hidden), "k_proj": (kv_heads, shape.hidden), "v_proj": (kv_heads, shape.hidden),
        "o_proj": (shape.hidden, heads),
    }  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    added: dict[str, torch.Tensor] = {}
    for layer in range(shape.layers):
        for last, (outputs, inputs) in sizes.items():
            module = f"model.layers.{layer}.self_attn.{last}"
            a = torch.randn(_RANK, inputs, generator=draw) / inputs**0.5
            b = torch.randn(outputs, _RANK, generator=draw) / 10
            tensors |= {f"base_model.model.{module}.lora_{leaf}.weight": t for leaf, t in (("A", a), ("B", b))}
            added[f"{module}.weight"] = b @ a * (_ALPHA / _RANK)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": _RANK, "lora_alpha": _ALPHA, "target_modules": ATTENTION, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return added
