"""Presents scales of the inputs of W4AFP8 experts beside their weights.

TensorRT-LLM's script names the scale of a projection's inputs as DeepSeek's own code names the projection, and its
weight as Hugging Face does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..families.base import Family
from ..storage.header import TensorInfo

__all__ = ["beside_their_weights"]

_LEAF = ".input_scale"


def beside_their_weights(
    tensors: Mapping[str, TensorInfo], family: Family
) -> tuple[Mapping[str, TensorInfo], frozenset[str]]:
    """Returns ``tensors`` with such scales named after the weights, and the files that have them.

    A scale keeps its name where its module has a weight itself, or no such weight is there.
    """
    renamed: dict[str, str] = {}
    for name in tensors:
        if name.endswith(_LEAF) and f"{(module := name.removesuffix(_LEAF))}.weight" not in tensors:
            for other in _other_spellings(module, family):
                weight = tensors.get(f"{other}.weight")
                if weight is not None and weight.dtype == "I8" and f"{other}{_LEAF}" not in tensors:
                    renamed[name] = f"{other}{_LEAF}"
    if not renamed:
        return tensors, frozenset()
    found = (t._replace(name=renamed[name]) if name in renamed else t for name, t in tensors.items())
    return {tensor.name: tensor for tensor in found}, frozenset(tensors[name].file for name in renamed)


def _other_spellings(module: str, family: Family) -> Iterator[str]:
    """Yields the names of an expert's projection in the other spellings that its family knows."""
    expert = family.expert_of(module)
    if expert is None:
        return
    block, number, word = expert
    for trio in family.projections:
        for other in family.projections:
            if other != trio and word in trio:
                same = other[trio.index(word)]
                if same is not None:
                    yield f"{block}.{number}.{same}"
