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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any, ClassVar

from ..patterns import Patience, PatternError
from .base import Axes, Axis, Format, FormatError, Reader, check_tensor, last_word, only_leaves, shape_text
from .marlin import FLOATS, expert_shape_limits, half_range, linear_shape_limits, tile, unpack
from .regexes import plain_regex

if TYPE_CHECKING:
    import re

    import numpy as np
    import numpy.typing as npt

    from ..checkpoint import StoredModule

__all__ = ["METHOD", "Packed", "Scheme", "scheme_of"]

METHOD = "compressed-tensors"
_GROUP_SIZES = (-1, 32, 64, 128)
_MAX_GROUPS = 256
_MAX_TARGETS = 100_000
_MAX_REGEXES = 4096


# Config groups


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one config group stores its modules."""

    name: str
    format: str
    """``pack-quantized``, ``float-quantized``, ``int-quantized``, ..."""
    type: str
    """``int`` or ``float``."""
    bits: int
    strategy: str
    """``tensor``, ``channel``, ``group`` or ``block``."""
    symmetric: bool
    group_size: int | None
    block: object
    actorder: str | None
    """``group`` where inputs are grouped by ``weight_g_idx``."""
    activations: str
    """``none``, ``dynamic`` or ``static``."""

    @classmethod
    def from_json(cls, name: str, data: object, format_: object) -> Scheme:
        """Raises :class:`FormatError` on nonsense, and for what nothing here reads."""
        at = f"config group {name!r:.100}"
        if not isinstance(data, Mapping):
            raise FormatError(f"{at} is not an object")
        own = data.get("format")
        format_ = format_ if own is None else own
        if not isinstance(format_, str):
            raise FormatError(f"{at} has the format {brief(format_)}")
        weights = data.get("weights")
        if not isinstance(weights, Mapping):
            raise FormatError(f"{at} says nothing of its weights")

        def value(key: str, kind: type, default: object) -> Any:
            found = weights.get(key, default)
            if found is not None and type(found) is not kind:
                raise FormatError(f"{at} has weights of {key} {brief(found)}")
            return default if found is None else found

        actorder = weights.get("actorder")
        if actorder is not None and not isinstance(actorder, str | bool):
            raise FormatError(f"{at} has weights of actorder {brief(actorder)}")
        if value("dynamic", bool, False):
            raise FormatError(f"{at} has dynamic weights, which are stored unquantized")
        grouped = actorder is True or (isinstance(actorder, str) and actorder.lower() in ("group", "dynamic"))
        group_size = value("group_size", int, None)
        strategy = value("strategy", str, None)
        if strategy is None:  # which compressed-tensors then infers
            strategy = "tensor" if group_size is None else "channel" if group_size == -1 else "group"
        return cls(
            name,
            format_,
            value("type", str, "int"),
            value("num_bits", int, 8),
            strategy,
            value("symmetric", bool, True),
            group_size,
            weights.get("block_structure"),
            "group" if grouped else None,
            _activations(at, data.get("input_activations")),
        )

    @property
    def described(self) -> str:
        """For messages."""
        format_, type_, strategy = (word[:30] for word in (self.format, self.type, self.strategy))
        return f"config group {self.name!r:.100} ({format_}, {brief(self.bits)} bit {type_}, {strategy})"


def _activations(at: str, data: object) -> str:
    if data is None:
        return "none"
    if not isinstance(data, Mapping):
        raise FormatError(f"{at} has input_activations {brief(data)}")
    bits, dynamic, symmetric = data.get("num_bits", 8), data.get("dynamic", False), data.get("symmetric", True)
    if bits != 8:
        raise FormatError(f"{at} quantizes activations to {brief(bits)} bits; only 8 are read")
    if symmetric is False:
        raise FormatError(f"{at} quantizes activations asymmetrically, which is not read")
    return "dynamic" if dynamic else "static"


class _Groups:
    """The config groups of one configuration, by what their targets match."""

    _latest: ClassVar[_Groups | None] = None

    def __init__(self, quantization: Mapping[str, object]):
        self._quantization, self._patience = quantization, Patience()
        groups, ignore = quantization.get("config_groups"), quantization.get("ignore") or []
        if not isinstance(groups, Mapping) or not groups or len(groups) > _MAX_GROUPS:
            raise FormatError(f"config_groups {brief(groups)} are not 1 to {_MAX_GROUPS} named groups")
        self._ignored, self._unread = self._targets(ignore, "ignore")
        self._groups = []
        for name, data in groups.items():
            targets = data.get("targets") if isinstance(data, Mapping) else None
            self._groups.append((str(name), data, *self._targets(targets, f"config group {name!r:.100}")))
        self._schemes: dict[str, Scheme] = {}

    @classmethod
    def of(cls, quantization: Mapping[str, object]) -> _Groups:
        """One for all modules of a checkpoint, which are looked up one after another."""
        if cls._latest is None or cls._latest._quantization is not quantization:
            cls._latest = cls(quantization)
        return cls._latest

    @staticmethod
    def _targets(words: object, at: str) -> tuple[frozenset[str], list[str]]:
        """Names (of modules or of classes), and regular expressions."""
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise FormatError(f"{at}: targets {brief(words)} are not a list of names")
        regexes = [word for word in words if word.startswith("re:")]
        if len(words) > _MAX_TARGETS or len(regexes) > _MAX_REGEXES:
            raise FormatError(f"{at} holds more than {_MAX_TARGETS} names or {_MAX_REGEXES} regular expressions")
        return frozenset(words) - frozenset(regexes), regexes

    def find(self, module: str) -> Scheme:
        """The scheme of a linear.

        Raises:
            FormatError: it is ignored, or no group's; or the configuration is nonsense.
        """
        try:
            with self._patience:
                if module in self._ignored or self._matches(self._unread, module):
                    raise FormatError("stored quantized, although `ignore` of quantization_config covers it")
                # A name goes before a regular expression, and that before a class.
                name, data = next(self._candidates(module), (None, None))
        except PatternError as error:
            raise FormatError(f"quantization_config {error}") from error
        if name is None:
            raise FormatError("stored quantized, but the targets of no config group cover it")
        if name not in self._schemes:
            self._schemes[name] = Scheme.from_json(name, data, self._quantization.get("format"))
        return self._schemes[name]

    def _candidates(self, module: str) -> Iterator[tuple[str, object]]:
        yield from ((name, data) for name, data, names, _ in self._groups if module in names)
        yield from ((name, data) for name, data, _, regexes in self._groups if self._matches(regexes, module))
        yield from ((name, data) for name, data, names, _ in self._groups if "Linear" in names)

    @staticmethod
    def _matches(regexes: Sequence[str], module: str) -> bool:
        patterns: Iterator[re.Pattern[str]] = (plain_regex(text, text.removeprefix("re:")) for text in regexes)
        return any(pattern.match(module) for pattern in patterns)


def scheme_of(module: StoredModule, quantization: Mapping[str, object]) -> Scheme | None:
    """What compressed-tensors' configuration says of a quantized linear; None for another method's configuration, and
    for one without groups.

    Raises:
        FormatError: it says that the linear is not quantized, or nonsense.
    """
    if quantization.get("quant_method") != METHOD or quantization.get("config_groups") is None:
        return None
    return _Groups.of(quantization).find(module.name)


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
