"""All model families, and the search for that of a model."""

from __future__ import annotations

from collections.abc import Iterable

from .apertus import APERTUS
from .bailing import BAILING_MOE
from .base import Family
from .cohere import COHERE
from .deepseek import DEEPSEEK, DEEPSEEK_RELATIVES, DEEPSEEK_V32
from .deepseek_v4 import DEEPSEEK_V4
from .ernie import ERNIE
from .gemma import GEMMA3, GEMMA3_IMAGES, GEMMA4, GEMMA4_IMAGES
from .glm import GLM4_MOE, GLM_DSA
from .gpt_oss import GPT_OSS
from .granite import GRANITE, GRANITE_MOE
from .hunyuan import HUNYUAN
from .internlm2 import INTERNLM2
from .kimi import KIMI_K3, KIMI_K25
from .llama import LLAMA
from .llama4 import LLAMA4
from .longcat import LONGCAT
from .mimo import MIMO_V2
from .minimax import MINIMAX_M2, MINIMAX_M3, MINIMAX_M3_IMAGES
from .mistral import MISTRAL3
from .mistral_large import MISTRAL_LARGE3, MISTRAL_LARGE3_IMAGES
from .mixtral import MIXTRAL
from .moving import GPT2, INTERNVL, PERSIMMON
from .nemotron import NEMOTRON_H
from .olmoe import OLMOE
from .phi import PHI3, PHIMOE
from .qwen2 import QWEN2, QWEN2_MOE
from .qwen3 import QWEN3
from .qwen3_5 import QWEN3_5, QWEN3_5_TEXT
from .qwen3_next import QWEN3_NEXT
from .qwen3_vl import QWEN3_VL
from .step import STEP, STEP35, STEP37

__all__ = ["FAMILIES", "checked_types", "cuttable_types", "find_alike", "find_family", "register", "replicated_types"]

FAMILIES: tuple[Family, ...] = (
    LLAMA, MIXTRAL, QWEN2, QWEN2_MOE, QWEN3, QWEN3_VL, QWEN3_NEXT, QWEN3_5, QWEN3_5_TEXT,
    DEEPSEEK, DEEPSEEK_V32, DEEPSEEK_V4, KIMI_K25, KIMI_K3, GLM4_MOE, GLM_DSA, MINIMAX_M2, MINIMAX_M3,
    MINIMAX_M3_IMAGES,
    MISTRAL_LARGE3, MISTRAL_LARGE3_IMAGES, MISTRAL3, ERNIE, OLMOE, GEMMA3, GEMMA3_IMAGES, COHERE, PHI3, GRANITE,
    LLAMA4, NEMOTRON_H, MIMO_V2, BAILING_MOE, HUNYUAN, GRANITE_MOE, PHIMOE, LONGCAT, GEMMA4, GEMMA4_IMAGES,
    APERTUS, INTERNLM2, STEP35, STEP37, GPT_OSS,
    # not checked
    STEP, DEEPSEEK_RELATIVES, INTERNVL, PERSIMMON, GPT2,
)  # fmt: skip


def register(family: Family) -> None:
    """Adds a family from outside this package. Raises :class:`ValueError` where one of its names is taken."""
    global FAMILIES
    for other in FAMILIES:
        taken = (family.model_types & other.model_types) | (family.architectures & other.architectures)
        if taken:
            raise ValueError(f"there is a family for {', '.join(sorted(taken))}")
    FAMILIES = (*FAMILIES, family)


def find_family(model_type: object, architectures: Iterable[str] = ()) -> Family | None:
    """The family of one of the model classes, else of a ``model_type``, else of a class for draft layers.

    None where there is none of them.
    """
    named = {*architectures}
    of_class = (family for family in FAMILIES if named & family.architectures)
    of_type = (family for family in FAMILIES if isinstance(model_type, str) and model_type in family.model_types)
    of_drafts = (
        family for family in FAMILIES if family.draft_class and named.intersection(family.draft_class.architectures)
    )
    return next(of_class, None) or next(of_type, None) or next(of_drafts, None)


def find_alike(words: Iterable[str]) -> Family | None:
    """The family whose rules a model follows by its ``words``, types or classes; None where there is none."""
    small = [word.lower() for word in words]
    return next((f for f in FAMILIES if f.alike and any(word.startswith(f.alike) for word in small)), None)


def checked_types() -> list[str]:
    """The ``model_type`` of all families that were compared with SGLang's model code, sorted."""
    return sorted(model_type for family in FAMILIES if family.checked for model_type in family.model_types)


def cuttable_types() -> list[str]:
    """The ``model_type`` of families that can be cut for ranks, sorted."""
    return sorted(model_type for family in FAMILIES if family.can_be_cut for model_type in family.model_types)


def replicated_types() -> list[str]:
    """The ``model_type`` of families whose attention SGLang can keep in replicas, sorted."""
    return sorted(model_type for family in FAMILIES if family.attention_replicas for model_type in family.model_types)
