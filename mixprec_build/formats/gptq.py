"""GPTQ, 4 and 8 bit, as AutoGPTQ and GPTQModel store it.

With ``pack = 32 / bits`` and ``G = ceil(K / group_size)``:

===========  ======  ===============  ==========================================================
tensor       dtype   shape            holds
===========  ======  ===============  ==========================================================
``qweight``  I32     ``[K/pack, N]``  ``pack`` consecutive inputs in each word, lowest bits first
``qzeros``   I32     ``[G, N/pack]``  zero points, packed along N; layout ``gptq`` (v1) stores them
                                      minus one, ``gptq_v2`` as they are
``scales``   F16     ``[G, N]``
``g_idx``    I32     ``[K]``          the group of each input; ``i // group_size`` unless ``desc_act``
``bias``     F16     ``[N]``          optional
===========  ======  ===============  ==========================================================

``W[n, k] = (q[k, n] - zero[g_idx[k], n]) * scales[g_idx[k], n]``. Source of the layout: AutoGPTQ 0.7.1,
``nn_modules/qlinear/qlinear_cuda.py``, ``QuantLinear.pack``; of ``gptq_v2`` and ``dynamic``: GPTQModel,
``quantization/config.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any, ClassVar

from ..patterns.budget import Patience
from ..patterns.pattern import PatternError
from ..patterns.regexes import plain_regex
from .base import Axes, Axis, Format, FormatError, Reader, check_tensor, last_word, only_leaves, shape_text
from .keys import check_override_keys
from .marlin import FLOATS, expert_shape_limits, half_range, linear_shape_limits, tile, unpack

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..storage.module import StoredModule

__all__ = ["Gptq"]


_MARLIN_GROUP_SIZES = (-1, 32, 64, 128)
_MAX_OVERRIDES = 4096


@dataclass(frozen=True, slots=True)
class Gptq(Format):
    """GPTQ. ``group_size`` is -1 where one group spans all inputs."""

    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    layout: str
    """``gptq`` (v1, zero points stored minus one) or ``gptq_v2``."""

    @property
    def kind(self) -> str:
        return f"gptq_int{self.bits}"

    @property
    def fuses_as(self) -> object:
        # Symmetric kernels never look at the zero points, so their layout does not matter.
        return replace(self, layout="gptq") if self.sym and self.layout != "gptq" else self

    @property
    def pack(self) -> int:
        """Values in one 32-bit word."""
        return 32 // self.bits

    @classmethod
    def recognise(cls, module: StoredModule, quantization: Mapping[str, object]) -> Gptq | None:
        if "qweight" not in module.tensors:
            return None
        method = quantization.get("quant_method", "gptq")
        if method == "awq":
            return None
        if method != "gptq":
            raise FormatError(
                f"{shape_text('qweight', module)} of quant_method {brief(method)} is not read, only of gptq"
            )
        if "bits" not in quantization:
            raise FormatError(
                "GPTQ tensors, but neither config.json nor quantize_config.json says how (bits, sym, ...)"
            )
        found = _settings(_resolve_dynamic(quantization, module.name))
        found.check(module)
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Gptq:
        declared = {key: data[key] for key in ("group_size", "sym", "desc_act")}
        try:
            return _settings(
                {**declared, "bits": int(data["kind"].removeprefix("gptq_int")), "checkpoint_format": data["layout"]}
            )
        except FormatError as error:
            raise ValueError(str(error)) from error

    def to_json(self) -> dict[str, object]:
        return {
            "kind": self.kind,
            "group_size": self.group_size,
            "sym": self.sym,
            "desc_act": self.desc_act,
            "layout": self.layout,
        }

    def check(self, module: StoredModule) -> None:
        only_leaves(module, {"qweight", "qzeros", "scales", "g_idx", "bias"}, self.kind)
        for leaf in ("qweight", "qzeros", "scales"):
            if leaf not in module.tensors:
                raise FormatError(f"{self.kind} needs {leaf}")
            if len(module.tensors[leaf].shape) != 2:
                raise FormatError(f"{shape_text(leaf, module)}: two dimensions were expected")
        groups, n = module.tensors["scales"].shape
        stored_bits = module.tensors["qzeros"].shape[1] * 32 / n if n else 0
        if stored_bits in (2, 3, 4, 8) and stored_bits != self.bits:
            raise FormatError(
                f"{shape_text('qzeros', module)} beside {shape_text('scales', module)} is {stored_bits:.0f} bit, "
                f"the configuration says {self.bits}"
            )
        rows = module.tensors["qweight"].shape[0]
        k = rows * self.pack
        due = 1 if self.group_size == -1 else -(-k // self.group_size)
        check_tensor(module, "qweight", ["I32"], (rows, n), f"beside {shape_text('scales', module)}")
        each = f"groups of {self.group_size}" if self.group_size != -1 else "one group"
        check_tensor(module, "scales", FLOATS, (due, n), f"for {k} inputs in {each}")
        check_tensor(module, "qzeros", ["I32"], (groups, n // self.pack), f"beside {shape_text('scales', module)}")
        if n % self.pack:
            raise FormatError(f"{n} outputs do not fill whole words of {self.pack} zero points")
        if "g_idx" in module.tensors:
            check_tensor(module, "g_idx", ["I32"], (k,), f"for {k} inputs")
        elif self.desc_act:
            raise FormatError("desc_act, but no g_idx")
        if "bias" in module.tensors:
            check_tensor(module, "bias", FLOATS, (n,), f"for {n} outputs")

    def shape(self, module: StoredModule) -> tuple[int, ...]:
        rows, n = module.tensors["qweight"].shape
        return n, rows * self.pack

    def _kernel_limits(self) -> list[str]:
        """What no CUDA kernel of SGLang's runs, whatever the shape (marlin_utils.py)."""
        limits = []
        if not self.sym:
            limits.append("asymmetric GPTQ (sym: false) has no CUDA kernel in SGLang")
        if self.group_size not in _MARLIN_GROUP_SIZES:
            limits.append(f"group size {self.group_size} has no CUDA kernel in SGLang, only -1, 32, 64 and 128 have")
        return limits

    def axes(self, leaf: str) -> Axes:
        # In act-order an input's group is anywhere: whoever holds some inputs needs the scales of all groups.
        group = None if self.desc_act or self.group_size == -1 else Axis(0, self.group_size)
        return {
            "qweight": Axes(n=Axis(1), k=Axis(0, self.pack)),
            "qzeros": Axes(n=Axis(1, self.pack), k=group),
            "scales": Axes(n=Axis(1), k=group),
            "g_idx": Axes(k=Axis(0)),
            "bias": Axes(n=Axis(0)),
        }[leaf]

    def tile(self, *, experts: bool) -> tuple[int, int]:
        return tile(self.group_size, experts=experts)

    def filler(self, leaf: str) -> int:
        return half_range(self.bits) if leaf == "qweight" else 0

    @property
    def scattered(self) -> bool:
        return self.desc_act

    def linear_limits(self, parts: Sequence[StoredModule]) -> list[str]:
        limits = self._kernel_limits()
        return limits if not limits and self.half_only(parts) else limits + self._marlin_limits(parts)

    def half_only(self, parts: Sequence[StoredModule]) -> str | None:
        shapes = [self.shape(part) for part in parts]
        limits = self._marlin_limits(parts)
        return ", ".join(limits) if limits and self.fits_exllama([n for n, _ in shapes], shapes[0][1]) else None

    def _marlin_limits(self, parts: Sequence[StoredModule]) -> list[str]:
        # SGLang computes this and does not look at the result.
        n = sum(self.shape(part)[0] for part in parts)
        return linear_shape_limits(n, self.shape(parts[0])[1], self.group_size)

    def fits_exllama(self, outputs: Sequence[int], inputs: int) -> bool:
        """Whether SGLang's other kernel (``GPTQConfig``) multiplies by the joined parts of so many outputs, in FP16.

        It takes inputs 32 at a time, and adds the one to zero points that only the older layout leaves out.
        """
        size = inputs if self.group_size == -1 else self.group_size
        whole = all(n % self.pack == 0 for n in outputs)
        return self.layout == "gptq" and whole and inputs % 32 == 0 and size % 32 == 0 and inputs % size == 0

    def expert_limits(self, parts: Sequence[StoredModule], hidden: int, intermediate: int) -> list[str]:
        return self._kernel_limits() + expert_shape_limits(hidden, intermediate, self.group_size)

    def value_limits(self, parts: Sequence[StoredModule], read: Reader, *, experts: bool) -> list[str]:
        import numpy as np

        limits = []
        if self.sym:
            # Marlin takes the zero point of a symmetric weight for granted.
            due = (1 << (self.bits - 1)) - (self.layout == "gptq")
            word = np.uint32(sum(due << (self.bits * i) for i in range(self.pack)))
            for part in parts:
                qzeros = read(part.tensors["qzeros"])
                if qzeros is not None and (qzeros.view(np.uint32) != word).any():
                    limits.append(
                        f"declared symmetric ({self.layout}), for which every word of qzeros is {word:#010x}, but they "
                        "hold other zero points: its configuration is wrong, and SGLang would not look at them"
                    )
                    break
        if not self.desc_act:
            for part in parts:
                order = read(part.tensors["g_idx"]) if "g_idx" in part.tensors else None
                size = self.shape(part)[1] if self.group_size == -1 else self.group_size
                # All zeros stand for "none" in files that other tools converted.
                if order is not None and order.any() and (order != np.arange(len(order)) // size).any():
                    limits.append(
                        "declared without desc_act, but its g_idx does not count inputs in groups of "
                        f"{size}: its configuration is wrong, and SGLang would not look at it"
                    )
                    break
        fused = parts[:2] if experts else parts
        if self.desc_act and len(fused) > 1:
            orders = [read(part.tensors["g_idx"]) for part in fused]
            first = orders[0]
            for part, order in zip(fused[1:], orders[1:], strict=True):
                if first is not None and order is not None and not np.array_equal(first, order):
                    limits.append(
                        f"{last_word(fused[0])} and {last_word(part)} run with one g_idx, but theirs differ (desc_act)"
                    )
        return limits

    def dequantize(self, tensors: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float32]:
        import numpy as np

        q = unpack(tensors["qweight"].T, self.bits).T  # [K, N]
        zeros = unpack(tensors["qzeros"], self.bits)  # [G, N]
        if self.layout == "gptq":
            # Modulo 2^bits: a zero point of 0 is stored as all ones.
            zeros = (zeros + 1) & ((1 << self.bits) - 1)
        k = q.shape[0]
        size = k if self.group_size == -1 else self.group_size
        group = tensors["g_idx"] if "g_idx" in tensors else np.arange(k, dtype=np.int32) // size
        scales = tensors["scales"].astype(np.float32)
        return ((q - zeros[group]).astype(np.float32) * scales[group]).T


def _settings(declared: Mapping[str, object]) -> Gptq:
    bits, group_size = declared.get("bits"), declared.get("group_size", -1)
    if bits not in (4, 8):
        raise FormatError(f"GPTQ with {brief(bits)} bits is not read, only with 4 and 8")
    if type(group_size) is not int or (group_size != -1 and group_size < 1):
        raise FormatError(f"GPTQ group_size {brief(group_size)} is neither -1 nor a positive number")
    sym, desc_act = declared.get("sym", True), declared.get("desc_act", False)
    if type(sym) is not bool or type(desc_act) is not bool:
        raise FormatError(f"GPTQ sym {brief(sym)} and desc_act {brief(desc_act)} must be true or false")
    layout = declared.get("checkpoint_format") or declared.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise FormatError(f"GPTQ checkpoint_format {brief(layout)} is not read, only gptq and gptq_v2")
    return Gptq(int(bits), group_size, sym, desc_act, str(layout))


# Overrides for single modules


def _resolve_dynamic(quantization: Mapping[str, object], module: str) -> Mapping[str, object]:
    """The settings of one module: ``dynamic`` maps ``+:regex`` (or a bare regex) to overrides."""
    dynamic = quantization.get("dynamic")
    if not isinstance(dynamic, dict):
        return quantization
    try:
        override = _Dynamic.of(dynamic).find(module)
    except PatternError as error:
        raise FormatError(f"`dynamic` {error}") from error
    if override is None:
        return quantization
    check_override_keys(override)
    return {**quantization, **override}


class _Dynamic:
    """``dynamic`` of one configuration; :class:`Patience` bounds all its matches together."""

    _latest: ClassVar[_Dynamic | None] = None

    def __init__(self, dynamic: Mapping[str, object]):
        self._dynamic, self._patience = dynamic, Patience()

    @classmethod
    def of(cls, dynamic: Mapping[str, object]) -> _Dynamic:
        """One for all modules of a checkpoint, which are looked up one after another."""
        if cls._latest is None or cls._latest._dynamic is not dynamic:
            cls._latest = cls(dynamic)
        return cls._latest

    def find(self, module: str) -> Mapping[str, object] | None:
        """What the first regex that matches overrides.

        Raises:
            PatternError: one is no regex, or may take too long; or all of them have.
        """
        if len(self._dynamic) > _MAX_OVERRIDES:
            raise PatternError(f"holds more than {_MAX_OVERRIDES} regular expressions")
        with self._patience:
            for pattern, override in self._dynamic.items():
                # `-:` stands for modules left unquantized, which are recognised by their tensors.
                if not isinstance(override, dict) or pattern.startswith("-:"):
                    continue
                if plain_regex(pattern, pattern.removeprefix("+:")).match(module):
                    return override
        return None
