"""Tiny checkpoints for each of SGLang's classes of each family, and how the class loads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mixprec_runtime.asking.answer import Answer, ask
from mixprec_runtime.asking.comparison import Module
from support import serving
from support.families import TINY, tensors_of
from support.sglang.harness import publish, server_args

__all__ = ["ASKED", "Asked", "answer_of", "modules_of"]


class Asked(NamedTuple):
    """A tiny checkpoint: its config.json, and the dtype and shape of each tensor."""

    config: dict[str, Any]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    options: Mapping[str, Any]


def _of_shape(shape: serving.Shape, **changes: Any) -> Asked:
    dtypes = {name: "F32" if "correction_bias" in name else "BF16" for name, _ in serving.tensors_of(shape)}
    tensors = {name: (dtypes[name], size) for name, size in serving.tensors_of(shape)}
    return Asked({**serving.config_of(shape), **changes}, tensors, {})


def _of_tiny(name: str, **changes: Any) -> Asked:
    model = TINY[name]
    tensors = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors_of(model.config)}
    return Asked({**model.config, **changes}, tensors, model.options)


def _text_only(name: str, architecture: str) -> Asked:
    """The decoder of a model with an image encoder, as in releases without the encoder."""
    inner = _of_tiny(name)
    tensors = {
        tensor.replace("model.language_model.", "model."): entry
        for tensor, entry in inner.tensors.items()
        if not tensor.startswith("model.visual.")
    }
    text = {**inner.config["text_config"], "tie_word_embeddings": False, "architectures": [architecture]}
    return Asked(text, tensors, inner.options)


ASKED: Mapping[str, Asked] = {
    "LlamaForCausalLM": _of_shape(serving.LLAMA),
    "MistralForCausalLM": _of_shape(serving.LLAMA, architectures=["MistralForCausalLM"], model_type="mistral"),
    "MixtralForCausalLM": _of_shape(serving.MIXTRAL),
    "Qwen2ForCausalLM": _of_shape(serving.QWEN2),
    "Qwen3ForCausalLM": _of_shape(serving.QWEN3),
    "Qwen3MoeForCausalLM": _of_shape(serving.QWEN3_MOE),
    "DeepseekV3ForCausalLM": _of_shape(serving.DEEPSEEK),
    "DeepseekV2ForCausalLM": _of_shape(
        serving.DEEPSEEK, architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2"
    ),
    "Qwen3_5ForCausalLM": _text_only("qwen3_5", "Qwen3_5ForCausalLM"),
    "Qwen3_5MoeForCausalLM": _text_only("qwen3_5_moe", "Qwen3_5MoeForCausalLM"),
    "CohereForCausalLM": _of_tiny("cohere2", architectures=["CohereForCausalLM"], model_type="cohere"),
    **{model.config["architectures"][0]: _of_tiny(name) for name, model in TINY.items() if name != "kimi_k2"},
}


def answer_of(asked: Asked, folder: Path) -> Answer:
    """The answer of SGLang's class; config.json is written to ``folder``."""
    from sglang.srt.configs.model_config import ModelConfig

    (folder / "config.json").write_text(json.dumps(asked.config))
    args = server_args(folder, dtype="bfloat16", load_format="dummy", **asked.options)
    publish(args)
    tensors = ((name, dtype, shape) for name, (dtype, shape) in asked.tensors.items())
    return ask(ModelConfig.from_server_args(args), tensors)


def modules_of(asked: Asked) -> dict[str, Module]:
    """The checkpoint's modules, with all linears marked as quantized."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, (_, shape) in asked.tensors.items():
        parent, _, leaf = name.rpartition(".")
        module, leaf = (parent, leaf) if leaf in ("weight", "bias") else (name, "")
        found.setdefault(module, {})[leaf] = shape
    return {
        name: Module(leaves.get("weight", next(iter(leaves.values()))), tuple(leaves), True)
        for name, leaves in found.items()
    }
