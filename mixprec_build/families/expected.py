"""Which tensors of a checkpoint SGLang's models do not take: the one rule of the planner and of strict loading.

What the planner takes along beyond that must reach a parameter, or the server stops.
"""

from __future__ import annotations

import re

__all__ = ["is_buffer", "is_for_drafts", "left_out_of_builds", "tower_of"]


_BUFFERS = (".inv_freq", ".cos_cached", ".sin_cached")
_CACHE_SCALE = re.compile(r".+\.([kvq]_scale|kv_scale|[kv]_zero_point|[kvq]_proj\.(output_scale|[kv]_scale))")
_UPPER_BOUND = re.compile(r".+\.input_scale_ub")
_DRAFTS = re.compile(r"(.+\.)?(mtp|mtp_block|nextn|eagle)(\.|_).+")

_TOWER = re.compile(
    r"(?:(?:model|language_model|thinker)\.)*"
    r"(vision|visual|audio|speech|vit|image|vision_\w+|visual_\w+|audio_\w+|speech_\w+|vit_\w+|image_\w+|"
    r"multi_modal_projector|mm_projector|multimodal_projector)\..+"
)


def is_buffer(name: str) -> bool:
    """Whether a tensor is one that SGLang computes itself, wherever it is stored."""
    return name.endswith(_BUFFERS)


def is_for_drafts(name: str) -> bool:
    """Whether a tensor is of layers for speculative decoding that stand beside the model's (``mtp.*``): draft models
    load them, the model itself passes over them."""
    return _DRAFTS.fullmatch(name) is not None


def left_out_of_builds(name: str) -> str | None:
    """Why no recipe takes a tensor along by itself; None for those that it does. Scales of the KV cache come with their
    attention."""
    if _CACHE_SCALE.fullmatch(name):
        return "scales of an FP8 KV cache: those of attention from elsewhere, or of a kind that SGLang does not load"
    if _UPPER_BOUND.fullmatch(name):
        return "an upper bound of FBGEMM's that SGLang does not use"
    return None


def tower_of(name: str) -> str | None:
    """``"vision_model"`` of a tensor that is part of an encoder of images or sound, or of what joins one to the
    decoder: a server that is to answer text only does not make these. None for all others."""
    found = _TOWER.fullmatch(name)
    return found[1] if found else None
