"""Draft layers: those for multi-token prediction (MTP), with which SGLang drafts tokens for speculative decoding.

Releases append them to the decoder (``model.layers.61`` of 61 layers) or call them ``mtp``. Beside a decoder layer
each has modules of its own, which join the embedding of the next token with the hidden state.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from .names import layer_prefix

__all__ = [
    "BAILING_NEXTN",
    "DRAFT_KEYS",
    "ERNIE_MTP",
    "LONGCAT_MTP",
    "MIMO_MTP",
    "MIMO_V2_MTP",
    "NEMOTRON_MTP",
    "NEXTN",
    "NEXTN_OF_RELATIVES",
    "OWN_WORDS",
    "PLAIN",
    "QWEN_MTP",
    "STEP_MTP",
    "V4_MTP",
    "DraftLayout",
    "DraftPlace",
    "declared_drafts",
    "guess_layout",
    "place_of_draft",
    "with_declared_drafts",
    "without_marks",
]

DRAFT_KEYS = (
    "num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "mtp_num_layers", "num_mtp_layers",
)  # fmt: skip
"""Keys of ``config.json`` with the number of draft layers."""

_MARK = re.compile(r"(^|\.)(mtp|nextn|eagle)(?=[._])")
_LAYER = re.compile(r"(?<![^.])(layers\.)(\d+)(?=\.)")
_LAST_NUMBER = re.compile(r"(?:(.+)\.)?([^.]+)\.(\d+)")


@dataclass(frozen=True, slots=True)
class DraftLayout:
    """The modules that a draft class of SGLang's needs beside those of a decoder layer."""

    in_each: tuple[str, ...] = ()
    """Their names within each draft layer."""
    once: tuple[str, ...] = ()
    """Their names below ``mtp.``, for all draft layers together."""
    plain: frozenset[str] = frozenset()
    """Those that are a ``torch.nn.Linear``, without quantization."""
    number_last: bool = False
    """Whether the number of the layer is at the end of their names, as in ``model.mtp_linear_proj.0``."""
    own_layers: bool = False
    """Whether its decoder layers are of a kind that the model has none of; ``in_each`` names all of them then."""
    quantized: bool = True
    """Whether the class passes a quantization config to the decoder layers in it."""
    other: tuple[str, str] = ("", "")
    """The first word of modules that only draft layers of another kind have, for which mixprec knows no class, and what
    these are called."""


# Of the draft classes in sglang/srt/models, as 0.5.15.post1, 0.5.17 and 0.5.23 have them
NEXTN = DraftLayout(("eh_proj", "enorm", "hnorm", "shared_head.norm"), plain=frozenset({"eh_proj"}))
"""``deepseek_nextn.py``, ``glm4_moe_nextn.py``."""
STEP_MTP = replace(NEXTN, quantized=False)
"""``step3p5_mtp.py``."""
MIMO_V2_MTP = DraftLayout(("eh_proj", "enorm", "hnorm", "final_layernorm"), plain=frozenset({"eh_proj"}))
"""``mimo_v2_nextn.py``, ``hunyuan_v3_nextn.py``."""
BAILING_NEXTN = replace(MIMO_V2_MTP, plain=frozenset())
"""``bailing_moe_nextn.py``, where ``eh_proj`` may be quantized."""
QWEN_MTP = DraftLayout(once=("fc", "norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"), plain=frozenset({"fc"}))
"""``qwen3_5_mtp.py``, ``qwen3_next_mtp.py``, ``qwen3_moe_mtp.py``, ``exaone_moe_mtp.py``."""
MIMO_MTP = DraftLayout(
    ("input_proj", "token_layernorm", "hidden_layernorm", "final_layernorm"), plain=frozenset({"input_proj"})
)
"""``mimo_mtp.py``."""
ERNIE_MTP = DraftLayout(
    ("mtp_linear_proj", "mtp_emb_norm", "mtp_hidden_norm"), plain=frozenset({"mtp_linear_proj"}), number_last=True
)
"""``ernie4_eagle.py``."""
LONGCAT_MTP = DraftLayout(
    (
        "eh_proj", "enorm.m", "hnorm.m", "input_layernorm", "post_attention_layernorm", "self_attn.q_a_proj",
        "self_attn.q_a_layernorm", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.kv_a_layernorm",
        "self_attn.kv_b_proj", "self_attn.o_proj", "transformer_layer.mlp.gate_proj",
        "transformer_layer.mlp.up_proj", "transformer_layer.mlp.down_proj",
    ),
    once=("norm",),
    own_layers=True,
)  # fmt: skip
"""``longcat_flash_nextn.py``, where ``eh_proj`` may be quantized."""
NEMOTRON_MTP = DraftLayout()
"""``nemotron_h_mtp.py``: the first of several blocks of a layer has ``eh_proj``, which may be quantized."""
V4_MTP = DraftLayout(
    ("e_proj", "h_proj", "enorm", "hnorm", "norm", "hc_head_fn", "hc_head_base", "hc_head_scale"),
    other=("main_proj", "stages of DSpark"),
)
"""``deepseek_v4_nextn.py``, where ``e_proj`` and ``h_proj`` may be quantized."""
NEXTN_OF_RELATIVES = DraftLayout(("eh_proj", "enorm", "hnorm"))
"""What the classes of DeepSeek's relatives have in common: ``eh_proj`` may be quantized in some of them."""

