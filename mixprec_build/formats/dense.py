"""BF16, FP16 and FP32: ``weight [N, K]`` (or any other shape), optional ``bias [N]``."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .arrays import NUMPY, Arrays
from .base import Axes, Axis, Format, FormatError, Kind, only_leaves, shape_text

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..storage.module import StoredModule
    from .quantization import Quantization

__all__ = ["Dense"]


_KINDS = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_OTHER = {"F64": 64, "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64}
"""The dtypes of buffers, with their bits."""
_SCALE = "scale"
"""A parameter of that name. Beside a weight it belongs to another format."""
_GEMM = "dense GEMM, Triton for experts"


@dataclass(frozen=True, slots=True)
class Dense(Format):
    """Not quantized. ``dtype`` is the weight's safetensors dtype."""

    name: ClassVar[str] = "unquantized"
    kinds: ClassVar[Mapping[str, Kind]] = {
        "bf16": Kind(16, words=("fp16",), kernels=_GEMM, least=75),
        "fp16": Kind(16, kernels=_GEMM, least=75),
        "fp32": Kind(32, kernels="cast to the model's dtype when loaded", least=75),
        **{dtype.lower(): Kind(bits, words=None) for dtype, bits in _OTHER.items()},
    }
    leaves: ClassVar[frozenset[str]] = frozenset({"", "weight", "bias", "scale"})
    portable: ClassVar[bool] = True

    dtype: str

    @property
    def kind(self) -> str:
        return _KINDS.get(self.dtype, self.dtype.lower())

    @property
    def quantized(self) -> bool:
        return False

    @property
    def fuses_as(self) -> object:
        return "dense"  # SGLang casts each part to the model's dtype as it loads it

    @classmethod
    def recognise(cls, module: StoredModule, quantization: Quantization) -> Dense | None:
        leaves = module.tensors.keys()
        if not leaves <= cls.leaves or {"", "weight"} <= leaves or (_SCALE in leaves and len(leaves) > 1):
            return None
        leaf = _leaf(leaves)
        dtype = module.tensors[leaf].dtype
        # Integers in bare parameters are buffers (position ids, token maps), others are weights of another format.
        if dtype not in _KINDS and not (leaf == "" and dtype in _OTHER):
            return None
        found = cls(dtype)
        found.check(module)
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Dense:
        by_kind = {word: dtype for dtype, word in _KINDS.items()} | {dtype.lower(): dtype for dtype in _OTHER}
        return cls(by_kind[data["kind"]])

    def to_json(self) -> dict[str, object]:
        return {"kind": self.kind}

    def check(self, module: StoredModule) -> None:
        only_leaves(module, self.leaves, self.kind)
        weight, bias = module.tensors.get("weight"), module.tensors.get("bias")
        if weight is not None and weight.dtype != self.dtype:
            raise FormatError(f"{shape_text('weight', module)}: {self.dtype} was expected")
        if weight is not None and bias is not None and bias.shape != weight.shape[:1]:
            raise FormatError(f"{shape_text('bias', module)} does not fit {shape_text('weight', module)}")

    def shape(self, module: StoredModule) -> tuple[int, ...]:
        return module.tensors[_leaf(module.tensors)].shape

    def axes(self, leaf: str) -> Axes:
        return Axes(n=Axis(0)) if leaf == "bias" else Axes(n=Axis(0), k=Axis(1))

    def dequantize(self, tensors: Mapping[str, npt.NDArray[Any]], on: Arrays = NUMPY) -> npt.NDArray[np.float32]:
        return on.float32(tensors[_leaf(tensors)])


def _leaf(leaves: Collection[str]) -> str:
    """The module's main tensor."""
    return next(leaf for leaf in ("weight", "", "bias", _SCALE) if leaf in leaves)
