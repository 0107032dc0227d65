"""Tiny models as Mistral-Large-3, and checkpoints of them in Mistral's own layout."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from support.family_parts import (
    _A_PROJECTIONS,
    _MLA_LINES,
    _OUTER,
    EXPERTS,
    HIDDEN,
    Config,
    Tensor,
    Tensors,
    TinyModel,
    _around,
    _experts,
    _latent_attention,
    _layer_norms,
    _linear,
    _mlp,
    _norm,
)
from support.serving import VARIANTS

__all__ = ["LARGE_TENSORS", "LARGE_TINY", "MIX", "PARAMS", "STATIC", "own_name", "write_own", "write_releases"]

Weights = dict[str, torch.Tensor]

PARAMS: Config = {
    "dim": HIDDEN, "n_layers": 3, "head_dim": 192, "hidden_dim": 512, "n_heads": 4, "n_kv_heads": 4,
    "rope_theta": 10000.0, "norm_eps": 1e-6, "vocab_size": 512, "tied_embeddings": False,
    "max_position_embeddings": 8192, "q_lora_rank": 256, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128,
    "llama_4_scaling": {"original_max_position_embeddings": 2048, "beta": 0.1},
    "yarn": {
        "factor": 4, "original_max_position_embeddings": 2048, "beta": 32, "alpha": 1, "apply_scale": False,
    },
    "moe": {
        "expert_parallel": 1, "expert_model_parallel": 1, "route_every_n": 1, "first_k_dense_replace": 1,
        "num_experts": EXPERTS, "num_experts_per_tok": 2, "num_expert_groups": 1, "num_expert_groups_per_tok": 1,
        "routed_scale": 1.0, "expert_hidden_dim": 256, "num_shared_experts": 1,
    },
    "vision_encoder": {
        "image_token_id": 10, "image_break_token_id": 12, "image_end_token_id": 13, "intermediate_size": 128,
        "num_hidden_layers": 1, "num_attention_heads": 2, "mm_projector_id": "patch_merge", "spatial_merge_size": 2,
        "hidden_size": 64, "num_channels": 3, "image_size": 28, "max_image_size": 28, "patch_size": 14,
        "rope_theta": 10000.0, "add_pre_mm_projector_layer_norm": True, "adapter_bias": False,
    },
}  # fmt: skip
"""A ``params.json`` with the keys of Mistral-Large-3's."""

_TEXT: Config = {
    "hidden_size": HIDDEN, "num_hidden_layers": 3, "head_dim": 192, "intermediate_size": 512, "num_attention_heads": 4,
    "num_key_value_heads": 4, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "vocab_size": 512, "hidden_act": "silu",
    "tie_word_embeddings": False, "max_position_embeddings": 8192, "max_seq_len": 128000, "q_lora_rank": 256,
    "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "llama_4_scaling": {"original_max_position_embeddings": 2048, "beta": 0.1},
    "rope_scaling": {
        "rope_type": "deepseek_yarn", "mscale_all_dim": 1, "rope_theta": 10000.0, "factor": 4,
        "original_max_position_embeddings": 2048, "beta_fast": 32, "beta_slow": 1, "apply_yarn_scaling": False,
    },
    "moe_layer_freq": 1, "first_k_dense_replace": 1, "num_experts_per_tok": 2, "n_routed_experts": EXPERTS,
    "moe_intermediate_size": 256, "routed_scaling_factor": 1.0, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "topk_method": None, "scoring_func": "softmax", "routing_method_type": 1, "model_type": "deepseek_v3",
    "architectures": ["MistralLarge3ForCausalLM"],
}  # fmt: skip
_WITH_IMAGES: Config = {
    "model_type": "mistral3", "architectures": ["PixtralForConditionalGeneration"], "text_config": _TEXT,
    "image_token_index": 10, "spatial_merge_size": 2, "tie_word_embeddings": False,
    "vision_config": {"model_type": "pixtral", **PARAMS["vision_encoder"]},
}  # fmt: skip


def _decoder(c: Config) -> Tensors:
    def layers() -> Tensors:
        for layer in range(c["num_hidden_layers"]):
            at, hidden, size = f"model.layers.{layer}.", c["hidden_size"], c["moe_intermediate_size"]
            yield from _latent_attention(f"{at}self_attn.", c)
            if layer < c["first_k_dense_replace"]:
                yield from _mlp(f"{at}mlp.", hidden, c["intermediate_size"])
            else:
                yield from _linear(f"{at}mlp.gate", c["n_routed_experts"], hidden, linear=False)
                yield from _mlp(f"{at}mlp.shared_experts.", hidden, size)
                yield from _experts(f"{at}mlp.", c["n_routed_experts"], hidden, size)
            yield from _layer_norms(at, hidden)

    yield from _around("model.", c, layers())


