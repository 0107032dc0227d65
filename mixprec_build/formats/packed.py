"""compressed-tensors' packed Int4 and Int8 (``pack-quantized``).

:mod:`.fp8` and :mod:`.int8` have its FP8 and Int8 that are not packed; :mod:`.config_groups` reads its configuration.

With ``pack = 32 / bits`` and ``G = K / group_size``, a packed weight (``pack-quantized``) is:

=====================  =======  =================  =====================================================
tensor                 dtype    shape              contents
=====================  =======  =================  =====================================================
``weight_packed``      I32      ``[N, K/pack]``    ``pack`` consecutive inputs in each word, lowest bits
                                                   first, plus ``2^(bits - 1)``
``weight_scale``       BF16     ``[N, G]``
``weight_shape``       I64      ``[2]``            N and K
``weight_zero_point``  I32      ``[N/pack, G]``    packed along N, plus ``2^(bits - 1)``; asymmetric only
``weight_g_idx``       I32      ``[K]``            the group of each input; ``actorder: group`` only
``bias``               BF16     ``[N]``            optional
=====================  =======  =================  =====================================================

``W[n, k] = (q[n, k] - zero[n, g]) * scale[n, g]`` with ``g = weight_g_idx[k]`` or ``k // group_size``. Source of the
layout: compressed-tensors 0.20.0, ``compressors/pack_quantized/base.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any, ClassVar

from .arrays import NUMPY, Arrays
from .base import Axes, Axis, FormatError, Kind, Reader, check_tensor, last_word, only_leaves, shape_text
from .config_groups import METHODS, Scheme, first_fitting, groups_of
from .grouped import Grouped, marlin_kind
from .marlin import FLOATS, expert_shape_limits, unpack

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..storage.module import StoredModule
    from .quantization import Quantization

__all__ = ["Packed"]


_SIZE = "group_size {} of packed weights"


@dataclass(frozen=True, slots=True)
class Packed(Grouped):
    """``pack-quantized``: the kinds ``ct_int4`` and ``ct_int8``. ``group_size`` is -1 for the strategy ``channel``."""

    name: ClassVar[str] = "compressed-tensors"
    kinds: ClassVar[Mapping[str, Kind]] = {f"ct_int{bits}": marlin_kind(bits) for bits in (4, 8)}
    leaves: ClassVar[frozenset[str]] = frozenset(
        {"weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "bias"}
    )
    methods: ClassVar[Mapping[str, Set[str] | None]] = METHODS
    name_keys: ClassVar[tuple[Callable[[str, Quantization], Hashable], ...]] = (groups_of,)
    order: ClassVar[str] = "weight_g_idx"

    bits: int
    group_size: int
    sym: bool
    actorder: bool
    """Whether inputs are grouped by ``weight_g_idx``."""

    @property
    def values_leaf(self) -> str:
        return "weight_packed"

    @property
    def kind(self) -> str:
        return f"ct_int{self.bits}"

    @property
    def folds_activation_scales(self) -> bool:
        return True  # llm-compressor's AWQ

    @classmethod
    def recognise(cls, module: StoredModule, quantization: Quantization) -> Packed | None:
        if module.tensors.get("weight_packed") is None or module.tensors["weight_packed"].dtype != "I32":
            return None
        return first_fitting(module, quantization, lambda scheme: cls._of(module, scheme))

    @classmethod
    def _of(cls, module: StoredModule, scheme: Scheme | None) -> Packed:
        if scheme is None:
            raise FormatError("weight_packed, but quantization_config has no config_groups that say how")
        stored = shape_text("weight_packed", module)
        if scheme.format == "pack-quantized" and scheme.activations != "none":
            raise FormatError(
                f"stored as W{scheme.bits}A8 ({stored} of {scheme.described}): its {scheme.bits}-bit weights are meant "
                "for activations of 8 bits, which SGLang has no CUDA kernel for with these weights; take this module "
                "from a checkpoint in Int4 with unquantized activations, in FP8 or in BF16"
            )
        if scheme.format != "pack-quantized" or scheme.type != "int":
            raise FormatError(f"{stored} of {scheme.described} is not read, only pack-quantized Int4 and Int8")
        found = _packed(scheme.bits, scheme, FormatError)
        found.check(module)
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Packed:
        sym, actorder, group_size = data["sym"], data["actorder"], data["group_size"]
        if type(sym) is not bool or type(actorder) is not bool:
            raise ValueError(f"sym {brief(sym)} and actorder {brief(actorder)} must be true or false")
        bits = {"ct_int4": 4, "ct_int8": 8}[data["kind"]]
        return cls(bits, cls._group_size(group_size, _SIZE, ValueError), sym, actorder)

    def to_json(self) -> dict[str, object]:
        return {"kind": self.kind, "group_size": self.group_size, "sym": self.sym, "actorder": self.actorder}

    def check(self, module: StoredModule) -> None:
        known = set(self.leaves)
        if self.sym:
            known.remove("weight_zero_point")
        if not self.actorder:
            known.remove("weight_g_idx")
        only_leaves(module, known, f"{self.kind}{'' if self.sym else ' (asymmetric)'}")
        for leaf in sorted(known - {"bias", "weight_shape"}):
            if leaf not in module.tensors:
                raise FormatError(f"{self.kind} needs {leaf}")
        for leaf in ("weight_packed", "weight_scale"):
            if len(module.tensors[leaf].shape) != 2:
                raise FormatError(f"{shape_text(leaf, module)}: two dimensions were expected")
        n, words = module.tensors["weight_packed"].shape
        k = words * self.pack
        groups, each = self._groups_of(k)
        check_tensor(module, "weight_packed", ["I32"], (n, words), "")
        check_tensor(module, "weight_scale", FLOATS, (n, groups), f"for {n} outputs and {k} inputs in {each}")
        if "weight_shape" in module.tensors:
            check_tensor(module, "weight_shape", ["I64", "I32"], (2,), "")
        if not self.sym:
            if n % self.pack:
                raise FormatError(f"{n} outputs do not fill whole words of {self.pack} zero points")
            due = (n // self.pack, groups)
            check_tensor(module, "weight_zero_point", ["I32"], due, f"beside {shape_text('weight_scale', module)}")
        if self.actorder:
            check_tensor(module, "weight_g_idx", ["I32"], (k,), f"for {k} inputs")
        self._check_bias(module, n)

    def shape(self, module: StoredModule) -> tuple[int, ...]:
        n, words = module.tensors["weight_packed"].shape
        return n, words * self.pack

    def axes(self, leaf: str) -> Axes:
        group = self._group_axis(1)
        return {
            "weight_packed": Axes(n=Axis(0), k=Axis(1, self.pack)),
            "weight_scale": Axes(n=Axis(0), k=group),
            "weight_zero_point": Axes(n=Axis(0, self.pack), k=group),
            "weight_g_idx": Axes(k=Axis(0)),
            "weight_shape": Axes(),
            "bias": Axes(n=Axis(0)),
        }[leaf]

    def filler(self, leaf: str) -> int:
        return self._half_where_packed(leaf)

    @property
    def act_order(self) -> bool:
        return self.actorder

    def transposed_in_experts(self, leaf: str) -> bool:
        return leaf in ("weight_packed", "weight_scale")  # compressed_tensors_wNa16_moe.py, create_weights

    def _kernel_limits(self) -> list[str]:
        limits = []
        if not self.sym and self.bits != 4:
            limits.append(f"mixprec does not serve asymmetric {self.kind}, only 4 bit")
        if not self.sym and self.actorder:
            limits.append("mixprec does not serve weight_g_idx with zero points")
        return limits + super(Packed, self)._kernel_limits()

    def linear_limits(self, parts: Sequence[StoredModule]) -> list[str]:
        shapeless = [
            f"{last_word(part)} has no weight_shape, and SGLang waits for one"
            for part in parts
            if "weight_shape" not in part.tensors
        ]
        return self._kernel_limits() + shapeless + self._marlin_limits(parts)

    def expert_limits(self, parts: Sequence[StoredModule], hidden: int, intermediate: int) -> list[str]:
        limits = self._kernel_limits()
        if not self.sym:
            # compressed_tensors_wNa16_moe.py reads zero points as AWQ packs them, and untransposed
            limits.append("asymmetric experts of compressed-tensors are misread by SGLang")
        return limits + expert_shape_limits(hidden, intermediate, self.group_size)

    @property
    def row_join_limit(self) -> str | None:
        return "and would join their weight_shape as well"

    @property
    def states_block(self) -> bool:
        return True

    def value_limits(self, parts: Sequence[StoredModule], read: Reader, *, experts: bool) -> list[str]:
        limits = []
        for part in parts:
            stored = read(part.tensors["weight_shape"]) if "weight_shape" in part.tensors else None
            if stored is not None and stored.tolist() != list(self.shape(part)):
                limits.append(
                    f"weight_shape of {last_word(part)} says {stored.tolist()}, its other tensors hold "
                    f"{list(self.shape(part))}"
                )
        return limits + (self._order_limits(parts, read, experts=experts) if self.actorder else [])

    def dequantize(self, tensors: Mapping[str, npt.NDArray[Any]], on: Arrays = NUMPY) -> npt.NDArray[np.float32]:
        """Ignores ``weight_shape``, which is checked in planning."""
        weight = on.float32(unpack(tensors["weight_packed"], self.bits, on))
        order = tensors["weight_g_idx"] if self.actorder else None
        if self.sym:
            weight -= 1 << (self.bits - 1)
        else:
            zeros = unpack(tensors["weight_zero_point"].T, self.bits, on)  # [G, N]
            weight -= self._by_input(on.float32(zeros.T), weight.shape[1], on, order)
        weight *= self._by_input(on.float32(tensors["weight_scale"]), weight.shape[1], on, order)
        return weight


def _packed(bits: int, scheme: Scheme, error: type[Exception]) -> Packed:
    if bits not in (4, 8):
        raise error(f"{scheme.described} is not read, only 4 and 8 bit are")
    if scheme.strategy not in ("group", "channel"):
        raise error(f"{scheme.described} is not read: packed weights have scales by group or by channel")
    group_size = -1 if scheme.strategy == "channel" else Packed._group_size(scheme.group_size, _SIZE, error)
    return Packed(bits, group_size, scheme.symmetric, scheme.actorder == "group")
