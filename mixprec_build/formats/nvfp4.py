"""NVFP4: 4-bit floats in blocks of 16 inputs, with two levels of scales.

===================  ==============================  ====================================
of a weight [N, K]   ModelOpt (``nvfp4``)            compressed-tensors (``ct_nvfp4``)
===================  ==============================  ====================================
values               ``weight`` U8 [N, K/2]          ``weight_packed`` U8 [N, K/2]
scales of blocks     ``weight_scale`` E4M3 [N, K/16] ``weight_scale`` E4M3 [N, K/16]
scale of all         ``weight_scale_2`` F32 [], g    ``weight_global_scale`` F32 [1], 1/g
scale of the inputs  ``input_scale`` F32 []          ``input_global_scale`` F32 [1], or BF16
===================  ==============================  ====================================

A byte holds two values, each an E2M1 (:mod:`.e2m1`).
``W[n, k] = value[n, k] * weight_scale[n, k // 16] * g``. Only W4A4, which quantizes activations too, has a scale of the
inputs; W4A16 has none. Sources of the layouts: ModelOpt 0.47,
``torch/quantization/qtensor/nvfp4_tensor.py``; compressed-tensors 0.20.0, ``compressors/nvfp4``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any, ClassVar

from .arrays import NUMPY, Arrays
from .base import Axes, Axis, Format, FormatError, Kind, Reader, check_tensor, last_word, only_leaves, shape_text
from .config_groups import METHODS, Scheme, first_fitting, groups_of
from .e2m1 import unpack_pairs
from .marlin import FLOATS, expert_shape_limits, linear_shape_limits, tile

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..storage.module import StoredModule
    from .quantization import Quantization

__all__ = ["Nvfp4"]


_BLOCK = 16
# SGLang's native kernels need Blackwell, which mixprec does not serve yet; Marlin runs it on older GPUs.
_KIND = Kind(4, words=("fp4",), kernels="Marlin, with unquantized activations", least=80, most=90)
_KEYS = {"quant_algo", "config_groups", "group_size", "quantized_layers", "quantization", "quant_mode"}
_KEYS_BESIDE_FP8 = {"quant_algo", "moe_quant_algo", "config_groups", "group_size", "quantized_layers", "expert_dtype"}
"""In ModelOpt's releases of models whose other linears stay in the FP8 of the original, and so its ``quant_method``."""


@dataclass(frozen=True, slots=True)
class _Names:
    """One producer's names of the tensors; ``kind`` is the format's kind for it."""

    kind: str
    values: str
    scale_of_all: str
    inputs: str


_NAMES = {
    "modelopt": _Names("nvfp4", "weight", "weight_scale_2", "input_scale"),
    "compressed-tensors": _Names("ct_nvfp4", "weight_packed", "weight_global_scale", "input_global_scale"),
}


