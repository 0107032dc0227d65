"""Presents scales of FP8 blocks that ModelOpt stores in four dimensions (``FP8_PB_WO``) in two.

``weight_scale [N / 128, 1, K / 128, 1]`` keeps the dimensions that its quantizer reduced. Its bytes are those of
``[N / 128, K / 128]``, the shape of SGLang's parameters and of other producers' scales.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..storage.header import TensorInfo

__all__ = ["without_reduced_dimensions"]

_LEAVES = ("weight_scale", "weight_scale_inv")


def without_reduced_dimensions(tensors: Mapping[str, TensorInfo]) -> tuple[Mapping[str, TensorInfo], frozenset[str]]:
    """Returns ``tensors`` with such scales in two dimensions, and the files that have them."""
    found, files = dict[str, TensorInfo](), set()
    for name in [name for name, tensor in tensors.items() if len(tensor.shape) == 4]:
        module, _, leaf = name.rpartition(".")
        scale, weight = tensors[name], tensors.get(f"{module}.weight")
        rows, one, columns, last = scale.shape
        if leaf in _LEAVES and (one, last) == (1, 1) and weight is not None and _is_fp8(weight):
            found[name] = scale._replace(shape=(rows, columns))
            files.add(scale.file)
    return {**tensors, **found} if found else tensors, frozenset(files)


def _is_fp8(weight: TensorInfo) -> bool:
    return weight.dtype == "F8_E4M3" and len(weight.shape) == 2
