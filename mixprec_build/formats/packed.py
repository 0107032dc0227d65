"""What compressed-tensors stores: how its config groups declare modules, and its packed Int4 and Int8.

Its FP8 and Int8 that are not packed are the formats of :mod:`.fp8` and :mod:`.int8`.

With ``pack = 32 / bits`` and ``G = K / group_size``, a packed weight (``pack-quantized``) is:

=====================  =======  =================  =====================================================
tensor                 dtype    shape              holds
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
layout: compressed-tensors 0.20.0, ``compressors/pack_quantized/base.py``; of config groups and what their targets
match: ``quantization/quant_config.py`` and ``utils/match.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any

from .base import Axes, Axis, Format, FormatError, Reader, check_tensor, last_word, only_leaves, shape_text
from .config_groups import Scheme, scheme_of
from .marlin import FLOATS, expert_shape_limits, half_range, linear_shape_limits, tile, unpack

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..storage.module import StoredModule

__all__ = ["Packed"]

_GROUP_SIZES = (-1, 32, 64, 128)


# Packed weights


@dataclass(frozen=True, slots=True)
class Packed(Format):
    """``pack-quantized``. ``group_size`` is -1 where one group spans all inputs (strategy ``channel``)."""

    bits: int
    group_size: int
    sym: bool
    actorder: bool
    """Whether inputs are grouped by ``weight_g_idx``."""

    @property
    def kind(self) -> str:
        return f"ct_int{self.bits}"

    @property
    def folds(self) -> bool:
        return True  # llm-compressor's AWQ

    @property
    def pack(self) -> int:
        """Values in one 32-bit word."""
        return 32 // self.bits

    @classmethod
    def recognise(cls, module: StoredModule, quantization: Mapping[str, object]) -> Packed | None:
        if module.tensors.get("weight_packed") is None or module.tensors["weight_packed"].dtype != "I32":
            return None
        scheme = scheme_of(module, quantization)
        if scheme is None:
            raise FormatError("weight_packed, but quantization_config has no config_groups that say how")
        if scheme.format != "pack-quantized" or scheme.type != "int" or scheme.activations != "none":
            with_ = "" if scheme.activations == "none" else f" with {scheme.activations} activations"
            raise FormatError(
                f"{shape_text('weight_packed', module)} of {scheme.described}{with_} is not read, only pack-quantized "
                "Int4 and Int8 with unquantized activations"
            )
        found = _packed(scheme.bits, scheme, FormatError)
        found.check(module)
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Packed:
        sym, actorder, group_size = data["sym"], data["actorder"], data["group_size"]
        if type(sym) is not bool or type(actorder) is not bool:
            raise ValueError(f"sym {brief(sym)} and actorder {brief(actorder)} must be true or false")
        bits = {"ct_int4": 4, "ct_int8": 8}[data["kind"]]
        return cls(bits, _group_size(group_size, ValueError), sym, actorder)

    def to_json(self) -> dict[str, object]:
        return {"kind": self.kind, "group_size": self.group_size, "sym": self.sym, "actorder": self.actorder}

    def check(self, module: StoredModule) -> None:
        known = {"weight_packed", "weight_scale", "weight_shape", "bias"}
        if not self.sym:
            known.add("weight_zero_point")
        if self.actorder:
            known.add("weight_g_idx")
        only_leaves(module, known, f"{self.kind}{'' if self.sym else ' (asymmetric)'}")
        for leaf in sorted(known - {"bias", "weight_shape"}):
            if leaf not in module.tensors:
                raise FormatError(f"{self.kind} needs {leaf}")
        for leaf in ("weight_packed", "weight_scale"):
            if len(module.tensors[leaf].shape) != 2:
                raise FormatError(f"{shape_text(leaf, module)}: two dimensions were expected")
        n, words = module.tensors["weight_packed"].shape
        k = words * self.pack
        groups = 1 if self.group_size == -1 else -(-k // self.group_size)
        each = f"groups of {self.group_size}" if self.group_size != -1 else "one group"
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
        if "bias" in module.tensors:
            check_tensor(module, "bias", FLOATS, (n,), f"for {n} outputs")

    def shape(self, module: StoredModule) -> tuple[int, ...]:
        n, words = module.tensors["weight_packed"].shape
        return n, words * self.pack

    def axes(self, leaf: str) -> Axes:
        # Where inputs lie in groups anywhere, whoever holds some of them needs the scales of all groups.
        group = None if self.actorder or self.group_size == -1 else Axis(1, self.group_size)
        return {
            "weight_packed": Axes(n=Axis(0), k=Axis(1, self.pack)),
            "weight_scale": Axes(n=Axis(0), k=group),
            "weight_zero_point": Axes(n=Axis(0, self.pack), k=group),
            "weight_g_idx": Axes(k=Axis(0)),
            "weight_shape": Axes(),
            "bias": Axes(n=Axis(0)),
        }[leaf]

    def tile(self, *, experts: bool) -> tuple[int, int]:
        return tile(self.group_size, experts=experts)

    def filler(self, leaf: str) -> int:
        return half_range(self.bits) if leaf == "weight_packed" else 0

    @property
    def scattered(self) -> bool:
        return self.actorder

    def turned(self, leaf: str) -> bool:
        return leaf in ("weight_packed", "weight_scale")  # compressed_tensors_wNa16_moe.py, create_weights

    def _kernel_limits(self) -> list[str]:
        """What no CUDA kernel of SGLang's runs, whatever the shape (marlin_utils.py)."""
        limits = []
        if not self.sym and self.bits != 4:
            limits.append(f"asymmetric {self.kind} has no CUDA kernel in SGLang, only 4 bit has")
        if not self.sym and self.actorder:
            limits.append("weight_g_idx with zero points has no CUDA kernel in SGLang")
        if self.group_size not in _GROUP_SIZES:
            limits.append(f"group size {self.group_size} has no CUDA kernel in SGLang, only -1, 32, 64 and 128 have")
        return limits

    def linear_limits(self, parts: Sequence[StoredModule]) -> list[str]:
        limits = self._kernel_limits()
        for part in parts:
            if "weight_shape" not in part.tensors:
                limits.append(f"{last_word(part)} has no weight_shape, and SGLang waits for one")
        n = sum(self.shape(part)[0] for part in parts)
        return limits + linear_shape_limits(n, self.shape(parts[0])[1], self.group_size)

    def expert_limits(self, parts: Sequence[StoredModule], hidden: int, intermediate: int) -> list[str]:
        limits = self._kernel_limits()
        if not self.sym:
            # compressed_tensors_wNa16_moe.py reads zero points as AWQ packs them, and untransposed
            limits.append("asymmetric experts of compressed-tensors are misread by SGLang")
        return limits + expert_shape_limits(hidden, intermediate, self.group_size)

    def value_limits(self, parts: Sequence[StoredModule], read: Reader, *, experts: bool) -> list[str]:
        import numpy as np

        limits = []
        for part in parts:
            stored = read(part.tensors["weight_shape"]) if "weight_shape" in part.tensors else None
            if stored is not None and stored.tolist() != list(self.shape(part)):
                limits.append(
                    f"weight_shape of {last_word(part)} says {stored.tolist()}, its other tensors hold "
                    f"{list(self.shape(part))}"
                )
        fused = parts[:2] if experts else parts
        orders = [read(part.tensors["weight_g_idx"]) for part in fused] if self.actorder else []
        for part, order in zip(fused[1:], orders[1:], strict=False):
            if orders[0] is not None and order is not None and not np.array_equal(orders[0], order):
                limits.append(
                    f"{last_word(fused[0])} and {last_word(part)} run with one weight_g_idx, but theirs differ"
                )
        return limits

    def dequantize(self, tensors: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        """What ``weight_shape`` says is checked when planning, and not looked at here."""
        import numpy as np

        q = unpack(tensors["weight_packed"], self.bits)  # [N, K]
        half = 1 << (self.bits - 1)
        scale = tensors["weight_scale"].astype(np.float32)
        k = q.shape[1]
        size = k if self.group_size == -1 else self.group_size
        group = tensors["weight_g_idx"] if self.actorder else np.arange(k, dtype=np.int32) // min(size, k)
        zeros = half if self.sym else unpack(tensors["weight_zero_point"].T, self.bits).T[:, group]
        weight: npt.NDArray[np.float32] = (q - zeros).astype(np.float32)
        weight *= scale[:, group]
        return weight


def _packed(bits: int, scheme: Scheme, error: type[Exception]) -> Packed:
    if bits not in (4, 8):
        raise error(f"{scheme.described} is not read, only 4 and 8 bit are")
    if scheme.strategy not in ("group", "channel"):
        raise error(f"{scheme.described} is not read: packed weights have scales by group or by channel")
    group_size = -1 if scheme.strategy == "channel" else _group_size(scheme.group_size, error)
    return Packed(bits, group_size, scheme.symmetric, scheme.actorder == "group")


def _group_size(value: object, error: type[Exception]) -> int:
    if type(value) is not int or (value != -1 and value < 1):
        raise error(f"group_size {brief(value)} of packed weights is neither -1 nor a positive number")
    return value
