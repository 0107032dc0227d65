"""Finds tensors of all experts of a layer."""

from __future__ import annotations

from collections.abc import Collection

from .base import Family
from .names import layer_prefix

__all__ = ["block_of_stacked"]


def block_of_stacked(family: Family, name: str, shapes: Collection[tuple[int, ...]], experts: int | None) -> str | None:
    """The block, ``model.layers.3.mlp.experts``, whose experts are all in the module ``name``; None for other modules.

    Args:
        shapes: those of the module's tensors. A stacked projection is ``[E, N, K]`` or ``[E, K, N]``.
        experts: the number of experts in a layer.
    """
    if not any(len(shape) == 3 and min(shape) > 1 for shape in shapes) or not layer_prefix(name):
        return None
    before, found, rest = name.partition(f".{family.experts}.")
    if found and not rest.partition(".")[0].isdecimal():
        return f"{before}.{family.experts}"
    # Granite has `block_sparse_moe.input_linear`.
    same = experts is not None and experts > 1 and any(len(shape) == 3 and shape[0] == experts for shape in shapes)
    return name.rpartition(".")[0] if same and not found else None