@dataclass(frozen=True, slots=True)
class Nvfp4(Format):
    """The kinds ``nvfp4`` and ``ct_nvfp4``. ``producer``: ``modelopt``, or ``compressed-tensors``, which stores 1/g."""

    name: ClassVar[str] = "NVFP4"
    kinds: ClassVar[Mapping[str, Kind]] = {"nvfp4": _KIND, "ct_nvfp4": _KIND}
    leaves: ClassVar[frozenset[str]] = frozenset(
        {"weight_scale", "bias"}.union(*((n.values, n.scale_of_all, n.inputs) for n in _NAMES.values()))
    )
    experts_run_on: ClassVar[str] = "Marlin"
    # modelopt_quant.py, _SUPPORTED_ACT_STRS
    expert_activations_refused: ClassVar[frozenset[str]] = frozenset({"situ"})
    portable: ClassVar[bool] = True
    methods: ClassVar[Mapping[str, Set[str] | None]] = {
        "modelopt": _KEYS, "modelopt_fp4": _KEYS, "fp8": _KEYS_BESIDE_FP8, **METHODS,
    }  # fmt: skip
    name_keys: ClassVar[tuple[Callable[[str, Quantization], Hashable], ...]] = (groups_of,)

    producer: str
    activations: str
    """``static`` with a scale of the inputs, else ``none``."""

    @property
    def kind(self) -> str:
        return self.names.kind

    @property
    def names(self) -> _Names:
        return _NAMES[self.producer]

    @property
    def values_leaf(self) -> str:
        return self.names.values

    @property
    def has_weight(self) -> bool:
        return self.names.values == "weight"

    @property
    def folds_activation_scales(self) -> bool:
        return self.producer == "compressed-tensors"  # llm-compressor's AWQ and SmoothQuant; ModelOpt's AWQ is refused

    @classmethod
    def recognise(cls, module: StoredModule, quantization: Quantization) -> Nvfp4 | None:
        scale = module.tensors.get("weight_scale")
        for producer, names in _NAMES.items():
            values = module.tensors.get(names.values)
            if values is not None and values.dtype == "U8" and scale is not None and scale.dtype == "F8_E4M3":
                found = cls(producer, "static" if names.inputs in module.tensors else "none")
                return first_fitting(module, quantization, partial(found._checked, module))
        return None

    def _checked(self, module: StoredModule, scheme: Scheme | None) -> Nvfp4:
        if scheme is not None and (scheme.type, scheme.bits, scheme.group_size) != ("float", 4, _BLOCK):
            raise FormatError(f"stored as {self.kind}, but declared by {scheme.described}")
        self.check(module)
        return self

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Nvfp4:
        activations = data["activations"]
        if activations not in ("static", "none"):
            raise ValueError(f"activations {brief(activations)} are neither static nor none")
        (producer,) = (producer for producer, names in _NAMES.items() if names.kind == data["kind"])
        return cls(producer, activations)

    def to_json(self) -> dict[str, object]:
        return {"kind": self.kind, "activations": self.activations}

    def check(self, module: StoredModule) -> None:
        names = self.names
        if "pre_quant_scale" in module.tensors:
            raise FormatError(
                f"{shape_text('pre_quant_scale', module)}: stored as ModelOpt's NVFP4_AWQ, whose inputs are to be "
                "multiplied by this first, which SGLang's Marlin kernels do not; take this module from a checkpoint in "
                "NVFP4, FP8 or BF16"
            )
        due = {names.values, "weight_scale", names.scale_of_all}
        only_leaves(module, due | {names.inputs, "bias"}, self.kind)
        for leaf in sorted(due):
            if leaf not in module.tensors:
                raise FormatError(f"{self.kind} needs {leaf}")
        if len(module.tensors[names.values].shape) != 2:
            raise FormatError(f"{shape_text(names.values, module)}: two dimensions were expected")
        n, k = self.shape(module)
        if k % _BLOCK:
            raise FormatError(f"{k} inputs are no multiple of the block of {_BLOCK}")
        check_tensor(module, names.values, ["U8"], (n, k // 2), "")
        check_tensor(module, "weight_scale", ["F8_E4M3"], (n, k // _BLOCK), f"for {n} outputs and {k} inputs")
        for leaf in (names.scale_of_all, names.inputs):
            if leaf in module.tensors:
                shape = module.tensors[leaf].shape
                # Mistral-Small-4's release has those of inputs of shared experts in BF16.
                dtypes = ["F32", "BF16"] if leaf == names.inputs else ["F32"]
                check_tensor(module, leaf, dtypes, shape if shape in ((), (1,)) else (1,), "")
        if (names.inputs in module.tensors) != (self.activations == "static"):
            have = "has" if names.inputs in module.tensors else "has no"
            raise FormatError(f"{have} {names.inputs} although its activations are declared {self.activations}")
        if "bias" in module.tensors:
            check_tensor(module, "bias", FLOATS, (n,), f"for {n} outputs")

    def shape(self, module: StoredModule) -> tuple[int, ...]:
        n, pairs = module.tensors[self.names.values].shape
        return n, 2 * pairs

    def axes(self, leaf: str) -> Axes:
        if leaf == self.names.values:
            return Axes(n=Axis(0), k=Axis(1, 2))
        if leaf == "weight_scale":
            return Axes(n=Axis(0), k=Axis(1, _BLOCK))
        return Axes(n=Axis(0)) if leaf == "bias" else Axes()

    def tile(self, *, experts: bool) -> tuple[int, int]:
        return tile(_BLOCK, experts=experts)

    def linear_limits(self, parts: Sequence[StoredModule]) -> list[str]:
        n = sum(self.shape(part)[0] for part in parts)
        return linear_shape_limits(n, self.shape(parts[0])[1], _BLOCK)

    def expert_limits(self, parts: Sequence[StoredModule], hidden: int, intermediate: int) -> list[str]:
        return expert_shape_limits(hidden, intermediate, _BLOCK)

    def value_limits(self, parts: Sequence[StoredModule], read: Reader, *, experts: bool) -> list[str]:
        """Reasons for parts of one GEMM with different g, of which Marlin takes one.

        SGLang takes the largest g of a linear, and gate's of an expert, and only warns (``modelopt_quant.py``,
        ``process_weights_after_loading``).
        """
        fused = parts[:2] if experts else parts  # gate and up; down has a GEMM of its own
        leaf = self.names.scale_of_all
        values = [read(part.tensors[leaf]) for part in fused]
        known = [(last_word(p), float(v.reshape(-1)[0])) for p, v in zip(fused, values, strict=True) if v is not None]
        if len({value for _, value in known}) < 2:
            return []
        # Without the values, which differ from expert to expert: one message for all.
        names = ", ".join(name for name, _ in known)
        return [f"{leaf} differs between {names}, which run as one GEMM, and SGLang would take one of them for all"]

    @property
    def row_join_limit(self) -> str | None:
        return f"and would keep one of their two {self.names.scale_of_all}"

    def dequantize(self, tensors: Mapping[str, npt.NDArray[Any]], on: Arrays = NUMPY) -> npt.NDArray[np.float32]:
        import numpy as np

        scale = np.float32(tensors[self.names.scale_of_all].reshape(-1)[0])
        values = unpack_pairs(tensors[self.names.values], on)
        blocks = values.reshape(len(values), -1, _BLOCK)
        with np.errstate(divide="ignore", invalid="ignore"):  # 1/g is 0 where nothing was loaded
            if self.producer == "compressed-tensors":
                scale = 1 / scale
            blocks *= (on.float32(tensors["weight_scale"]) * scale)[..., None]
        return values
