"""Takes tensors of all experts of a layer, as some releases store them, apart into tensors of single experts.

``...experts.gate_up_proj [E, 2I, H]`` is E times gate ``[I, H]`` and up ``[I, H]``, one after the other: each is a
range of bytes, which can be copied like any other tensor. Where outputs of gate and up alternate, each is every other
row. They get the names of releases that store single experts, which most of SGLang's loaders accept, too. A mix must
not have both: SGLang's loader for Qwen3.5 skips single experts once it has seen a tensor of all of them
(``is_fused_expert`` in ``models/qwen3_5.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

from ..families.base import Family
from ..families.parts import StackedExperts
from ..storage.header import TensorInfo

__all__ = ["take_experts_apart"]


def take_experts_apart(
    tensors: Mapping[str, TensorInfo], family: Family, experts: int | None
) -> tuple[Mapping[str, TensorInfo], frozenset[str]]:
    """Replaces tensors of all experts of a layer by one for each projection of an expert.

    Returns the tensors, and the files that the replaced ones are in. ``experts`` is the number of experts in a layer. A
    tensor of another shape or dtype than its family's releases have stays as it is.
    """
    if not family.stacked_experts:
        return tensors, frozenset()
    found: dict[str, TensorInfo] = {}
    files = set()
    for name, tensor in tensors.items():
        stacked = family.stacked_experts_of(name)
        if stacked is not None and _can_be_cut(tensor, stacked, experts, tensors):
            files.add(tensor.file)
            found |= {part.name: part for part in _parts(tensor, stacked, family.experts)}
        else:
            found[name] = tensor
    return found, frozenset(files)


def _can_be_cut(
    tensor: TensorInfo, stacked: StackedExperts, experts: int | None, tensors: Mapping[str, TensorInfo]
) -> bool:
    if tensor.dtype not in stacked.dtypes or len(tensor.shape) < 2 or tensor.nbytes == 0:
        return False
    if stacked.transposed and len(tensor.shape) != 3:
        return False
    if len(tensor.shape) == 2 and stacked.leaf == "weight":
        return False
    home = tensor.name.rpartition(".")[0]
    if stacked.together_with and not any(f"{home}.{other}" in tensors for other in stacked.together_with):
        return False
    return tensor.shape[0] == experts and tensor.shape[2 if stacked.transposed else 1] % len(stacked.parts) == 0


def _parts(tensor: TensorInfo, stacked: StackedExperts, word: str) -> Iterator[TensorInfo]:
    """The tensors of all experts, outputs first: ``[N, K]`` of a weight, ``[N]`` of a bias."""
    experts, count = tensor.shape[0], len(stacked.parts)
    block = stacked.block_of(tensor.name, word)
    rows = tensor.shape[2 if stacked.transposed else 1]
    rest = tensor.shape[1:2] if stacked.transposed else tensor.shape[2:]
    shape = (rows // count, prod(rest)) if rest else (rows // count,)
    nbytes = tensor.nbytes // (experts * count)
    step = count if stacked.interleaved else 1
    for expert in range(experts):
        start = tensor.start + expert * count * nbytes
        for at, part in enumerate(stacked.parts):
            name = f"{block}.{expert}.{part}.{stacked.leaf}"
            if stacked.transposed:
                where = at if stacked.interleaved else at * shape[0], rows
                yield TensorInfo(name, tensor.dtype, shape, tensor.file, start, nbytes, where, step)
            else:
                first = start + at * (nbytes // shape[0] if stacked.interleaved else nbytes)
                yield TensorInfo(name, tensor.dtype, shape, tensor.file, first, nbytes, step=step)
