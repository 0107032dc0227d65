"""Tiny models with weights set by hand, so that the number of accepted drafts means something.

The next token depends on the current one alone (:func:`next_token`), and a draft layer computes the same, so that every
draft is accepted. A draft layer whose weights were lost or bound to the wrong parameters drafts other tokens, and none
is accepted. All other weights are random, and small beside the path of the token.

The embedding of a token is a unit vector, so the vocabulary is as large as hidden states.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support.families import TINY, Tensor, TinyModel
from support.sglang.families import random_values

__all__ = ["DEEPSEEK", "GLM4_MOE", "QWEN3_5_MOE", "QWEN3_MOE", "answer_to", "next_token", "predictable", "write_eagle3"]

SIZE = 1024
"""Of the vocabulary, and of hidden states."""

_SIZES: Mapping[str, Any] = {
    "hidden_size": SIZE, "vocab_size": SIZE, "num_hidden_layers": 4, "num_attention_heads": 16,
    "intermediate_size": 2048, "moe_intermediate_size": 512,
}  # fmt: skip


def _draft_lines(layer: str) -> dict[str, str]:
    """A draft layer in three formats, with experts whose down has another than gate and up."""
    lines = {
        "self_attn.*": "fp8", "mlp.experts.*": "int4", "mlp.experts.{0..2}.*": "fp8", "mlp.experts.4.down_proj": "bf16",
    }  # fmt: skip
    return {f"{layer}.{inner}": source for inner, source in lines.items()}


_TINY_DEEPSEEK, _TINY_QWEN = TINY["deepseek_v3"], TINY["qwen2_moe"]

DEEPSEEK = replace(
    _TINY_DEEPSEEK,
    config={
        **_TINY_DEEPSEEK.config, **_SIZES,
        "num_key_value_heads": 16, "n_group": 2, "topk_group": 1,
    },
    lines={
        **_TINY_DEEPSEEK.lines, **_draft_lines("model.layers.4"), "model.layers.4.self_attn.kv_b_proj": "bf16",
    },
)  # fmt: skip
QWEN3_MOE = TinyModel(
    {
        **{key: value for key, value in _TINY_QWEN.config.items() if "shared" not in key and key != "qkv_bias"},
        **_SIZES,
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_key_value_heads": 8, "head_dim": 128,
    },
    {"*.self_attn.*": "fp8", "*.mlp.experts.*": "int4", "*.mlp.experts.{0..2}.*": "fp8"},
)  # fmt: skip

_TINY_GLM, _TINY_QWEN3_5 = TINY["glm4_moe"], TINY["qwen3_5_moe"]
_TEXT = _TINY_QWEN3_5.config["text_config"]
GLM4_MOE = replace(
    _TINY_GLM,
    config={**_TINY_GLM.config, "vocab_size": _TINY_GLM.config["hidden_size"]},
    lines={**_TINY_GLM.lines, **_draft_lines("model.layers.3")},
)
QWEN3_5_MOE = replace(
    _TINY_QWEN3_5,
    config={**_TINY_QWEN3_5.config, "text_config": {**_TEXT, "vocab_size": _TEXT["hidden_size"]}},
    lines={**_TINY_QWEN3_5.lines, **_draft_lines("mtp.layers.0")},
)


def next_token(token: int, vocabulary: int = SIZE) -> int:
    """The token that follows ``token``. All of a vocabulary whose size is a power of two are in one cycle."""
    return (5 * token + 3) % vocabulary


def answer_to(prompt: list[int], tokens: int, vocabulary: int = SIZE) -> list[int]:
    """What a predictable model generates after ``prompt``."""
    out = [prompt[-1]]
    for _ in range(tokens):
        out.append(next_token(out[-1], vocabulary))
    return out[1:]


def predictable(tensor: Tensor) -> torch.Tensor:
    """The values of a tensor of a predictable model."""
    module = tensor.name.removesuffix(".weight")
    if module.endswith("embed_tokens"):
        return _unit(tensor) * tensor.shape[1] ** 0.5
    if module.endswith(("lm_head", "shared_head.head")):
        return _following(tensor.shape[0]).to(torch.bfloat16)
    values = random_values(tensor)
    if module.endswith(("eh_proj", "mtp.fc")):  # inputs are the embedding, then the hidden state
        return values / 8 + _unit(tensor)
    return values / 4 if module.endswith(("o_proj", "down_proj", "out_proj")) else values


def _unit(tensor: Tensor) -> torch.Tensor:
    return torch.eye(*tensor.shape, dtype=torch.bfloat16)


def _following(vocabulary: int) -> torch.Tensor:
    """``[V, V]``, by which the unit vector of a token becomes that of the next."""
    tokens = torch.arange(vocabulary)
    out = torch.zeros(vocabulary, vocabulary)
    out[[next_token(int(token), vocabulary) for token in tokens], tokens] = 1
    return out


def write_eagle3(folder: Path) -> Path:
    """Writes an EAGLE3 head for predictable models of :data:`SIZE`, with the hidden states of layers 1 to 3 as inputs.

    Its residual path carries the unit vector of the current token, which the MLP replaces by that of the next:
    activations of ``s`` are about ``s * s``.
    """
    heads, size = 8, 128
    along = 2 * SIZE
    shapes = {
        "midlayer.self_attn.q_proj": (heads * size, along), "midlayer.self_attn.k_proj": (heads * size, along),
        "midlayer.self_attn.v_proj": (heads * size, along), "midlayer.self_attn.o_proj": (SIZE, heads * size),
        "midlayer.input_layernorm": (SIZE,), "midlayer.hidden_norm": (SIZE,),
        "midlayer.post_attention_layernorm": (SIZE,), "norm": (SIZE,),
    }  # fmt: skip
    tensors = {
        f"{name}.weight": predictable(Tensor(f"{name}.weight", shape)) if len(shape) > 1 else torch.ones(shape)
        for name, shape in shapes.items()
    }
    unit, following = torch.eye(SIZE), _following(SIZE)
    tensors |= {
        "fc.weight": torch.cat([torch.zeros(SIZE, along), unit], 1),
        "midlayer.mlp.gate_proj.weight": unit,
        "midlayer.mlp.up_proj.weight": unit,
        "midlayer.mlp.down_proj.weight": (following - unit) / SIZE**0.5,
        "lm_head.weight": following,
    }
    stored = {name: value.to(torch.bfloat16).contiguous() for name, value in tensors.items()}
    config = {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "hidden_size": SIZE, "vocab_size": SIZE,
        "draft_vocab_size": SIZE, "target_hidden_size": SIZE, "intermediate_size": SIZE, "num_hidden_layers": 1,
        "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": size, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "max_position_embeddings": QWEN3_MOE.config["max_position_embeddings"], "bos_token_id": 1, "eos_token_id": 2,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "use_aux_hidden_state": True},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    ids = {"d2t": torch.zeros(SIZE, dtype=torch.int64), "t2d": torch.ones(SIZE, dtype=torch.bool)}
    save_file({**stored, **ids}, folder / "model.safetensors", {"format": "pt"})
    return folder
