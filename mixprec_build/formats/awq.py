"""AWQ, 4 bit, as AutoAWQ stores it (``version: gemm``).

With ``G = K / group_size``:

===========  =====  ============  ==============================================================
tensor       dtype  shape         contents
===========  =====  ============  ==============================================================
``qweight``  I32    ``[K, N/8]``  eight outputs in each word; from the lowest bits up they are the
                                  outputs 0, 2, 4, 6, 1, 3, 5, 7 of their eight
``qzeros``   I32    ``[G, N/8]``  zero points as they are, packed in the same order
``scales``   F16    ``[G, N]``
``bias``     F16    ``[N]``       optional
===========  =====  ============  ==============================================================

``W[n, k] = (q[k, n] - zero[k // group_size, n]) * scales[k // group_size, n]``. Source of the layout: AutoAWQ 0.2.9,
``awq/modules/linear/gemm.py``, ``WQLinear_GEMM.from_linear``.

Tensors show which modules are quantized: ``modules_to_not_convert`` has parts of names, and tools differ in what these
match (``gate`` is a part of ``gate_proj``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Set
from dataclasses import dataclass, field
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any, ClassVar

from . import auto_round
from .arrays import NUMPY, Arrays
from .base import Axes, Axis, FormatError, Kind, check_tensor, only_leaves, shape_text
from .grouped import Grouped, marlin_kind
from .marlin import FLOATS

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..storage.module import StoredModule
    from .quantization import Quantization

__all__ = ["Awq"]


_PACK = 8
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Output -> place of its four bits in the word, counted from the lowest."""
_SIZE = "AWQ group_size {}"
_KEYS = {
    "bits", "w_bit", "group_size", "q_group_size", "zero_point", "format", "do_fuse", "modules_to_fuse",
    "fuse_max_seq_len", "exllama_config", "backend", "meta", "duo_scaling", "dataset", "sym", "desc_act",
    "pack_dtype", "dynamic", "checkpoint_format", "n_parallel_calib_samples", "max_calib_samples", "max_calib_seq_len",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Awq(Grouped):
    """The kind ``awq_int4``."""

    name: ClassVar[str] = "AWQ"
    kinds: ClassVar[Mapping[str, Kind]] = {"awq_int4": marlin_kind(4)}
    leaves: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales", "bias"})
    methods: ClassVar[Mapping[str, Set[str] | None]] = {"awq": _KEYS, auto_round.METHOD: auto_round.KEYS}
    name_keys: ClassVar[tuple[Callable[[str, Quantization], Hashable], ...]] = (auto_round.entry_of,)
    # marlin_utils.py takes -1, too, but AWQ's layers divide by it (awq_moe.py, awq_marlin.py).
    group_sizes: ClassVar[tuple[int, ...]] = (32, 64, 128)
    kernels_for: ClassVar[str] = " for AWQ"

    group_size: int
    bits: int = field(default=4, init=False, repr=False, compare=False)

    @property
    def values_leaf(self) -> str:
        return "qweight"

    @property
    def kind(self) -> str:
        return "awq_int4"

    @property
    def folds_activation_scales(self) -> bool:
        return True

    @classmethod
    def recognise(cls, module: StoredModule, quantization: Quantization) -> Awq | None:
        if "qweight" not in module.tensors:
            return None
        method = quantization.get("quant_method")
        if method == auto_round.METHOD:
            declared = auto_round.settings_for(module, quantization, awq=True)
        else:
            declared = dict(quantization) if method == "awq" else None
        if declared is None:
            return None
        found = _settings(declared)
        found.check(module)
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Awq:
        return cls(cls._group_size(data["group_size"], _SIZE, ValueError))

    def to_json(self) -> dict[str, object]:
        return {"kind": self.kind, "group_size": self.group_size}

    def check(self, module: StoredModule) -> None:
        only_leaves(module, self.leaves, self.kind)
        self._check_matrices(module, ("qweight", "qzeros", "scales"))
        k = module.tensors["qweight"].shape[0]
        groups, n = module.tensors["scales"].shape
        if n % _PACK:
            raise FormatError(f"{n} outputs do not fill whole words of {_PACK}")
        check_tensor(
            module, "qweight", ["I32"], (k, n // _PACK), f"beside {shape_text('scales', module)} (version gemm)"
        )
        due, each = self._groups_of(k)
        check_tensor(module, "scales", FLOATS, (due, n), f"for {k} inputs in {each}")
        check_tensor(module, "qzeros", ["I32"], (groups, n // _PACK), f"beside {shape_text('scales', module)}")
        self._check_bias(module, n)

    def shape(self, module: StoredModule) -> tuple[int, ...]:
        k, words = module.tensors["qweight"].shape
        return words * _PACK, k

    def axes(self, leaf: str) -> Axes:
        group = self._group_axis(0)
        return {
            "qweight": Axes(n=Axis(1, _PACK), k=Axis(0)),
            "qzeros": Axes(n=Axis(1, _PACK), k=group),
            "scales": Axes(n=Axis(1), k=group),
            "bias": Axes(n=Axis(0)),
        }[leaf]

    @property
    def row_join_limit(self) -> str | None:
        return "by rows, and packed formats hold outputs in columns"

    def dequantize(self, tensors: Mapping[str, npt.NDArray[Any]], on: Arrays = NUMPY) -> npt.NDArray[np.float32]:
        weight = _unpack(tensors["qweight"], on)
        weight -= self._by_input(_unpack(tensors["qzeros"], on), weight.shape[1], on)
        weight *= self._by_input(on.float32(tensors["scales"].T), weight.shape[1], on)
        return weight


def _unpack(words: npt.NDArray[Any], on: Arrays) -> npt.NDArray[np.float32]:
    """``[R, C]`` 32-bit words -> ``[C * 8, R]`` values, in the order of the outputs."""
    rows = on.contiguous(words.T)
    values = on.empty((len(rows), _PACK, rows.shape[1]))
    for output, place in enumerate(_PLACES):
        values[:, output] = rows >> 4 * place & 15
    return values.reshape(-1, rows.shape[1])


def _settings(declared: Mapping[str, object]) -> Awq:
    """Reads AutoAWQ's own names (``w_bit``, ``q_group_size``) as well as those of transformers."""
    bits = declared.get("bits", declared.get("w_bit"))
    if type(bits) is not int or bits != 4:
        raise FormatError(f"AWQ with {brief(bits)} bits is not read, only with 4")
    if declared.get("zero_point", True) is not True:
        raise FormatError(f"AWQ with zero_point {brief(declared['zero_point'])} is not read, only with true")
    version = declared.get("version") or declared.get("checkpoint_format") or declared.get("format") or "gemm"
    if not isinstance(version, str) or version.lower() != "gemm":
        raise FormatError(f"AWQ version {brief(version)} is not read, only gemm; quantize it again with version gemm")
    return Awq(Awq._group_size(declared.get("group_size", declared.get("q_group_size")), _SIZE))
