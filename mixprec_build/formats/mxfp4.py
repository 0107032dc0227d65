"""MXFP4: 4-bit floats in blocks of 32 inputs, each with a power of two as its scale.

===================  =======================  ==============================  ===========================
of a weight [N, K]   Quark                    compressed-tensors              DeepSeek-V4
===================  =======================  ==============================  ===========================
values               ``weight`` U8 [N, K/2]   ``weight_packed`` U8 [N, K/2]   ``weight`` I8 [N, K/2]
scales of blocks     ``weight_scale`` U8      ``weight_scale`` U8 [N, K/32]   ``scale`` F8_E8M0 [N, K/32]
                     [N, K/32]
===================  =======================  ==============================  ===========================

gpt-oss keeps all experts of a layer in ``gate_up_proj_blocks`` U8 [E, 2I, H/32, 16] and so on, in which rows of gate
and up alternate. Taken apart (:mod:`..checkpoint.experts_apart`) they have Quark's names, and each has a ``bias`` [N].

A byte of the values holds two, each an E2M1 (:mod:`.e2m1`); a scale is an E8M0 (:mod:`.e8m0`).
``W[n, k] = value[n, k] * 2 ** (scale[n, k // 32] - 127)``. The bytes are the same whatever their dtype, so a producer
may use any of these names and dtypes. Activations, which some producers quantize as well, have no tensors. Sources of
the layouts: Quark 0.10, ``torch/utils/pack.py``; compressed-tensors 0.20.1, ``compressors/mxfp4``; DeepSeek-V4's
``inference/convert.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any, ClassVar

from .arrays import NUMPY, Arrays
from .base import Axes, Axis, Format, FormatError, Kind, check_tensor, only_leaves, shape_text
from .config_groups import METHODS, Scheme, first_fitting, groups_of
from .e2m1 import unpack_pairs
from .e8m0 import E8M0_DTYPES, powers_of_two
from .marlin import FLOATS, expert_shape_limits, tile
from .quark import METHODS as QUARK
from .quark import check_algorithms

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..storage.module import StoredModule
    from .quantization import Quantization

__all__ = ["Mxfp4"]


_BLOCK = 32
_VALUES = ("weight", "weight_packed")
_VALUES_DTYPES = ("U8", "I8")
_SCALES = ("weight_scale", "scale", "weight_scale_inv")
# SGLang's classes run it on GPUs of Hopper alone; on later ones by native kernels, which mixprec does not serve yet.
_KIND = Kind(4, words=("fp4",), kernels="Marlin, for experts, with unquantized activations in BF16", least=90, most=90)


@dataclass(frozen=True, slots=True)
class Mxfp4(Format):
    """The kind ``mxfp4``. Fields are the names and dtypes of the two tensors."""

    name: ClassVar[str] = "MXFP4"
    kinds: ClassVar[Mapping[str, Kind]] = {"mxfp4": _KIND}
    leaves: ClassVar[frozenset[str]] = frozenset({*_VALUES, *_SCALES, "bias"})
    experts_run_on: ClassVar[str] = "Marlin"
    portable: ClassVar[bool] = True
    gated_experts_only: ClassVar[bool] = True
    methods: ClassVar[Mapping[str, Set[str] | None]] = {**QUARK, **METHODS, "mxfp4": frozenset()}
    name_keys: ClassVar[tuple[Callable[[str, Quantization], Hashable], ...]] = (groups_of,)

    values: str = "weight"
    values_dtype: str = "U8"
    scales: str = "weight_scale"
    scales_dtype: str = "U8"

    @property
    def kind(self) -> str:
        return "mxfp4"

    @property
    def values_leaf(self) -> str:
        return self.values

    @property
    def has_weight(self) -> bool:
        return self.values == "weight"

    @property
    def folds_activation_scales(self) -> bool:
        return self.scales == "weight_scale"  # AWQ and SmoothQuant of Quark and llm-compressor

    @classmethod
    def recognise(cls, module: StoredModule, quantization: Quantization) -> Mxfp4 | None:
        for values in _VALUES:
            stored = module.tensors.get(values)
            if stored is None or stored.dtype not in _VALUES_DTYPES:
                continue
            scales = [(leaf, t) for leaf in _SCALES if (t := module.tensors.get(leaf)) is not None]
            # Int8 with scales of blocks in E8M0 would have fewer rows of these.
            if len(scales) == 1 and scales[0][1].dtype in E8M0_DTYPES and scales[0][1].shape[:1] == stored.shape[:1]:
                found = cls(values, stored.dtype, scales[0][0], scales[0][1].dtype)
                check_algorithms(quantization)
                return first_fitting(module, quantization, partial(found._checked, module))
        return None

    def _checked(self, module: StoredModule, scheme: Scheme | None) -> Mxfp4:
        if scheme is not None and (scheme.type, scheme.bits, scheme.group_size) != ("float", 4, _BLOCK):
            raise FormatError(f"stored as {self.kind}, but declared by {scheme.described}")
        self.check(module)
        return self

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Mxfp4:
        known = {
            "values": _VALUES, "values_dtype": _VALUES_DTYPES, "scales": _SCALES, "scales_dtype": E8M0_DTYPES,
        }  # fmt: skip
        found = {key: data.get(key, options[0]) for key, options in known.items()}
        found["scales_dtype"] = data.get("scales_dtype", "U8")
        for key, value in found.items():
            if value not in known[key]:
                raise ValueError(f"{key} {brief(value)} is none of {', '.join(known[key])}")
        return cls(**found)

    def to_json(self) -> dict[str, object]:
        own = {key: getattr(self, key) for key in ("values", "values_dtype", "scales", "scales_dtype")}
        usual = Mxfp4()
        return {"kind": self.kind} | {key: value for key, value in own.items() if value != getattr(usual, key)}

    def check(self, module: StoredModule) -> None:
        only_leaves(module, {self.values, self.scales, "bias"}, self.kind)
        for leaf in (self.values, self.scales):
            if leaf not in module.tensors:
                raise FormatError(f"{self.kind} needs {leaf}")
        if len(module.tensors[self.values].shape) != 2:
            raise FormatError(f"{shape_text(self.values, module)}: two dimensions were expected")
        n, k = self.shape(module)
        if k % _BLOCK:
            raise FormatError(f"{k} inputs are no multiple of the block of {_BLOCK}")
        check_tensor(module, self.values, [self.values_dtype], (n, k // 2), "")
        why = f"for {n} outputs and {k} inputs"
        check_tensor(module, self.scales, [self.scales_dtype], (n, k // _BLOCK), why)
        if "bias" in module.tensors:
            check_tensor(module, "bias", FLOATS, (n,), f"for {n} outputs")

    def shape(self, module: StoredModule) -> tuple[int, ...]:
        n, pairs = module.tensors[self.values].shape
        return n, 2 * pairs

    def sglang_name(self, leaf: str) -> str:
        return "weight_scale_inv" if leaf == "scale" else leaf  # as SGLang's class for DeepSeek-V4 loads it

    def axes(self, leaf: str) -> Axes:
        if leaf == self.values:
            return Axes(n=Axis(0), k=Axis(1, 2))
        if leaf == self.scales:
            return Axes(n=Axis(0), k=Axis(1, _BLOCK))
        return Axes(n=Axis(0)) if leaf == "bias" else Axes()

    def tile(self, *, experts: bool) -> tuple[int, int]:
        return tile(_BLOCK, experts=experts)

    def linear_limits(self, parts: Sequence[StoredModule]) -> list[str]:
        return ["SGLang has no kernel for linears in MXFP4 on this generation of GPUs (Hopper), only for experts"]

    def expert_limits(self, parts: Sequence[StoredModule], hidden: int, intermediate: int) -> list[str]:
        # Experts with biases are padded, as SGLang pads those of gpt-oss.
        if any("bias" in part.tensors for part in parts) and hidden % 64 == 0:
            hidden = 128
        return expert_shape_limits(hidden, intermediate, _BLOCK)

    def dequantize(self, tensors: Mapping[str, npt.NDArray[Any]], on: Arrays = NUMPY) -> npt.NDArray[np.float32]:
        import numpy as np

        values = unpack_pairs(tensors[self.values], on)
        blocks = values.reshape(len(values), -1, _BLOCK)
        with np.errstate(over="ignore"):
            blocks *= powers_of_two(tensors[self.scales], on)[..., None]
        return values
