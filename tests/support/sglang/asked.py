"""Tiny checkpoints for each of SGLang's classes of each family, by the class's name, and how the class loads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from mixprec_build.families.draft_class import Draft
from mixprec_build.families.facts import ModelFacts
from mixprec_runtime.asking.answer import Answer, ask
from mixprec_runtime.asking.comparison import Module
from support import gpt_oss, serving
from support.families import TINY, tensors_of
from support.family_parts import EXPERTS
from support.sglang.harness import publish, server_args

__all__ = ["ASKED", "DRAFTED", "Asked", "answer_of", "modules_of"]


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


def _of_stacked(name: str) -> Asked:
    """A tiny model with each projection of all experts in one tensor, the only form that its class loads."""
    inner = _of_tiny(name)
    tensors = {}
    for tensor, (dtype, shape) in inner.tensors.items():
        block, found, rest = tensor.partition(".experts.")
        of_all = f"{block}.{rest.partition('.')[2]}"
        tensors[of_all if found else tensor] = (dtype, (EXPERTS, *shape) if found else shape)
    return inner._replace(tensors=tensors)


# Models whose class is asked with another, and further models of a class
_AGAIN = ("kimi_k2", "deepseek_v3")
_FURTHER = ("qwen3_5_moe_auto_round", "kimi_k25_packed", "nemotron_h_latent", "gemma4_moe")


def _of_gpt_oss() -> Asked:
    """A release with experts in BF16, which the class loads without a quantization config of its own."""
    dtypes = {"bfloat16": "BF16"}
    tensors = {name: (dtypes[value.dtype.name], value.shape) for name, value in gpt_oss.unquantized().items()}
    config = {**gpt_oss.config(), "torch_dtype": "bfloat16"}
    del config["quantization_config"]
    return Asked(config, tensors, {"moe_runner_backend": "triton"})


_STACKED = {"Step3p5ForCausalLM": "step3p5", "Step3p7ForConditionalGeneration": "step3p7"}

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
    "MiMoV2ForCausalLM": _of_tiny("mimo_v2", architectures=["MiMoV2ForCausalLM"], model_type="mimo_v2_flash"),
    "BailingMoEForCausalLM": _of_tiny("bailing_moe", architectures=["BailingMoEForCausalLM"]),
    "BailingMoeForCausalLM": _of_tiny("bailing_moe", architectures=["BailingMoeForCausalLM"]),
    **{
        model.config["architectures"][0]: _of_tiny(name)
        for name, model in TINY.items()
        if name not in (*_AGAIN, *_FURTHER)
    },
    **{name: _of_tiny(name) for name in _FURTHER},
    "GptOssForCausalLM": _of_gpt_oss(),
    **{name: _of_stacked(tiny) for name, tiny in _STACKED.items()},
}

_DRAFTED: Mapping[str, Asked] = {**ASKED, "DeepseekV3ForCausalLM": _of_tiny("deepseek_v3")}
DRAFTED = {
    name: asked
    for name, asked in _DRAFTED.items()
    if (facts := ModelFacts.of(asked.config)).draft_layers and Draft.of(facts) is not None
}
"""The checkpoints of ``ASKED`` with draft layers that mixprec serves."""


def answer_of(asked: Asked, folder: Path, *, draft: bool = False) -> Answer:
    """The answer of SGLang's class, with ``draft`` of that for draft layers; config.json is written to ``folder``."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.rotary_embedding import factory

    (folder / "config.json").write_text(json.dumps(asked.config))
    # As the runtime asks; and GLM's class for draft layers takes this from the arguments.
    options = {**asked.options, "disable_shared_experts_fusion": True}
    args = server_args(folder, dtype="bfloat16", load_format="dummy", **options)
    publish(args)
    tensors = ((name, dtype, shape) for name, (dtype, shape) in asked.tensors.items())
    # SGLang keeps rotary embeddings for all models of a process: those of this one have no values.
    with patch.dict(factory._ROPE_DICT, clear=True):
        return ask(ModelConfig.from_server_args(args, is_draft_model=draft), tensors)


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
