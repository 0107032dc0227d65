"""The tensors of one module, by the last word of their names."""

from __future__ import annotations

from collections.abc import Mapping, Set
from sys import intern
from typing import NamedTuple

from .header import TensorInfo

__all__ = ["StoredModule", "split_name"]


def split_name(tensor: str, leaves: Set[str]) -> tuple[str, str]:
    """``"a.b.qweight"`` -> ``("a.b", "qweight")``; a parameter like ``"a.A_log"`` is a module of its own.

    ``leaves`` are the last words of names of tensors that belong to modules.
    """
    module, _, leaf = tensor.rpartition(".")
    # One string for all tensors of a module, of several checkpoints, too.
    return (intern(module), intern(leaf)) if leaf in leaves and module else (tensor, "")


class StoredModule(NamedTuple):
    """The tensors of one module, by the last word of their names (``""`` for a bare parameter)."""

    name: str
    tensors: Mapping[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        return sum([tensor.nbytes for tensor in self.tensors.values()])
