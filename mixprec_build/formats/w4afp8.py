"""W4AFP8: signed 4-bit integers in groups of 128 inputs, for experts whose activations are quantized to FP8.

====================  =====================================
of a weight [N, K]    stored as
====================  =====================================
values                ``weight`` I8 [N, K/2]
scales of groups      ``weight_scale_inv`` [N, K/128], floats
scale of the inputs   ``input_scale`` [1] or [], floats
====================  =====================================

A byte holds two values in two's complement, the lower four bits the first; ``W[n, k] = value[n, k] *
weight_scale_inv[n, k // 128]``. Linears beside the experts are in block FP8. Sources of the layout: TensorRT-LLM,
``examples/quantization/quantize_mixed_precision_moe.py``, which names the scales of inputs after DeepSeek's own modules
(:mod:`mixprec_build.checkpoint.input_scales`), and SGLang 0.5.17, ``layers/quantization/w4afp8.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from .arrays import NUMPY, Arrays
from .base import Axes, Axis, Format, FormatError, Kind, Reader, check_tensor, last_word, only_leaves, shape_text
from .marlin import unpack

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..storage.module import StoredModule
    from .quantization import Quantization

__all__ = ["W4afp8"]


_GROUP = 128
_FLOATS = ("F32", "BF16", "F16")
_KEYS = {
    "activation_scheme", "linear_activation_scheme", "moe_activation_scheme", "weight_block_size", "group_size", "fmt",
    "scale_fmt", "is_checkpoint_fp8_serialized", "is_checkpoint_w4afp8_serialized", "format",
}  # fmt: skip
_MODELOPT_KEYS = {"quant_algo", "group_size", "quantized_layers", "quantization", "quant_mode"}


@dataclass(frozen=True, slots=True)
class W4afp8(Format):
    """The kind ``w4afp8``."""

    name: ClassVar[str] = "W4AFP8"
    kinds: ClassVar[Mapping[str, Kind]] = {
        "w4afp8": Kind(4, words=("int4",), kernels="CUTLASS, experts only", least=90, most=90)
    }
    leaves: ClassVar[frozenset[str]] = frozenset({"weight", "weight_scale_inv", "input_scale"})
    methods: ClassVar[Mapping[str, Set[str] | None]] = {"w4afp8": _KEYS | _MODELOPT_KEYS, "modelopt": _MODELOPT_KEYS}
    experts_whole: ClassVar[bool] = True
    experts_run_on: ClassVar[str] = "CUTLASS"
    portable: ClassVar[bool] = True
    gated_experts_only: ClassVar[bool] = True

    @property
    def kind(self) -> str:
        return "w4afp8"

    @classmethod
    def recognise(cls, module: StoredModule, quantization: Quantization) -> W4afp8 | None:
        weight, scale = module.tensors.get("weight"), module.tensors.get("weight_scale_inv")
        if weight is None or weight.dtype != "I8" or len(weight.shape) != 2:
            return None
        if scale is None or scale.dtype not in _FLOATS:
            return None
        n, pairs = weight.shape
        exact = scale.shape == (n, -(-2 * pairs // _GROUP))
        of_rows = len(scale.shape) == 2 and scale.shape[0] == n > 1
        # Int8 has scales of blocks, of which a configuration says how large they are.
        of_blocks = quantization.get("weight_block_size") is not None
        if quantization.get("quant_method") == "blockwise_int8" or not (exact if of_blocks else of_rows):
            return None
        found = cls()
        found.check(module)
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> W4afp8:
        return cls()

    def to_json(self) -> dict[str, object]:
        return {"kind": self.kind}

    def check(self, module: StoredModule) -> None:
        if "pre_quant_scale" in module.tensors:
            raise FormatError(
                f"{shape_text('pre_quant_scale', module)}: inputs of this W4AFP8 module are to be multiplied by this "
                "first, which SGLang's kernel does not do; take this module from a checkpoint without it"
            )
        only_leaves(module, self.leaves, self.kind)
        for leaf in ("weight", "weight_scale_inv"):
            if leaf not in module.tensors:
                raise FormatError(f"{self.kind} needs {leaf}")
        if "input_scale" not in module.tensors:
            raise FormatError(
                f"{self.kind} needs input_scale, the scale that its activations are quantized with; without it SGLang "
                "would take 1, whatever their range is"
            )
        if len(module.tensors["weight"].shape) != 2:
            raise FormatError(f"{shape_text('weight', module)}: two dimensions were expected")
        n, k = self.shape(module)
        if k % _GROUP:
            raise FormatError(f"{k} inputs are no multiple of the group of {_GROUP}")
        check_tensor(module, "weight", ["I8"], (n, k // 2), "")
        why = f"for {n} outputs and {k} inputs in groups of {_GROUP}"
        check_tensor(module, "weight_scale_inv", _FLOATS, (n, k // _GROUP), why)
        shape = module.tensors["input_scale"].shape
        check_tensor(module, "input_scale", _FLOATS, shape if shape in ((), (1,)) else (1,), "")

    def shape(self, module: StoredModule) -> tuple[int, ...]:
        n, pairs = module.tensors["weight"].shape
        return n, 2 * pairs

    def axes(self, leaf: str) -> Axes:
        if leaf == "weight":
            return Axes(n=Axis(0), k=Axis(1, 2))
        return Axes(n=Axis(0), k=Axis(1, _GROUP)) if leaf == "weight_scale_inv" else Axes()

    def tile(self, *, experts: bool) -> tuple[int, int]:
        return _GROUP, _GROUP

    def linear_limits(self, parts: Sequence[StoredModule]) -> list[str]:
        return ["SGLang has a kernel for experts in W4AFP8, and none for other linears"]

    def expert_limits(self, parts: Sequence[StoredModule], hidden: int, intermediate: int) -> list[str]:
        return [
            f"its {what} size {size} is no multiple of {_GROUP}, which SGLang's W4AFP8 kernel needs"
            for what, size in (("hidden", hidden), ("intermediate", intermediate))
            if size % _GROUP
        ]

    def value_limits(self, parts: Sequence[StoredModule], read: Reader, *, experts: bool) -> list[str]:
        """Reasons for gate and up with different scales of their one input, for which SGLang's loader stops."""
        fused = parts[:2] if experts else parts
        values = [read(part.tensors["input_scale"]) for part in fused]
        known = [(last_word(p), float(v.reshape(-1)[0])) for p, v in zip(fused, values, strict=True) if v is not None]
        if len({value for _, value in known}) < 2:
            return []
        names = " and ".join(name for name, _ in known)
        return [
            f"input_scale differs between {names}, which have one input, and SGLang would take one of them for both"
        ]

    def dequantize(self, tensors: Mapping[str, npt.NDArray[Any]], on: Arrays = NUMPY) -> npt.NDArray[np.float32]:
        weight = on.float32(unpack(tensors["weight"], 4, on) ^ 8)
        weight -= 8  # codes are two's complement
        groups = weight.reshape(len(weight), -1, _GROUP)
        groups *= on.float32(tensors["weight_scale_inv"])[..., None]
        return weight
