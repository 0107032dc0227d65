"""gpt-oss in small: its release's tensors by openai's names, with experts in MXFP4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

__all__ = ["SMALL", "Sizes", "config", "dequantized", "tensors", "unquantized", "write"]

Array = np.ndarray[Any, Any]


class Sizes(NamedTuple):
    """Of the model; a head has 64 values."""

    experts: int = 4
    hidden: int = 192
    columns: int = 320
    heads: int = 4
    keys: int = 2
    vocab: int = 128
    layers: int = 2


SMALL = Sizes()
_HEAD = 64


def tensors(sizes: Sizes = SMALL, seed: int = 0) -> dict[str, Array]:
    """A release in small, by openai's names."""
    experts, hidden, columns, heads, keys, vocab, layers = sizes
    rng = np.random.default_rng(seed)

    def bf16(*shape: int) -> Array:
        return (rng.standard_normal(shape) / 8).astype(ml_dtypes.bfloat16)

    made = {"model.embed_tokens.weight": bf16(vocab, hidden), "lm_head.weight": bf16(vocab, hidden)}
    made["model.norm.weight"] = bf16(hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            made[f"{at}.{norm}.weight"] = bf16(hidden)
        for part, count in (("q", heads), ("k", keys), ("v", keys)):
            made[f"{at}.self_attn.{part}_proj.weight"] = bf16(count * _HEAD, hidden)
            made[f"{at}.self_attn.{part}_proj.bias"] = bf16(count * _HEAD)
        made[f"{at}.self_attn.o_proj.weight"] = bf16(hidden, heads * _HEAD)
        made[f"{at}.self_attn.o_proj.bias"] = bf16(hidden)
        made[f"{at}.self_attn.sinks"] = bf16(heads)
        made[f"{at}.mlp.router.weight"], made[f"{at}.mlp.router.bias"] = bf16(experts, hidden), bf16(experts)
        for name, n, k in (("gate_up_proj", 2 * columns, hidden), ("down_proj", hidden, columns)):
            home = f"{at}.mlp.experts.{name}"
            made[f"{home}_blocks"] = rng.integers(0, 256, (experts, n, k // 32, 16), np.uint8)
            made[f"{home}_scales"] = rng.integers(118, 124, (experts, n, k // 32), np.uint8)
            made[f"{home}_bias"] = bf16(experts, n)
    return made


def unquantized(sizes: Sizes = SMALL, seed: int = 0) -> dict[str, Array]:
    """The same release with experts in BF16, inputs first, where columns of gate and up alternate."""
    made = tensors(sizes, seed)
    rng = np.random.default_rng(seed + 1)
    for name in [name for name in made if name.endswith(("_blocks", "_scales"))]:
        experts, outputs, blocks = made.pop(name).shape[:3]
        if name.endswith("_blocks"):
            values = rng.standard_normal((experts, 32 * blocks, outputs)) / 8
            made[name.removesuffix("_blocks")] = values.astype(ml_dtypes.bfloat16)
    return made


def dequantized(made: dict[str, Array]) -> dict[str, Array]:
    """The tensors of ``made`` with experts in BF16, of the same values, as :func:`unquantized` has them."""
    out = dict(made)
    for name in [name for name in made if name.endswith("_blocks")]:
        stem = name.removesuffix("_blocks")
        blocks, exponents = out.pop(name), out.pop(f"{stem}_scales").astype(np.int32) - 127
        codes = np.stack([blocks & 15, blocks >> 4], -1).astype(np.uint8)
        values = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32).reshape(*blocks.shape[:-1], 32)
        values = np.ldexp(values, exponents[..., None]).reshape(*blocks.shape[:2], -1)
        out[stem] = np.ascontiguousarray(values.swapaxes(1, 2).astype(ml_dtypes.bfloat16))
    return out


def config(sizes: Sizes = SMALL) -> dict[str, Any]:
    """The release's ``config.json``."""
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "hidden_act": "silu",
        "hidden_size": sizes.hidden, "intermediate_size": sizes.columns, "num_hidden_layers": sizes.layers,
        "layer_types": ["sliding_attention", "full_attention"] * (sizes.layers // 2), "sliding_window": 64,
        "num_attention_heads": sizes.heads, "num_key_value_heads": sizes.keys, "head_dim": _HEAD,
        "num_local_experts": sizes.experts, "num_experts_per_tok": 2, "swiglu_limit": 7.0, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "rope_theta": 150000, "vocab_size": sizes.vocab, "tie_word_embeddings": False,
        "quantization_config": quantization,
    }  # fmt: skip


def write(folder: Path, made: dict[str, Array], sizes: Sizes = SMALL, **changed: Any) -> Path:
    """Writes a release; ``changed`` are entries of its configuration."""
    folder.mkdir()
    save_file(made, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config(sizes), **changed}))
    return folder
