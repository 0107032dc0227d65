"""AWQ, 4 bit, as AutoAWQ stores it (``version: gemm``).

With ``G = K / group_size``:

===========  =====  ============  ==============================================================
tensor       dtype  shape         holds
===========  =====  ============  ==============================================================
``qweight``  I32    ``[K, N/8]``  eight outputs in each word; from the lowest bits up they are the
                                  outputs 0, 2, 4, 6, 1, 3, 5, 7 of their eight
``qzeros``   I32    ``[G, N/8]``  zero points as they are, packed in the same order
``scales``   F16    ``[G, N]``
``bias``     F16    ``[N]``       optional
===========  =====  ============  ==============================================================

``W[n, k] = (q[k, n] - zero[k // group_size, n]) * scales[k // group_size, n]``. Source of the layout: AutoAWQ 0.2.9,
``awq/modules/linear/gemm.py``, ``WQLinear_GEMM.from_linear``.

Which modules are quantized is read off their tensors: ``modules_to_not_convert`` holds parts of names, and tools
differ in what these match (``gate`` is a part of ``gate_proj``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any

from .base import Axes, Axis, Format, FormatError, check_tensor, only_leaves, shape_text
from .marlin import FLOATS, expert_shape_limits, linear_shape_limits, tile, unpack

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..storage.module import StoredModule

__all__ = ["Awq"]


_PACK = 8
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Output -> which four bits of its word, counted from the lowest."""
_GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True, slots=True)
class Awq(Format):
    """AWQ. ``group_size`` is -1 where one group spans all inputs."""

    group_size: int

    @property
    def kind(self) -> str:
        return "awq_int4"

    @property
    def bits(self) -> int:
        return 4

    @property
    def folds(self) -> bool:
        return True

    @classmethod
    def recognise(cls, module: StoredModule, quantization: Mapping[str, object]) -> Awq | None:
        if "qweight" not in module.tensors or quantization.get("quant_method") != "awq":
            return None
        found = _settings(quantization)
        found.check(module)
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Awq:
        return cls(_group_size(data["group_size"], ValueError))

    def to_json(self) -> dict[str, object]:
        return {"kind": self.kind, "group_size": self.group_size}

    def check(self, module: StoredModule) -> None:
        only_leaves(module, {"qweight", "qzeros", "scales", "bias"}, self.kind)
        for leaf in ("qweight", "qzeros", "scales"):
            if leaf not in module.tensors:
                raise FormatError(f"{self.kind} needs {leaf}")
            if len(module.tensors[leaf].shape) != 2:
                raise FormatError(f"{shape_text(leaf, module)}: two dimensions were expected")
        k = module.tensors["qweight"].shape[0]
        groups, n = module.tensors["scales"].shape
        if n % _PACK:
            raise FormatError(f"{n} outputs do not fill whole words of {_PACK}")
        check_tensor(
            module, "qweight", ["I32"], (k, n // _PACK), f"beside {shape_text('scales', module)} (version gemm)"
        )
        due = 1 if self.group_size == -1 else -(-k // self.group_size)
        each = f"groups of {self.group_size}" if self.group_size != -1 else "one group"
        check_tensor(module, "scales", FLOATS, (due, n), f"for {k} inputs in {each}")
        check_tensor(module, "qzeros", ["I32"], (groups, n // _PACK), f"beside {shape_text('scales', module)}")
        if "bias" in module.tensors:
            check_tensor(module, "bias", FLOATS, (n,), f"for {n} outputs")

    def shape(self, module: StoredModule) -> tuple[int, ...]:
        k, words = module.tensors["qweight"].shape
        return words * _PACK, k

    def axes(self, leaf: str) -> Axes:
        group = None if self.group_size == -1 else Axis(0, self.group_size)
        return {
            "qweight": Axes(n=Axis(1, _PACK), k=Axis(0)),
            "qzeros": Axes(n=Axis(1, _PACK), k=group),
            "scales": Axes(n=Axis(1), k=group),
            "bias": Axes(n=Axis(0)),
        }[leaf]

    def tile(self, *, experts: bool) -> tuple[int, int]:
        return tile(self.group_size, experts=experts)

    def _kernel_limits(self) -> list[str]:
        # marlin_utils.py takes -1, too, but AWQ's layers divide by it (awq_moe.py, awq_marlin.py).
        if self.group_size in _GROUP_SIZES:
            return []
        return [f"group size {self.group_size} has no CUDA kernel for AWQ in SGLang, only 32, 64 and 128 have"]

    def linear_limits(self, parts: Sequence[StoredModule]) -> list[str]:
        n = sum(self.shape(part)[0] for part in parts)
        return self._kernel_limits() + linear_shape_limits(n, self.shape(parts[0])[1], self.group_size)

    def expert_limits(self, parts: Sequence[StoredModule], hidden: int, intermediate: int) -> list[str]:
        return self._kernel_limits() + expert_shape_limits(hidden, intermediate, self.group_size)

    def dequantize(self, tensors: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        q, zeros = _unpack(tensors["qweight"]), _unpack(tensors["qzeros"])
        k = q.shape[0]
        # No group is taken for larger than the weight: its size is only what a configuration says.
        size = k if self.group_size == -1 else min(self.group_size, k)
        scales = tensors["scales"].astype("float32")
        weight = (q - zeros.repeat(size, axis=0)[:k]).astype("float32")
        weight *= scales.repeat(size, axis=0)[:k]
        return weight.T


def _unpack(words: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """``[R, C]`` 32-bit words -> ``[R, C * 8]`` values, in the order of the outputs."""
    values = unpack(words, 4).reshape(words.shape[0], -1, _PACK)
    return values[:, :, list(_PLACES)].reshape(words.shape[0], -1)


def _settings(declared: Mapping[str, object]) -> Awq:
    """AutoAWQ's own names (``w_bit``, ``q_group_size``) are taken beside those of transformers."""
    bits = declared.get("bits", declared.get("w_bit"))
    if type(bits) is not int or bits != 4:
        raise FormatError(f"AWQ with {brief(bits)} bits is not read, only with 4")
    if declared.get("zero_point", True) is not True:
        raise FormatError(f"AWQ with zero_point {brief(declared['zero_point'])} is not read, only with true")
    version = declared.get("version") or declared.get("checkpoint_format") or declared.get("format") or "gemm"
    if not isinstance(version, str) or version.lower() != "gemm":
        raise FormatError(f"AWQ version {brief(version)} is not read, only gemm; quantize it again with version gemm")
    return Awq(_group_size(declared.get("group_size", declared.get("q_group_size")), FormatError))


def _group_size(value: object, error: type[Exception]) -> int:
    if type(value) is not int or (value != -1 and value < 1):
        raise error(f"AWQ group_size {brief(value)} is neither -1 nor a positive number")
    return value
