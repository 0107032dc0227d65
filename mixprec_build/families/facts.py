"""Reads the facts of a ``config.json``, for both packages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .base import Family
from .identity import Difference, config_differences
from .registry import find_alike, find_family
from .unknown import UNKNOWN

__all__ = ["ModelFacts"]


_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_DRAFT_LAYERS = (
    "num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", "mtp_num_layers", "num_mtp_layers",
)  # fmt: skip
_READ = (
    "model_type", "architectures", "tie_word_embeddings", "dtype", "torch_dtype", "num_hidden_layers", "hidden_size",
    "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts_per_tok",
    "linear_num_key_heads", "linear_key_head_dim", "linear_num_value_heads", "linear_value_head_dim",
    *_EXPERTS, *_DRAFT_LAYERS,
)  # fmt: skip
"""Keys of a config object of transformers' that are read."""

_WITH_HEAD = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
# Classes of transformers' that tie the head where config.json says nothing.
_TIED_BY_DEFAULT = re.compile(r"gemma|cohere|gpt2|bloom|opt$|falcon$|mpt$|starcoder2")


@dataclass(frozen=True, slots=True, eq=False)
class ModelFacts:
    """The facts of one ``config.json``. Numbers are None where it has none, or one below 1.

    Multimodal checkpoints keep the decoder's configuration in ``text_config``, whose values have precedence.
    """

    family: Family
    """By the class or ``model_type`` of the checkpoint, else of its decoder; else the family whose rules such models
    follow, or the rules for unknown models."""
    names_family: bool
    """Whether the class or ``model_type`` of the checkpoint is the family's, not only that of its decoder."""
    model_type: str
    """The decoder's; empty where there is none."""
    own_model_type: object
    """The checkpoint's, as it is in ``config.json``, of any type."""
    architectures: tuple[str, ...]
    tied_embeddings: bool
    expects_head: bool | None
    """Whether the model needs a head of its own; None if unknown."""
    dtype: str | None
    """Such as ``"bfloat16"``."""
    layers: int | None
    layers_of_a_part: int | None
    """The number of layers in the first part of ``config.json`` that has one."""
    draft_layers: int
    """The number of layers for multi-token prediction, in any part of ``config.json``."""
    hidden_size: int | None
    vocabulary: int | None
    attention_heads: int | None
    key_value_heads: int | None
    """``attention_heads`` by default."""
    head_dim: int | None
    state_keys: tuple[int, int] | None
    """Number and size of a delta net's key heads."""
    state_values: tuple[int, int] | None
    """Number and size of a delta net's value heads."""
    experts: int | None
    experts_per_token: int | None
    config: Mapping[str, object] = field(repr=False)
    """All of it as it was parsed, to be written again."""

    @classmethod
    def of(cls, config: Mapping[str, object]) -> ModelFacts:
        """The facts of a parsed ``config.json``."""
        text = config.get("text_config")
        flat = {**config, **text} if isinstance(text, dict) else config
        parts = [config, *(part for part in config.values() if isinstance(part, Mapping))]
        own_type, model_type = config.get("model_type"), flat.get("model_type")
        own_classes, classes = _strings(config.get("architectures")), _strings(flat.get("architectures"))
        own_family = find_family(own_type, own_classes)
        family = own_family or find_family(model_type)
        if family is None:
            words = [model_type, own_type, *classes]
            family = find_alike(word for word in words if isinstance(word, str)) or UNKNOWN
        dtype = flat.get("dtype", flat.get("torch_dtype"))
        grouped = flat.get("num_key_value_heads") is not None
        return cls(
            family=family,
            names_family=own_family is not None,
            model_type=str(flat.get("model_type", "")),
            own_model_type=own_type,
            architectures=classes,
            tied_embeddings=bool(flat.get("tie_word_embeddings", False)),
            expects_head=_expects_head(flat, classes, family),
            dtype=dtype if isinstance(dtype, str) else None,
            layers=_number(flat, "num_hidden_layers"),
            layers_of_a_part=_first(_number(part, "num_hidden_layers") for part in parts),
            draft_layers=max((_number(part, key) or 0 for part in parts for key in _DRAFT_LAYERS), default=0),
            hidden_size=_number(flat, "hidden_size"),
            vocabulary=_number(flat, "vocab_size"),
            attention_heads=_number(flat, "num_attention_heads"),
            key_value_heads=_number(flat, "num_key_value_heads" if grouped else "num_attention_heads"),
            head_dim=_number(flat, "head_dim"),
            state_keys=_pair(flat, "linear_num_key_heads", "linear_key_head_dim"),
            state_values=_pair(flat, "linear_num_value_heads", "linear_value_head_dim"),
            experts=_first(_number(flat, key) for key in _EXPERTS),
            experts_per_token=_number(flat, "num_experts_per_tok"),
            config=config,
        )

    @classmethod
    def of_loaded(cls, config: Any) -> ModelFacts:
        """The facts of a config object of transformers, whose class has defaults of missing keys; None for none."""
        text = getattr(config, "text_config", None)
        found: dict[str, object] = {key: getattr(config, key) for key in _READ if hasattr(config, key)}
        if text is not None:
            found["text_config"] = {key: getattr(text, key) for key in _READ if hasattr(text, key)}
        return cls.of(found)

    def differences(self, other: ModelFacts) -> list[Difference]:
        """Differences to another ``config.json``, those first that change what the model computes."""
        return config_differences(self.config, other.config)

    def file_names(self, ending: str) -> set[str]:
        """The values anywhere in it that end with ``ending``: names of files."""
        found: set[str] = set()
        level: list[object] = [self.config]
        for node in level:  # grows on the way
            if isinstance(node, Mapping):
                level.extend(node.values())
            elif isinstance(node, list):
                level.extend(node)
            elif isinstance(node, str) and node.endswith(ending):
                found.add(node)
        return found


def _number(config: Mapping[str, object], key: str) -> int | None:
    value = config.get(key)
    return value if type(value) is int and value >= 1 else None


def _pair(config: Mapping[str, object], *keys: str) -> tuple[int, int] | None:
    found = [_number(config, key) for key in keys]
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def _first(values: Any) -> int | None:
    return next((value for value in values if value is not None), None)


def _strings(value: object) -> tuple[str, ...]:
    return tuple(item for item in value if isinstance(item, str)) if isinstance(value, list | tuple) else ()


def _expects_head(config: Mapping[str, object], classes: tuple[str, ...], family: Family) -> bool | None:
    if classes and not any(name.endswith(_WITH_HEAD) for name in classes):
        return None
    tied = config.get("tie_word_embeddings")
    if isinstance(tied, bool):
        return not tied
    if _TIED_BY_DEFAULT.match(str(config.get("model_type", ""))):
        return False
    return True if family.checked else None
