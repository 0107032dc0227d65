"""GPTQ, 4 and 8 bit, as AutoGPTQ and GPTQModel store it.

With ``pack = 32 / bits`` and ``G = ceil(K / group_size)``:

===========  ======  ===============  ==========================================================
tensor       dtype   shape            contents
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

from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import lru_cache
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any, ClassVar

from ..patterns.budget import MatchBudget
from ..patterns.pattern import PatternError
from ..patterns.regexes import plain_regex
from . import auto_round
from .arrays import NUMPY, Arrays
from .base import Axes, Axis, Format, FormatError, Kind, Reader, check_tensor, only_leaves, shape_text
from .grouped import Grouped, marlin_kind, usual_order
from .keys import check
from .marlin import FLOATS, unpack
from .quantization import Quantization

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..storage.module import StoredModule

__all__ = ["Dynamic", "Gptq"]


_MAX_OVERRIDES = 4096
_OTHER = {"gptq": "gptq_v2", "gptq_v2": "gptq"}
"""Layout -> the other one."""
_KEYS = {
    "bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "dynamic", "pack_dtype", "static_groups",
    "true_sequential", "damp_percent", "damp_auto_increment", "meta", "dataset", "tokenizer", "quantizer", "method",
    "model_file_base_name", "block_name_to_quantize", "modules_in_block_to_quantize",
    "module_name_preceding_first_block",
    "use_cuda_fp16", "model_seqlen", "max_input_length", "cache_block_outputs", "batch_size", "pad_token_id",
    "use_exllama", "disable_exllama", "exllama_config", "cache_examples_on_gpu", "hyb_act", "act_group_aware", "mse",
    "backend", "is_marlin_format", "groupsize", "quantization_bits", "actorder", "offload_to_disk", "parallel_packing",
    "iters", "nsamples", "seqlen", "lr", "minmax_lr", "autoround_version", "damping", "gptaq", "fail_safe", "failsafe",
    "compute_device_filter", "mock_quantization", "device", "vram_strategy", "wait_for_submodule_finalizers",
    "auto_forward_data_parallel", "moe", "fallback",
}  # fmt: skip
_OVERRIDABLE = {"bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "static_groups", "mse",
             "damp_percent", "damp_auto_increment", "true_sequential", "lm_head", "pack_dtype", "act_group_aware",
             "hyb_act"}  # fmt: skip


def _override_of(name: str, quantization: Quantization) -> Hashable:
    """The entry of ``dynamic`` for a module; None for configurations of other methods."""
    if quantization.get("quant_method", "gptq") != "gptq":
        return None
    try:
        return quantization.derive(Dynamic).find(name)
    except FormatError as error:
        return str(error)


@dataclass(frozen=True, slots=True)
class Gptq(Grouped):
    """The kinds ``gptq_int4`` and ``gptq_int8``."""

    name: ClassVar[str] = "GPTQ"
    kinds: ClassVar[Mapping[str, Kind]] = {f"gptq_int{bits}": marlin_kind(bits) for bits in (4, 8)}
    leaves: ClassVar[frozenset[str]] = frozenset({"qweight", "qzeros", "scales", "g_idx", "bias"})
    methods: ClassVar[Mapping[str, Set[str] | None]] = {"gptq": _KEYS, auto_round.METHOD: auto_round.KEYS}
    name_keys: ClassVar[tuple[Callable[[str, Quantization], Hashable], ...]] = (_override_of, auto_round.entry_of)
    order: ClassVar[str] = "g_idx"

    bits: int
    group_size: int
    sym: bool
    desc_act: bool
    layout: str
    """``gptq`` (v1, zero points stored minus one) or ``gptq_v2``."""

    @property
    def values_leaf(self) -> str:
        return "qweight"

    @property
    def kind(self) -> str:
        return f"gptq_int{self.bits}"

    @property
    def fuses_as(self) -> object:
        # Symmetric kernels never look at the zero points, so their layout does not matter.
        return replace(self, layout="gptq") if self.sym and self.layout != "gptq" else self

    @classmethod
    def recognise(cls, module: StoredModule, quantization: Quantization) -> Gptq | None:
        if "qweight" not in module.tensors:
            return None
        method = quantization.get("quant_method", "gptq")
        if method == "awq":
            return None
        if method == auto_round.METHOD:
            settings = auto_round.settings_for(module, quantization, awq=False)
            if settings is None:
                return None
            found = _settings(settings)
            found.check(module)
            return found
        if method != "gptq":
            raise FormatError(
                f"{shape_text('qweight', module)} of quant_method {brief(method)} is not read, only of gptq"
            )
        if "bits" not in quantization:
            raise FormatError(
                "GPTQ tensors, but neither config.json nor quantize_config.json says how (bits, sym, ...)"
            )
        found = _settings(quantization.derive(Dynamic).resolve(module.name))
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
        only_leaves(module, self.leaves, self.kind)
        self._check_matrices(module, ("qweight", "qzeros", "scales"))
        groups, n = module.tensors["scales"].shape
        stored_bits = module.tensors["qzeros"].shape[1] * 32 / n if n else 0
        if stored_bits in (2, 3, 4, 8) and stored_bits != self.bits:
            raise FormatError(
                f"{shape_text('qzeros', module)} beside {shape_text('scales', module)} is {stored_bits:.0f} bit, "
                f"the configuration says {self.bits}"
            )
        rows = module.tensors["qweight"].shape[0]
        k = rows * self.pack
        due, each = self._groups_of(k)
        check_tensor(module, "qweight", ["I32"], (rows, n), f"beside {shape_text('scales', module)}")
        check_tensor(module, "scales", FLOATS, (due, n), f"for {k} inputs in {each}")
        check_tensor(module, "qzeros", ["I32"], (groups, n // self.pack), f"beside {shape_text('scales', module)}")
        if n % self.pack:
            raise FormatError(f"{n} outputs do not fill whole words of {self.pack} zero points")
        if "g_idx" in module.tensors:
            check_tensor(module, "g_idx", ["I32"], (k,), f"for {k} inputs")
        elif self.desc_act:
            raise FormatError("desc_act, but no g_idx")
        self._check_bias(module, n)

    def shape(self, module: StoredModule) -> tuple[int, ...]:
        rows, n = module.tensors["qweight"].shape
        return n, rows * self.pack

    def axes(self, leaf: str) -> Axes:
        group = self._group_axis(0)
        return {
            "qweight": Axes(n=Axis(1), k=Axis(0, self.pack)),
            "qzeros": Axes(n=Axis(1, self.pack), k=group),
            "scales": Axes(n=Axis(1), k=group),
            "g_idx": Axes(k=Axis(0)),
            "bias": Axes(n=Axis(0)),
        }[leaf]

    def filler(self, leaf: str) -> int:
        return self._half_where_packed(leaf)

    @property
    def act_order(self) -> bool:
        return self.desc_act

    def _kernel_limits(self) -> list[str]:
        asymmetric = [] if self.sym else ["mixprec does not serve asymmetric GPTQ (sym: false)"]
        return asymmetric + super(Gptq, self)._kernel_limits()

    def linear_limits(self, parts: Sequence[StoredModule]) -> list[str]:
        limits = self._kernel_limits()
        return limits if not limits and self.half_only(parts) else limits + self._marlin_limits(parts)

    def half_only(self, parts: Sequence[StoredModule]) -> str | None:
        shapes = [self.shape(part) for part in parts]
        limits = self._marlin_limits(parts)
        if not limits or not self.fits_untiled([n for n, _ in shapes], shapes[0][1]):
            return None
        return f"{', '.join(limits)}; SGLang's slower GPTQ kernel, removed by 0.5.20, runs them"

    def fits_untiled(self, outputs: Sequence[int], inputs: int) -> bool:
        """Whether SGLang's other kernel (``GPTQConfig``, FP16 only) runs them.

        It takes 32 inputs at a time, and adds one to zero points, as only the older layout needs.
        """
        size = inputs if self.group_size == -1 else self.group_size
        complete = all(n % self.pack == 0 for n in outputs)
        return self.layout == "gptq" and complete and inputs % 32 == 0 and size % 32 == 0 and inputs % size == 0

    @property
    def row_join_limit(self) -> str | None:
        return "by rows, and packed formats hold outputs in columns"

    def shared_experts_limit(self, down: Format) -> str | None:
        return "SGLang looks for a weight in shared experts' gate and up, and GPTQ has none of that name"

    def value_limits(self, parts: Sequence[StoredModule], read: Reader, *, experts: bool) -> list[str]:
        import numpy as np

        limits = []
        if self.sym:
            limits += self._zero_point_limits([read(part.tensors["qzeros"]) for part in parts], parts, experts=experts)
        if not self.desc_act:
            for part in parts:
                order = read(part.tensors["g_idx"]) if "g_idx" in part.tensors else None
                size = self.shape(part)[1] if self.group_size == -1 else self.group_size
                # All zeros mean "no g_idx" in files that other tools converted.
                if order is not None and not np.array_equal(order, usual_order(len(order), size)) and order.any():
                    limits.append(
                        "declared without desc_act, but its g_idx does not count inputs in groups of "
                        f"{size}: its configuration is wrong, and SGLang would not look at it"
                    )
                    break
        if self.desc_act:
            limits += [f"{limit} (desc_act)" for limit in self._order_limits(parts, read, experts=experts)]
        return limits

    def _zero_point_limits(
        self, stored: Sequence[npt.NDArray[Any] | None], parts: Sequence[StoredModule], *, experts: bool
    ) -> list[str]:
        """Reasons for symmetric weights, whose zero points Marlin does not read; ``stored`` are their ``qzeros``."""
        known = [words for words in stored if words is not None]
        layouts = {self._layout_of(words) for words in known}
        if None in layouts:
            word = _symmetric_word(self.bits, self.layout)
            return [
                f"declared symmetric ({self.layout}), for which every word of qzeros is {word:#010x}, but they hold "
                "other zero points: its configuration is wrong, and SGLang would not look at them"
            ]
        if len(layouts) > 1:
            return ["its parts store zero points in two ways (gptq and gptq_v2), and SGLang may read them in one"]
        if layouts - {self.layout} and not experts and self.half_only(parts):
            return [
                f"its zero points are stored as by {_OTHER[self.layout]}, not by {self.layout} as declared, and "
                "SGLang's slower GPTQ kernel, which alone takes its shape, would read them off by one"
            ]
        return []

    def as_stored(self, module: StoredModule, read: Reader) -> Format:
        """The format with the layout that zero points of symmetric weights show.

        Versions of AutoRound and GPTQModel differ in their names of the layouts.
        """
        words = read(module.tensors["qzeros"]) if self.sym else None
        layout = None if words is None else self._layout_of(words)
        return self if layout in (None, self.layout) else replace(self, layout=layout)

    def _layout_of(self, words: npt.NDArray[Any]) -> str | None:
        """The layout in which these ``qzeros`` are those of a symmetric weight; None if there is none."""
        stored = words.tobytes()
        return next((one for one in _OTHER if stored == _symmetric_words(self.bits, one, words.size)), None)

    def dequantize(self, tensors: Mapping[str, npt.NDArray[Any]], on: Arrays = NUMPY) -> npt.NDArray[np.float32]:
        """Ignores zero points of symmetric weights, as kernels do; :meth:`value_limits` checks them."""
        weight = on.float32(unpack(tensors["qweight"].T, self.bits, on))
        order = tensors.get("g_idx")
        if self.sym:
            weight -= 1 << (self.bits - 1)
        else:
            zeros: npt.NDArray[Any] = unpack(tensors["qzeros"], self.bits, on)  # [G, N]
            if self.layout == "gptq":
                # Modulo 2^bits: a zero point of 0 is stored as all ones.
                zeros = (zeros + 1) & (1 << self.bits) - 1
            weight -= self._by_input(on.float32(zeros.T), weight.shape[1], on, order)
        weight *= self._by_input(on.float32(tensors["scales"].T), weight.shape[1], on, order)
        return weight


def _symmetric_word(bits: int, layout: str) -> int:
    """The word of ``qzeros`` whose zero points are all half of the range."""
    zero = (1 << (bits - 1)) - (layout == "gptq")
    return sum(zero << at for at in range(0, 32, bits))


@lru_cache(maxsize=16)
def _symmetric_words(bits: int, layout: str, count: int) -> bytes:
    """``count`` such words. Bytes are compared in a third of the time that arrays take."""
    return _symmetric_word(bits, layout).to_bytes(4, "little") * count


def _settings(declared: Mapping[str, object]) -> Gptq:
    bits, group_size = declared.get("bits"), declared.get("group_size", -1)
    if bits not in (4, 8):
        raise FormatError(f"GPTQ with {brief(bits)} bits is not read, only with 4 and 8")
    group_size = Gptq._group_size(group_size, "GPTQ group_size {}")
    sym, desc_act = declared.get("sym", True), declared.get("desc_act", False)
    if type(sym) is not bool or type(desc_act) is not bool:
        raise FormatError(f"GPTQ sym {brief(sym)} and desc_act {brief(desc_act)} must be true or false")
    layout = declared.get("checkpoint_format") or declared.get("format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise FormatError(f"GPTQ checkpoint_format {brief(layout)} is not read, only gptq and gptq_v2")
    return Gptq(int(bits), group_size, sym, desc_act, str(layout))


class Dynamic:
    """Overrides for single modules: ``dynamic`` maps ``+:regex`` (or a bare regex) to settings."""

    def __init__(self, quantization: Quantization):
        self._quantization = quantization
        self._budget = MatchBudget()

    def resolve(self, module: str) -> Mapping[str, object]:
        """The settings of one module. Raises :class:`FormatError` for unsupported expressions, or slow ones."""
        dynamic = self._quantization.get("dynamic")
        if not isinstance(dynamic, dict):
            return self._quantization
        pattern = self.find(module)
        if pattern is None:
            return self._quantization
        override = dynamic[pattern]
        check("`dynamic`", override, _OVERRIDABLE)
        return {**self._quantization, **override}

    def find(self, module: str) -> str | None:
        """The first regex that matches a module; None where none does. Raises :class:`FormatError` as above."""
        dynamic = self._quantization.get("dynamic")
        if not isinstance(dynamic, dict):
            return None
        try:
            if len(dynamic) > _MAX_OVERRIDES:
                raise PatternError(f"holds more than {_MAX_OVERRIDES} regular expressions")
            with self._budget:
                for pattern, override in dynamic.items():
                    # `-:` stands for modules left unquantized, which are recognised by their tensors.
                    if not isinstance(override, dict) or pattern.startswith("-:"):
                        continue
                    if plain_regex(pattern, pattern.removeprefix("+:")).match(module):
                        return str(pattern)
        except PatternError as error:
            raise FormatError(f"`dynamic` {error}") from error
        return None
