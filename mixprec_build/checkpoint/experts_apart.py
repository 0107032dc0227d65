"""Takes tensors of all experts of a layer, as some releases store them, apart into tensors of single experts.

``...experts.gate_up_proj [E, 2I, H]`` is E times gate ``[I, H]`` and up ``[I, H]``, one after the other: each is a
range of bytes, which can be copied like any other tensor. They get the names of releases that store single experts,
which SGLang's loaders accept, too. A mix must not have both: SGLang's loader for Qwen3.5 skips single experts once it
has seen a tensor of all of them (``is_fused_expert`` in ``models/qwen3_5.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ..families.base import Family
from ..families.parts import StackedExperts
from ..storage.header import TensorInfo

__all__ = ["take_experts_apart"]

_DTYPES = ("BF16", "F16", "F32")
"""Unquantized dtypes: scales would have to be taken apart with their weights."""


def take_experts_apart(
    tensors: Mapping[str, TensorInfo], family: Family, experts: int | None
) -> tuple[dict[str, TensorInfo], frozenset[str]]:
    """Replaces tensors of all experts of a layer by one for each projection of an expert.

    Returns the tensors, and the files that the replaced ones are in. ``experts`` is the number of experts in a layer. A
    tensor of another shape or dtype than its family's releases have stays as it is.
    """
    if not family.stacked_experts:
        return dict(tensors), frozenset()
    found: dict[str, TensorInfo] = {}
    files = set()
    for name, tensor in tensors.items():
        stacked = family.stacked_experts_of(name)
        if stacked is not None and _can_be_cut(tensor, stacked, experts):
            files.add(tensor.file)
            found |= {part.name: part for part in _parts(tensor, stacked)}
        else:
            found[name] = tensor
    return found, frozenset(files)


def _can_be_cut(tensor: TensorInfo, stacked: StackedExperts, experts: int | None) -> bool:
    if stacked.interleaved or tensor.dtype not in _DTYPES or len(tensor.shape) != 3 or tensor.nbytes == 0:
        return False
    return tensor.shape[0] == experts and tensor.shape[2 if stacked.transposed else 1] % len(stacked.parts) == 0


def _parts(tensor: TensorInfo, stacked: StackedExperts) -> Iterator[TensorInfo]:
    """The weights ``[N, K]`` of all experts, in the order of their bytes."""
    experts, count = tensor.shape[0], len(stacked.parts)
    columns, rows = tensor.shape[1:] if stacked.transposed else tensor.shape[:0:-1]
    block = tensor.name.rpartition(".")[0]
    shape = (rows // count, columns)
    nbytes = tensor.nbytes // (experts * count)
    for expert in range(experts):
        start = tensor.start + expert * count * nbytes
        for at, part in enumerate(stacked.parts):
            name = f"{block}.{expert}.{part}.weight"
            if stacked.transposed:
                where = at * shape[0], rows
                yield TensorInfo(name, tensor.dtype, shape, tensor.file, start, nbytes, where)
            else:
                yield TensorInfo(name, tensor.dtype, shape, tensor.file, start + at * nbytes, nbytes)