def _with_images(config: Config) -> Tensors:
    text, c, p = config["text_config"], config["vision_config"], "vision_encoder."
    yield from _decoder(text)
    hidden, size = c["hidden_size"], c["intermediate_size"]
    yield Tensor(f"{p}patch_conv.weight", (hidden, 3, c["patch_size"], c["patch_size"]))
    yield from _norm(f"{p}ln_pre", hidden)
    for layer in range(c["num_hidden_layers"]):
        at = f"{p}transformer.layers.{layer}."
        for name in ("wq", "wk", "wv", "wo"):
            yield from _linear(f"{at}attention.{name}", hidden, hidden, linear=False)
        for name, shape in (("w1", (size, hidden)), ("w2", (hidden, size)), ("w3", (size, hidden))):
            yield from _linear(f"{at}feed_forward.{name}", *shape, linear=False)
        yield from _layer_norms(at, hidden, "attention_norm", "ffn_norm")
    yield from _norm("pre_mm_projector_norm", hidden)
    merged = hidden * c["spatial_merge_size"] ** 2
    yield from _linear("patch_merger.merging_layer", hidden, merged, linear=False)
    yield from _linear("vision_language_adapter.w_in", text["hidden_size"], hidden, linear=False)
    yield from _linear("vision_language_adapter.w_out", text["hidden_size"], text["hidden_size"], linear=False)


LARGE_TENSORS: Mapping[str, Callable[[Config], Tensors]] = {
    "MistralLarge3ForCausalLM": _decoder,
    "PixtralForConditionalGeneration": _with_images,
}
LARGE_TINY: Mapping[str, TinyModel] = {
    "mistral_large_3": TinyModel(
        {**_TEXT, **_OUTER}, _MLA_LINES, dense=_A_PROJECTIONS, degrees=((2, 1), (2, 2))
    ),
    "mistral_large_3_images": TinyModel(
        _WITH_IMAGES, {**_MLA_LINES, "*.shared_experts.*": "fp8"}, dense=_A_PROJECTIONS, degrees=((2, 1), (2, 2))
    ),
}  # fmt: skip

# DeepSeek-V3's words -> Mistral's, of the whole name in this order
_OWN = (
    (r"model\.embed_tokens\.", "tok_embeddings."), (r"lm_head\.", "output."), (r"model\.norm\.", "norm."),
    (r"model\.layers\.", "layers."), (r"\.input_layernorm\.", ".attention_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."), (r"\.self_attn\.q_(a|b)_proj\.", r".attention.wq_\1."),
    (r"\.self_attn\.kv_b_proj\.", ".attention.wkv_b."),
    (r"\.self_attn\.kv_a_proj_with_mqa\.", ".attention.wkv_a_with_mqa."),
    (r"\.self_attn\.(q|kv)_a_layernorm\.", r".attention.\1_a_norm."), (r"\.self_attn\.o_proj\.", ".attention.wo."),
    (r"\.mlp\.(gate\.|experts\.|shared_experts\.)", r".\1"), (r"\.mlp\.", ".feed_forward."),
    (r"\.gate_proj\.", ".w1."), (r"\.down_proj\.", ".w2."), (r"\.up_proj\.", ".w3."),
)  # fmt: skip


def own_name(name: str, *, scales: bool = False) -> str:
    """The name in Mistral's own layout, with ``scales`` also of those of static FP8."""
    if name.startswith(("model.", "lm_head.")):
        for pattern, own in _OWN:
            name = re.sub(pattern, own, name)
    if scales:
        name = name.replace(".weight_scale", ".qscale_weight").replace(".input_scale", ".qscale_act")
    return name


