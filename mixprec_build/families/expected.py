"""Decides which tensors SGLang's models load: one rule for the planner, files of ranks and strict loading.

A plan must have all that a model needs, and every tensor that is expected must reach a parameter, or the server stops.
"""

from __future__ import annotations

import re
from typing import Protocol

from .names import layer_of

__all__ = [
    "is_buffer",
    "is_expected",
    "is_for_drafts",
    "is_tied_head",
    "layers_due",
    "left_out_of_builds",
    "ties_head",
    "tower_of",
]


_MOST_LAYERS = 10_000

_BUFFERS = (".inv_freq", ".cos_cached", ".sin_cached")
_ENDS_LEFT_OUT = ("_scale", "_zero_point", ".input_scale_ub")
"""Ends of all names that the next two match."""
_CACHE_SCALE = re.compile(r".+\.([kvq]_scale|kv_scale|[kv]_zero_point|[kvq]_proj\.(output_scale|[kv]_scale))")
_UPPER_BOUND = re.compile(r".+\.input_scale_ub")
_DRAFTS = re.compile(r"(.+\.)?(mtp|mtp_block|nextn|eagle)(\.|_).+")

_TOWER = re.compile(
    r"(?:(?:model|language_model|thinker)\.)*"
    r"(vision|visual|audio|speech|vit|image|vision_\w+|visual_\w+|audio_\w+|speech_\w+|vit_\w+|image_\w+|"
    r"multi_modal_projector|mm_projector|multimodal_projector|patch_merge_mlp|patch_merger|pre_mm_projector_norm|"
    r"embed_vision|embed_audio)(?:\..+)?"
)


class _Family(Protocol):
    @property
    def head(self) -> str: ...
    def is_draft(self, name: str, layers: int | None) -> bool: ...


class _Model(Protocol):
    """The part of :class:`.facts.ModelFacts` that is needed here."""

    @property
    def family(self) -> _Family: ...
    @property
    def layers(self) -> int | None: ...
    @property
    def tied_embeddings(self) -> bool: ...
    @property
    def expects_head(self) -> bool | None: ...


def is_expected(name: str, model: _Model, layers: range | None = None) -> bool:
    """Whether a model loads a tensor of its checkpoint; with ``layers``, a model that has only these layers.

    Towers are loaded where the server creates them, see :func:`tower_of`.
    """
    if is_buffer(name) or left_out_of_builds(name) is not None or is_tied_head(name, model):
        return False
    if model.family.is_draft(name, model.layers):
        return False
    layer = layer_of(name)
    return layer is None or layers is None or layer in layers


def layers_due(model: _Model) -> range | None:
    """The numbers of all layers that a model needs; later ones are for drafts.

    None where ``config.json`` has no plausible number of layers.
    """
    return None if model.layers is None or model.layers > _MOST_LAYERS else range(model.layers)


def ties_head(model: _Model) -> bool:
    """Whether the model's head is its embedding, so that SGLang loads none."""
    return model.tied_embeddings or model.expects_head is False


def is_tied_head(name: str, model: _Model) -> bool:
    """Whether a module or tensor is the head of a model that ties it to the embedding."""
    return ties_head(model) and (name == model.family.head or name.startswith(f"{model.family.head}."))


def is_buffer(name: str) -> bool:
    """Whether a tensor is a buffer that SGLang computes itself."""
    return name.endswith(_BUFFERS)


def is_for_drafts(name: str) -> bool:
    """Whether a tensor belongs to layers for speculative decoding beside the model's (``mtp.*``).

    Draft models load them; the model itself skips them.
    """
    # Looked for first: this is asked of every tensor several times.
    has_word = "mtp" in name or "nextn" in name or "eagle" in name
    return has_word and _DRAFTS.fullmatch(name) is not None


def left_out_of_builds(name: str) -> str | None:
    """The reason why a plan does not take a tensor by itself; None if it does.

    Scales of the KV cache are taken with their attention.
    """
    if not name.endswith(_ENDS_LEFT_OUT):
        return None
    if _CACHE_SCALE.fullmatch(name):
        return "scales of an FP8 KV cache: those of attention from elsewhere, or of a kind that SGLang does not load"
    if _UPPER_BOUND.fullmatch(name):
        return "an upper bound of FBGEMM's that SGLang does not use"
    return None


def tower_of(name: str) -> str | None:
    """The tower that a tensor belongs to, such as ``"vision_model"``; None for tensors of the decoder.

    Towers are encoders of images or sound, and their projectors. A server for text only does not create them.
    """
    found = _TOWER.fullmatch(name)
    return found[1] if found else None
