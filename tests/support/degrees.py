"""Checkpoints of model families with holes for data, whose sizes many ranks can share, but for one of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from support.families import TINY, tensors_of
from support.hollow import Tensor, write_shard

__all__ = ["EVEN", "variants", "write_variant"]

Config = dict[str, Any]

EVEN = 48
"""Heads, groups and experts that 2, 3, 4, 6, 8, 12 and 16 ranks can share."""
_HEADS = {
    "num_attention_heads", "swa_num_attention_heads", "linear_num_key_heads", "linear_num_value_heads",
    "num_key_value_heads", "swa_num_key_value_heads", "num_attention_groups", "num_global_key_value_heads",
    "sparse_num_index_heads", "o_groups", "num_heads", "vt_num_attention_heads", "heads", "mamba_num_heads",
    "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts",
}  # fmt: skip
_COLUMNS = {
    "intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "dense_intermediate_size",
    "ffn_hidden_size", "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "share_expert_dim",
    "share_expert_dims", "shared_intermediate_size", "intermediate_size_mlp",
}  # fmt: skip
_ROWS = {"vocab_size", "vocab_size_per_layer_input", "num_position_embeddings"}
_WIDTHS = {
    "hidden_size", "vt_hidden_size", "mm_hidden_size", "width", "out_hidden_size", "text_hidden_size",
    "projector_input_dim", "projector_output_dim", "vision_output_dim",
}  # fmt: skip
_CHANGED = _HEADS | _COLUMNS | _ROWS
_SHARED = ("num_key_value_heads", "swa_num_key_value_heads", "num_attention_groups")


def _even(config: Mapping[str, Any], path: str = "") -> Config:
    """``config`` with sizes that many ranks can share; heads have 16 values where that is not given."""
    out: Config = {}
    for key, value in config.items():
        size = isinstance(value, list) or (type(value) is int and value > 0)
        if isinstance(value, dict):
            out[key] = _even(value, key)
        elif key in _HEADS and size and not (key == "num_key_value_heads" and value == 1):  # of DeepSeek-V4
            out[key] = EVEN
        elif key in _COLUMNS and size:
            out[key] = [16 * EVEN] * len(value) if isinstance(value, list) else 16 * EVEN
        elif key in _ROWS and size:
            out[key] = 64 * EVEN
        elif key in _WIDTHS and (path == "vision_config" or key == "hidden_size"):
            out[key] = 16 * EVEN
        elif key == "mamba_head_dim" or (key == "head_dim" and path == "vision_config"):
            out[key] = 16
        else:
            out[key] = value
    return out


def _base(name: str) -> Config:
    config = _even(TINY[name].config)
    if name == "longcat":  # releases have it under ffn_hidden_size
        del config["intermediate_size"]
    if name.startswith("gemma3"):
        config.get("text_config", config)["query_pre_attn_scalar"] = 16
    if name == "gemma3_images":
        config["vision_config"]["image_size"], config["mm_tokens_per_image"] = EVEN * 14, 36
    return config


def variants(name: str) -> Iterator[tuple[str, Config]]:
    """Yields configs of a tiny model of :data:`.TINY` made even, each with one size changed, which a label names."""
    base = _base(name)
    yield "even", base
    for path in _sizes(base):
        key, numbers = path[-1], (3, 8)
        if key in _COLUMNS:
            numbers = (320,)
        elif key in _ROWS:
            numbers = (500,)
        elif key == "image_size":
            numbers = (14 * 32,)
        for number in numbers:
            config = json.loads(json.dumps(base))
            part = config
            for word in path[:-1]:
                part = part[word]
            part[key] = [number] * len(part[key]) if isinstance(part[key], list) else number
            if key.endswith("num_attention_heads"):  # no fewer than key-value heads
                part.update({shared: number for shared in _SHARED if part.get(shared) == EVEN})
            if key == "linear_num_value_heads":
                part["linear_num_key_heads"] = number
            if key == "num_key_value_heads" and name == "olmoe":  # its norms are of as many
                part["num_attention_heads"] = number
            yield f"{'.'.join(path)} {number}", config


def _sizes(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _sizes(value, (*path, key))
        elif value == EVEN * 14 if key == "image_size" else key in _CHANGED and value not in (0, 1, None):
            yield (*path, key)


def write_variant(folder: Path, name: str, config: Config) -> Path:
    """Writes an unquantized checkpoint of ``config``, that of the tiny model ``name`` with other sizes."""
    folder.mkdir(parents=True)
    named = TINY[name].released_name
    tensors = [Tensor(named(tensor.name), tensor.dtype, tensor.shape) for tensor in tensors_of(config)]
    write_shard(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))
    return folder
