"""The tensors of one module, by the last word of their names."""

from __future__ import annotations

from collections.abc import Mapping
from sys import intern
from typing import NamedTuple

from .header import TensorInfo

__all__ = ["StoredModule", "split_name"]


# The last word of a tensor's name, when it is a part of a module and not a parameter of its own.
_LEAVES = frozenset(
    {
        "weight", "bias", "weight_scale", "weight_scale_inv", "input_scale",
        "qweight", "qzeros", "scales", "g_idx",
        "weight_packed", "weight_shape", "weight_g_idx", "weight_zero_point", "input_zero_point",
        "weight_scale_2", "weight_global_scale", "input_global_scale", "SCB",
    }
)  # fmt: skip


def split_name(tensor: str) -> tuple[str, str]:
    """``"a.b.qweight"`` -> ``("a.b", "qweight")``; a parameter like ``"a.A_log"`` is a module of its own."""
    module, _, leaf = tensor.rpartition(".")
    return (module, intern(leaf)) if leaf in _LEAVES and module else (tensor, "")


class StoredModule(NamedTuple):
    """The tensors of one module, by the last word of their names (``""`` for a bare parameter)."""

    name: str
    tensors: Mapping[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())
