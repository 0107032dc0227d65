"""Reads the facts of a ``config.json``, for both packages."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from .base import Family
from .cache import CACHE_KEYS, CacheFacts, UnknownCache, cache_facts
from .draft_layers import DRAFT_KEYS, declared_drafts
from .identity import Difference, config_differences
from .registry import find_alike, find_family
from .unknown import UNKNOWN

__all__ = ["ModelFacts"]


_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_SHARED_HEADS = ("num_key_value_heads", "num_attention_groups")
_READ = (
    "model_type", "architectures", "tie_word_embeddings", "dtype", "torch_dtype", "num_hidden_layers", "hidden_size",
    "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_experts_per_tok",
    "linear_num_key_heads", "linear_key_head_dim", "linear_num_value_heads", "linear_value_head_dim",
    "n_groups", "ssm_state_size", "mamba_num_heads", "mamba_head_dim", "hybrid_layer_pattern",
    "swa_num_attention_heads", "swa_num_key_value_heads", "attention_other_setting", "num_global_key_value_heads",
    "o_groups",
    *_SHARED_HEADS, *_EXPERTS, *DRAFT_KEYS, *CACHE_KEYS,
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
    heads_of: Mapping[int, tuple[int, int]]
    """Layer -> its attention heads and key-value heads, where a layer has others than most."""
    index_heads: int | None
    """The number of heads of the index of sparse attention."""
    output_groups: int | None
    """The number of groups in which the output of attention is projected."""
    head_dim: int | None
    state_keys: tuple[int, int] | None
    """Number and size of a delta net's key heads, or of a Mamba block's groups."""
    state_values: tuple[int, int] | None
    """Number and size of a delta net's value heads, or of a Mamba block's heads."""
    experts: int | None
    experts_per_token: int | None
    cache: CacheFacts | UnknownCache
    encoder: tuple[int, int] | None
    """Number of layers and width of an encoder of images, by the keys that SGLang asks for, or its defaults."""
    encoder_sizes: Mapping[str, int]
    """All numbers of the encoder, by the keys of ``vision_config``; empty without one."""
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
        family = _with_limits(family, _limited_layers(flat, family.activation.limits))
        dtype = flat.get("dtype", flat.get("torch_dtype"))
        shared = _first(_number(flat, key) for key in (*_SHARED_HEADS, "num_attention_heads"))
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
            draft_layers=max(declared_drafts(config).values(), default=0),
            hidden_size=_number(flat, "hidden_size"),
            vocabulary=_number(flat, "vocab_size"),
            attention_heads=_number(flat, "num_attention_heads"),
            key_value_heads=shared,
            heads_of=_heads_of(flat, family, shared),
            index_heads=_at(flat, "sparse_attention_config.sparse_num_index_heads"),
            output_groups=_number(flat, "o_groups"),
            head_dim=_number(flat, "head_dim"),
            state_keys=_pair(flat, "linear_num_key_heads", "linear_key_head_dim")
            or _pair(flat, "n_groups", "ssm_state_size"),
            state_values=_pair(flat, "linear_num_value_heads", "linear_value_head_dim")
            or _pair(flat, "mamba_num_heads", "mamba_head_dim"),
            experts=_first(_number(flat, key) for key in _EXPERTS),
            experts_per_token=_number(flat, "num_experts_per_tok"),
            cache=cache_facts(flat, (*own_classes, *classes)),
            encoder=_encoder(config.get("vision_config")),
            encoder_sizes=_numbers(config.get("vision_config")),
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


def _limited_layers(config: Mapping[str, object], key: str) -> frozenset[int]:
    limits = config.get(key) if key else None
    if not isinstance(limits, list | tuple):
        return frozenset()
    return frozenset(layer for layer, limit in enumerate(limits) if isinstance(limit, int | float) and limit > 0)


@lru_cache(maxsize=64)
def _with_limits(family: Family, layers: frozenset[int]) -> Family:
    """``family`` with limits on activations in ``layers``: the same object for the same, as families are compared."""
    return replace(family, activation=replace(family.activation, limited_layers=layers)) if layers else family


def _number(config: Mapping[str, object], key: str) -> int | None:
    value = config.get(key)
    return value if type(value) is int and value >= 1 else None


def _pair(config: Mapping[str, object], *keys: str) -> tuple[int, int] | None:
    found = [_number(config, key) for key in keys]
    return None if found[0] is None or found[1] is None else (found[0], found[1])


def _heads_of(config: Mapping[str, object], family: Family, shared: int | None) -> dict[int, tuple[int, int]]:
    """The heads of layers of another kind: their number, and that of key-value heads."""
    other = family.other_heads
    kinds = config.get(other.kinds) if other is not None else None
    if other is None or not isinstance(kinds, list | tuple):
        return {}
    query, key_value = _at(config, other.query), _at(config, other.key_value) or shared
    if query is None or key_value is None:
        return {}
    return {layer: (query, key_value) for layer, kind in enumerate(kinds) if kind == other.kind}


def _at(config: Mapping[str, object], path: str) -> int | None:
    """The number at a key, or at one within an object: ``attention_other_setting.num_attention_heads``."""
    outer, _, key = path.rpartition(".")
    node = config.get(outer) if outer else config
    return _number(node, key) if isinstance(node, Mapping) else None


def _encoder(config: object) -> tuple[int, int] | None:
    """``adjust_mem_fraction_for_vlm`` of server_args.py in SGLang 0.5.17 has these keys and defaults."""
    if not isinstance(config, Mapping):
        return None
    return _number(config, "num_hidden_layers") or 24, _number(config, "hidden_size") or 1024


def _numbers(config: object) -> dict[str, int]:
    named = config.items() if isinstance(config, Mapping) else ()
    return {key: value for key, value in named if isinstance(key, str) and type(value) is int and value >= 1}


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