def write_own(
    folder: Path, tensors: Mapping[str, torch.Tensor], *, scales: bool = False, files: int = 2, **params: Any
) -> Path:
    """Writes tensors with names of DeepSeek-V3 as a release in Mistral's own layout, and returns its folder.

    Args:
        scales: whether scales of static FP8 have Mistral's names.
        files: how many; one has no index.
        params: changes of its ``params.json``; None removes a key.
    """
    folder.mkdir(parents=True)
    named = {own_name(name, scales=scales): value for name, value in tensors.items()}
    names = sorted(named)
    stem = "consolidated-{:05}-of-{:05}.safetensors" if files > 1 else "consolidated.safetensors"
    shards = [stem.format(number, files) for number in range(1, files + 1)]
    weight_map = {name: shards[at * files // len(names)] for at, name in enumerate(names)}
    for shard in shards:
        save_file({name: named[name] for name in names if weight_map[name] == shard}, folder / shard, {"format": "pt"})
    if files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "consolidated.safetensors.index.json").write_text(json.dumps(index))
    made = {key: value for key, value in {**PARAMS, **params}.items() if value is not None}
    (folder / "params.json").write_text(json.dumps(made))
    return folder


STATIC: Config = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
"""``quantization`` in the ``params.json`` of a release in static FP8."""
IGNORED = [
    "model.embed_tokens", "re:patch_merger.*", "re:vision_encoder.*", "re:vision_language_adapter.*",
    "re:.*kv_a_proj_with_mqa$", "re:.*q_a_proj$", "re:.*gate$", "re:.*self_attn.*", "re:.*attention.*", "lm_head",
]  # fmt: skip
"""As in the declaration of Mistral-Small-4's release in NVFP4, whose names are DeepSeek-V3's, too."""


def weights() -> Weights:
    """Unquantized weights of the tiny model with an encoder of images."""
    found = {}
    for name, shape, *_ in _with_images(_WITH_IMAGES):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        found[name] = (1 + values / 8 if len(shape) == 1 else values / prod(shape[1:]) ** 0.5).to(torch.bfloat16)
    return found


def stored_as(kind: str, linears: str, tensors: Weights) -> Weights:
    """``tensors`` of a model with those of ``linears``, a regular expression, quantized."""
    found = {}
    for name, value in tensors.items():
        module = name.removesuffix(".weight")
        if re.fullmatch(linears, module):
            found |= {f"{module}.{leaf}": one for leaf, one in VARIANTS[kind][0](value.float()).items()}
        else:
            found[name] = value
    return found


def declared(kind: str) -> Config:
    """A declaration of llm-compressor's with names that are left out."""
    return {**(VARIANTS[kind][1] or {}), "ignore": IGNORED}


def write_releases(folder: Path) -> dict[str, Path]:
    """One in BF16, one in static FP8 and one in NVFP4 in Mistral's own layout, and Int4 in Hugging Face's."""
    whole = weights()
    write_own(folder / "bf16", whole)
    fp8 = stored_as("fp8_tensor", r"model.*\.(q_b_proj|o_proj|gate_proj|up_proj|down_proj)", whole)
    for name in [name for name in fp8 if name.endswith("weight_scale")]:
        fp8[name.replace("weight_scale", "input_scale")] = fp8[name] / 2
    write_own(folder / "static", fp8, scales=True, quantization=STATIC)
    fp4 = stored_as("ct_nvfp4", r"model.*\.(experts\.\d+|shared_experts)\.\w+_proj", whole)
    for name in [name for name in fp4 if name.endswith("input_global_scale") and "shared" in name]:
        fp4[name] = fp4[name].to(torch.bfloat16)
    # SGLang's class leaves these out.
    for block in ("layers.0", "vision_encoder.transformer.layers.0"):
        fp4 |= {f"{block}.attention.{one}_fake_quantizer.qscale_act": torch.ones(()) for one in "kv"}
    write_own(folder / "ct_nvfp4", fp4, files=1, quantization_config=declared("ct_nvfp4"))
    int4 = folder / "int4"
    int4.mkdir()
    save_file(
        stored_as("gptq_int4", r"model.*\.experts\.\d+\.\w+_proj", whole), int4 / "model.safetensors", {"format": "pt"}
    )
    (int4 / "config.json").write_text(json.dumps({**_WITH_IMAGES, "quantization_config": VARIANTS["gptq_int4"][1]}))
    return {name: folder / name for name in ("bf16", "static", "ct_nvfp4", "int4")}


MIX = {
    "*.self_attn.{q_b_proj,o_proj}": "static", "*.layers.0.mlp.*": "static", "*.mlp.experts.*": "ct_nvfp4",
    "*.layers.1.mlp.experts.{0..2}.*": "int4", "*.layers.2.mlp.experts.*": "static", "*.shared_experts.*": "ct_nvfp4",
    "*.layers.2.mlp.shared_experts.*": "static",
}  # fmt: skip
"""Lines of a recipe for these releases, with all else in BF16."""