_LAYOUTS = (NEXTN, MIMO_V2_MTP, QWEN_MTP, MIMO_MTP, ERNIE_MTP)
PLAIN = frozenset().union(*(layout.plain for layout in _LAYOUTS))
"""The same where the class is not known."""
OWN_WORDS = frozenset(part.partition(".")[0] for layout in _LAYOUTS for part in layout.in_each)
"""First words within a layer of what draft layers have beside a decoder layer."""


class DraftPlace(NamedTuple):
    """The place of a module in draft layers."""

    stack: str
    """All before the number of its layer, such as ``model.layers`` or ``mtp.layers``; else before its name."""
    layer: int | None
    """None for a module of all draft layers together, such as ``mtp.fc``."""
    inner: str
    """Its name within the layer."""


def place_of_draft(name: str) -> DraftPlace:
    """The place of a module of draft layers."""
    prefix = layer_prefix(name)
    if prefix:
        stack, _, number = prefix[:-1].rpartition(".")
        return DraftPlace(stack, int(number), name[len(prefix) :].removeprefix("transformer."))  # Step's releases
    at_end = _LAST_NUMBER.fullmatch(name)  # model.mtp_linear_proj.0
    if at_end:
        return DraftPlace(at_end[1] or "", int(at_end[3]), at_end[2])
    found = _MARK.search(name)
    end = name.find(".", found.end()) if found else -1
    return DraftPlace(name[:end], None, name[end + 1 :]) if end >= 0 else DraftPlace("", None, name)


def guess_layout(places: Iterable[DraftPlace]) -> DraftLayout | None:
    """The layout of which these modules have most; None where they have nothing of any."""
    inner = {place.inner for place in places}
    best = max(_LAYOUTS, key=lambda layout: len(inner.intersection(layout.in_each + layout.once)))
    return best if inner.intersection(best.in_each + best.once) else None


def without_marks(name: str, layers: int | None, prefixes: Iterable[str] = ()) -> str:
    """The name of a module of draft layers with ``x`` in place of what shows that it is one.

    That is the number of an appended layer, a word like ``mtp``, or one of ``prefixes``. A glob that matches both
    names matches other modules as well as draft layers, and does not mean these.
    """
    prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    name = re.sub(r"\w", "x", prefix) + name[len(prefix) :]
    name = _MARK.sub(lambda found: found[1] + "x" * len(found[2]), name)
    if layers is None:
        return name
    return _LAYER.sub(lambda found: found[1] + ("x" * len(found[2]) if int(found[2]) >= layers else found[2]), name)


def declared_drafts(config: Mapping[str, object]) -> dict[tuple[str, ...], int]:
    """Path of each key that declares draft layers, in any part of a ``config.json`` -> their number; 0 for none."""
    found = {}
    parts = [((), config), *(((name,), part) for name, part in config.items() if isinstance(part, Mapping))]
    for path, part in parts:
        for key in DRAFT_KEYS:
            if key in part:
                value = part[key]
                found[(*path, key)] = value if type(value) is int and value > 0 else 0
    return found


def with_declared_drafts(
    config: Mapping[str, object], layers: int, like: Mapping[str, object] | None = None
) -> dict[str, Any]:
    """A copy of a ``config.json`` that declares as many draft layers, with its own keys or with those of ``like``.

    With ``layers`` 0 it declares none: classes of configurations have defaults for keys that are missing, so its keys
    stay. Where neither has a key, nothing is declared.
    """
    written: dict[str, Any] = deepcopy(dict(config))
    own = declared_drafts(config)
    paths = [path for path in own if layers or own[path]]
    if not paths and layers and like is not None:
        theirs = (path for path, number in declared_drafts(like).items() if number)
        paths = [path for path in theirs if all(isinstance(written.get(part), dict) for part in path[:-1])]
    for *parts, key in paths:
        node = written
        for part in parts:
            node = node[part]
        node[key] = layers
    return written
