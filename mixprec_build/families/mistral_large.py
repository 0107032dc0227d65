"""Mistral-Large-3, Mistral-Small-4 and Leanstral (``models/mistral_large_3.py``, ``models/pixtral.py``).

The decoder is DeepSeek-V3's, with a router of its own settings; releases have an encoder of images beside it. They are
in Mistral's own layout, whose names of tensors SGLang's class translates. In mixprec they have the names of DeepSeek-V3
from the moment that a release is opened (:mod:`mixprec_build.checkpoint.mistral_layout`).
"""

from __future__ import annotations

import re
from dataclasses import replace

from .deepseek import DEEPSEEK

__all__ = ["MISTRAL_LARGE3", "MISTRAL_LARGE3_IMAGES", "hugging_face_name"]

MISTRAL_LARGE3 = replace(
    DEEPSEEK,
    model_types=frozenset(),  # those of others, DeepSeek-V3 and Mistral-Small-3
    architectures=frozenset({"MistralLarge3ForCausalLM"}),
    draft_class=None,  # releases have no such layers, but a draft model of their own
)

MISTRAL_LARGE3_IMAGES = replace(
    MISTRAL_LARGE3,
    architectures=frozenset({"PixtralForConditionalGeneration"}),
    renamed=(("model.", "language_model.model."), ("lm_head", "language_model.lm_head")),
    left_out=("language_model.", "model."),
)

_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_ATTENTION = {
    "wq": "q_proj", "wq_a": "q_a_proj", "q_a_norm": "q_a_layernorm", "wq_b": "q_b_proj",
    "wkv_a_with_mqa": "kv_a_proj_with_mqa", "kv_a_norm": "kv_a_layernorm", "wkv_b": "kv_b_proj", "wo": "o_proj",
    # What training made of keys and values, in whose place SGLang caches their latent: named after what its class does.
    **{f"{one}_fake_quantizer": "mla_attn.mla_attn" for one in "qkv"},
}  # fmt: skip
_BLOCKS = {
    "feed_forward": "mlp", "shared_experts": "mlp.shared_experts", "experts.#": "mlp.experts.#",
}  # fmt: skip
_IN_LAYER = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "gate": "mlp.gate",
    **{f"attention.{own}": f"self_attn.{other}" for own, other in _ATTENTION.items()},
    **{f"{own}.{word}": f"{other}.{_PROJECTIONS[word]}" for own, other in _BLOCKS.items() for word in _PROJECTIONS},
}
_MODULES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    **{f"layers.#.{own}": f"model.layers.#.{other}" for own, other in _IN_LAYER.items()},
}
"""Modules in Mistral's own layout, ``#`` for a number -> their names in DeepSeek-V3."""
_LEAVES = {"qscale_weight": "weight_scale", "qscale_act": "input_scale"}
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_FAKE = re.compile(r"(.+\.)?([qkv])_fake_quantizer")


def hugging_face_name(tensor: str) -> str | None:
    """The name of a tensor of the decoder in DeepSeek-V3 for that in Mistral's own layout; None for any other name.

    No rows change places: in latent attention both layouts have pairs for rotary embedding side by side.
    """
    module, _, leaf = tensor.rpartition(".")
    numbers = iter(_NUMBER.findall(module))
    other = _MODULES.get(_NUMBER.sub("#", module))
    if other is None:
        return None
    module_name = re.sub("#", lambda _: next(numbers), other)
    fake = _FAKE.fullmatch(module)
    return f"{module_name}.{f'{fake[2]}_scale' if fake else _LEAVES.get(leaf, leaf)}"
