"""Layers that SGLang's class for a model names without their number (``models/hunyuan.py``).

A class makes its layers in order, so that of all layers with such a name the first that was not made yet is meant.
Loading finds out if one was not: its tensors have other names or shapes than its parameters then.
"""

from __future__ import annotations

from collections.abc import Iterable

from mixprec_build.families.base import Family
from mixprec_build.families.names import layer_of, layer_prefix

__all__ = ["UnnumberedLayers"]


class UnnumberedLayers:
    """The layers of one model, each of which is given out once.

    Args:
        modules: the checkpoint's modules.
        family: the family of SGLang's model.
    """

    def __init__(self, modules: Iterable[str], family: Family):
        names = [name for name in modules if layer_of(name) is not None]
        experts = {expert[0]: None for name in names if (expert := family.expert_of(name)) is not None}
        singles = family.joined_groups(name for name in names if family.expert_of(name) is None)
        self._experts = sorted(experts, key=_place)
        self._others = sorted(singles, key=_place)

    def next_named(self, name: str, *, experts: bool) -> str | None:
        """The next layer, by its name in the checkpoint, whose name ends with ``name``; None if there is none.

        Args:
            name: SGLang's name of the layer, without a number: ``.self_attn.qkv_proj``. It may be empty for experts.
            experts: whether the layer is one of experts.
        """
        short = name.strip(".")
        if layer_prefix(f".{short}."):
            return None
        left = self._experts if experts else self._others
        found = next((layer for layer in left if not short or layer.endswith(f".{short}")), None)
        if found is not None:
            left.remove(found)
        return found


def _place(layer: str) -> int:
    number = layer_of(f"{layer}.")
    assert number is not None
    return number
