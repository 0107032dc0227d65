"""Weights of 8 bits a value with scales that multiply them, the common part of FP8 and Int8 (W8A8).

===========  ====================  ==========================================
granularity  scale                 shape
===========  ====================  ==========================================
block        ``weight_scale_inv``  ``[ceil(N / block_n), ceil(K / block_k)]``
channel      ``weight_scale``      ``[N, 1]`` (or ``[N]``)
tensor       ``weight_scale``      ``[]``, ``[1]`` or ``[1, 1]``
===========  ====================  ==========================================

Some producers use other names: compressed-tensors ``weight_scale`` for blocks, DeepSeek-V4 ``scale``, Mistral
``weight_scale_inv`` for a tensor. Static activations add ``input_scale`` (one value; Mistral: ``activation_scale``),
dynamic and unquantized ones nothing. Scales of blocks of FP8 may be powers of two, stored as exponents of one byte
(:mod:`.e8m0`). The layouts are those of DeepSeek-V3's ``inference/fp8_cast_bf16.py`` (block) and of compressed-tensors
(the others).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any, ClassVar

from .arrays import NUMPY, Arrays
from .base import Axes, Axis, Format, FormatError, check_tensor, only_leaves, shape_text
from .config_groups import Scheme, first_fitting, groups_of
from .e8m0 import E8M0_DTYPES, powers_of_two
from .floats import to_float32

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Self

    from ..storage.module import StoredModule
    from .quantization import Quantization

__all__ = ["Scaled"]


_SCALE_DTYPES = ("F32", "BF16", "F16")
_SCALES = ("weight_scale", "weight_scale_inv", "scale")
"""Names of scales."""
_INPUTS = ("input_scale", "activation_scale")
"""Names of scales of static activations."""
_BLOCK_ALGORITHMS = ("FP8_PB_WO", "FP8_PB_REAL", "FP8_BLOCK_SCALES")
"""ModelOpt's words for FP8 in blocks."""
_USUAL_BLOCK = (128, 128)
"""The size of blocks where a configuration has none: FP8 modules in files of several tools, W4AFP8, ModelOpt's."""


@dataclass(frozen=True, slots=True)
class Scaled(Format):
    """``weight [N, K]`` of 8 bits a value. ``block`` is ``(block_n, block_k)`` for blocks and None otherwise."""

    leaves: ClassVar[frozenset[str]] = frozenset({"weight", *_SCALES, *_INPUTS, "bias"})
    name_keys: ClassVar[tuple[Callable[[str, Quantization], Hashable], ...]] = (groups_of,)
    portable: ClassVar[bool] = True
    dtype: ClassVar[str]
    """The weight's safetensors dtype."""
    word: ClassVar[str]
    """The beginning of the names of its kinds."""
    block_scales: ClassVar[tuple[str, ...]] = _SCALE_DTYPES
    """The safetensors dtypes of scales of blocks."""

    granularity: str
    """``block``, ``channel`` or ``tensor``."""
    activations: str = "dynamic"
    """``dynamic``, ``static``, or ``none`` where only weights are quantized."""
    block: tuple[int, int] | None = None
    scale: str = ""
    """The name of the scales, if it is not the usual one."""
    scale_fmt: str = ""
    """``ue8m0`` where activations are to be quantized in blocks with powers of two as scales."""
    input: str = ""
    """The name of the scale of static activations, if it is not ``input_scale``."""

    @property
    def kind(self) -> str:
        return f"{self.word}_{self.granularity}"

    @property
    def scale_leaf(self) -> str:
        return self.scale or ("weight_scale_inv" if self.granularity == "block" else "weight_scale")

    @property
    def input_leaf(self) -> str:
        return self.input or "input_scale"

    @property
    def fuses_as(self) -> object:
        return replace(self, scale="", input="") if self.scale or self.input else self  # one kernel, whatever the names

    @classmethod
    def recognise(cls, module: StoredModule, quantization: Quantization) -> Self | None:
        weight = module.tensors.get("weight")
        if weight is None or weight.dtype != cls.dtype:
            return None
        if len(weight.shape) != 2:
            raise FormatError(
                f"{shape_text('weight', module)}: only two-dimensional {cls.word.upper()} weights are read"
            )
        leaves = module.tensors.keys() & set(_SCALES)
        if len(leaves) != 1:
            raise FormatError(
                f"{shape_text('weight', module)} needs one of {', '.join(_SCALES[:-1])} and {_SCALES[-1]}"
            )
        (leaf,) = leaves
        if not cls._reads(module, leaf, quantization):
            return None
        read: Callable[[Scheme | None], Self] = lambda scheme: cls._of(module, leaf, quantization, scheme)  # noqa: E731
        return first_fitting(module, quantization, read)

    @classmethod
    def _reads(cls, module: StoredModule, leaf: str, quantization: Quantization) -> bool:
        """Whether the scales belong to this format, not to another one with such weights."""
        return module.tensors[leaf].dtype in _SCALE_DTYPES

    @classmethod
    def _of(cls, module: StoredModule, leaf: str, quantization: Quantization, scheme: Scheme | None) -> Self:
        """The format of a module with scales named ``leaf``."""
        shape, (n, k) = module.tensors[leaf].shape, module.tensors["weight"].shape
        input_ = "activation_scale" if "activation_scale" in module.tensors else ""
        activations = _activations(module, quantization, scheme)
        strategy = None if scheme is None else scheme.strategy
        declared = quantization.get("weight_block_size") if scheme is None else scheme.block
        # By their name or dtype, or by ModelOpt's algorithm: a weight of one block has one scale, too.
        of_blocks = leaf != "weight_scale" or quantization.get("quant_algo") in _BLOCK_ALGORITHMS
        of_blocks = of_blocks or module.tensors[leaf].dtype in E8M0_DTYPES
        block: tuple[int, int] | None = None
        if shape in ((), (1,), (1, 1)) and strategy in (None, "tensor") and not (
            of_blocks and (declared is not None or shape == (1, 1))
        ):  # fmt: skip
            granularity = "tensor"
        elif strategy == "block" or (scheme is None and (of_blocks or shape == _grid((n, k), declared))):
            granularity = "block"
            block = _block_size({"weight_block_size": declared}) if declared is not None else _usual_block(module, leaf)
        elif shape[1:] in ((), (1,)) and not of_blocks:
            granularity = "channel"
        elif scheme is not None:
            raise FormatError(f"{shape_text(leaf, module)} are no scales as declared by {scheme.described}")
        else:
            raise FormatError(
                f"{shape_text(leaf, module)}: scales of blocks, but no config group of quantization_config "
                "says how large the blocks are"
            )
        usual = "weight_scale_inv" if block else "weight_scale"
        powers = "ue8m0" if block and quantization.get("scale_fmt") == "ue8m0" else ""
        found = cls(granularity, activations, block, "" if leaf == usual else leaf, powers, input_)
        if scheme is not None:
            found._agree(scheme)
        found.check(module)
        return found

    def _agree(self, scheme: Scheme) -> None:
        """Raises :class:`FormatError` where compressed-tensors declares another format than is stored."""
        type_ = "float" if self.dtype.startswith("F") else "int"
        if (scheme.type, scheme.bits, scheme.strategy) != (type_, 8, self.granularity) or not scheme.symmetric:
            asymmetric = "" if scheme.symmetric else ", asymmetric"
            raise FormatError(f"stored as {self.kind}, but declared by {scheme.described}{asymmetric}")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        granularity, activations = data["kind"].removeprefix(f"{cls.word}_"), data["activations"]
        scale, scale_fmt, input_ = data.get("scale", ""), data.get("scale_fmt", ""), data.get("input", "")
        try:
            block = _block_size({"weight_block_size": data["block"]}) if granularity == "block" else None
        except FormatError as error:
            raise ValueError(str(error)) from error
        if activations not in ("static", "dynamic", "none"):
            raise ValueError(f"activations {brief(activations)} are neither static nor dynamic nor none")
        if scale not in ("", *_SCALES):
            raise ValueError(f"scale {brief(scale)} is no name of scales")
        if input_ not in ("", *_INPUTS):
            raise ValueError(f"input {brief(input_)} is no name of a scale of activations")
        if scale_fmt not in ("", "ue8m0"):
            raise ValueError(f"scale_fmt {brief(scale_fmt)} is not ue8m0")
        return cls(granularity, activations, block, scale, scale_fmt if block else "", input_)

    def to_json(self) -> dict[str, object]:
        block = {"block": list(self.block)} if self.block else {}
        scale = {"scale": self.scale} if self.scale else {}
        powers = {"scale_fmt": self.scale_fmt} if self.scale_fmt else {}
        input_ = {"input": self.input} if self.input else {}
        return {"kind": self.kind, **block, "activations": self.activations, **scale, **powers, **input_}

    def check(self, module: StoredModule) -> None:
        input_ = self.input_leaf
        only_leaves(module, {"weight", self.scale_leaf, input_, "bias"}, self.kind)
        if not {"weight", self.scale_leaf} <= module.tensors.keys() or len(self.shape(module)) != 2:
            raise FormatError(f"{self.kind} needs weight with two dimensions, and {self.scale_leaf}")
        n, k = self.shape(module)
        check_tensor(module, "weight", [self.dtype], (n, k), "")
        scale = module.tensors[self.scale_leaf].shape
        if self.block is not None:
            blocks = (-(-n // self.block[0]), -(-k // self.block[1]))
            why = f"for weight {[n, k]} in blocks of {list(self.block)}"
            check_tensor(module, self.scale_leaf, self.block_scales, blocks, why)
        elif self.granularity == "channel":
            check_tensor(module, self.scale_leaf, _SCALE_DTYPES, (n, *scale[1:]), f"for weight {[n, k]}")
        else:
            check_tensor(module, self.scale_leaf, _SCALE_DTYPES, scale, "")
        if (input_ in module.tensors) != (self.activations == "static"):
            have = "has an" if input_ in module.tensors else "has no"
            raise FormatError(f"{have} {input_} although its activations are declared {self.activations}")
        if input_ in module.tensors and module.tensors[input_].shape not in ((), (1,)):
            raise FormatError(f"{shape_text(input_, module)}: one value was expected")
        if "bias" in module.tensors:
            check_tensor(module, "bias", _SCALE_DTYPES, (n,), f"for weight {[n, k]}")

    def shape(self, module: StoredModule) -> tuple[int, ...]:
        return module.tensors["weight"].shape

    def axes(self, leaf: str) -> Axes:
        if leaf == "weight":
            return Axes(n=Axis(0), k=Axis(1))
        if leaf == self.scale_leaf and self.block is not None:
            return Axes(n=Axis(0, self.block[0]), k=Axis(1, self.block[1]))
        channel = leaf == self.scale_leaf and self.granularity == "channel"
        return Axes(n=Axis(0)) if channel or leaf == "bias" else Axes()

    def tile(self, *, experts: bool) -> tuple[int, int]:
        return self.block or (16, 16)  # CUTLASS and Triton load 16 bytes at once

    def sglang_name(self, leaf: str) -> str:
        if leaf == self.scale:
            return "weight_scale_inv" if self.granularity == "block" else "weight_scale"
        return "input_scale" if leaf == self.input else leaf

    def filler(self, leaf: str) -> int:
        return int(leaf == self.scale_leaf)

    def dtype_of(self, leaf: str, stored: str) -> str:
        return "F8_E8M0" if leaf == self.scale_leaf and stored in E8M0_DTYPES else stored

    @property
    def rows_in_fused(self) -> int:
        return 1 if self.block is None else self.block[0]

    def linear_limits(self, parts: Sequence[StoredModule]) -> list[str]:
        limits = self._block_limits()
        for part in parts:
            k = self.shape(part)[1]
            if self.block is not None:
                # Fp8LinearMethod.validate_block_quant_shapes (BlockInt8LinearMethod.create_weights), and the kernels
                # that quantize activations block by block
                if k % self.block[1]:
                    limits.append(
                        f"its {k} inputs are no multiple of {self.block[1]}, the block activations are quantized in"
                    )
            elif self.granularity == "tensor" and len(part.tensors[self.scale_leaf].shape) > 1:
                limits.append(f"{shape_text(self.scale_leaf, part)} has two dimensions, SGLang loads [] or [1]")
            limits += self._scale_limits(part)
        return limits

    def expert_limits(self, parts: Sequence[StoredModule], hidden: int, intermediate: int) -> list[str]:
        limits = self._block_limits() + [limit for part in parts for limit in self._scale_limits(part)]
        if self.block is not None:
            # Fp8MoEMethod.create_weights, BlockInt8MoEMethod.create_weights
            if intermediate % self.block[0] or intermediate % self.block[1]:
                limits.append(f"its intermediate size {intermediate} is no multiple of the block {list(self.block)}")
            if hidden % self.block[1]:
                limits.append(f"its hidden size {hidden} is no multiple of {self.block[1]}")
        elif self.granularity == "channel" and self.activations == "static":
            limits.append("experts with channel scales need dynamic activations")
        return limits

    def _block_limits(self) -> list[str]:
        # Tiles of Triton's kernels are one block: powers of two, and `tl.dot` takes 16 rows and 32 columns at least.
        sizes = zip(self.block or (), (16, 32), strict=False)
        if all(size >= least and not size & (size - 1) for size, least in sizes):
            return []
        return [f"SGLang has no kernel for blocks of {list(self.block or ())}, only for powers of two from [16, 32] on"]

    def _scale_limits(self, part: StoredModule) -> list[str]:
        if self.granularity == "channel" and len(part.tensors[self.scale_leaf].shape) == 1:
            return [f"{shape_text(self.scale_leaf, part)} has one dimension, SGLang loads [N, 1]"]
        if self.activations == "none":
            return self._weight_only_limits(part)
        if self.granularity != "tensor" and self.activations == "static":
            return [f"{self.granularity} scales with static activations have no SGLang method"]
        return []

    def _weight_only_limits(self, part: StoredModule) -> list[str]:
        return [f"{self.kind} with unquantized activations has no SGLang method"]

    def dequantize(self, tensors: Mapping[str, npt.NDArray[Any]], on: Arrays = NUMPY) -> npt.NDArray[np.float32]:
        weight = on.float32(tensors["weight"])
        stored = tensors[self.scale_leaf]
        if self.granularity == "tensor":
            return weight * to_float32(stored).item()
        scale = powers_of_two(stored, on) if stored.itemsize == 1 else on.float32(stored)
        if self.block is None:
            return weight * scale.reshape(-1, 1)
        (n, k), (block_n, block_k) = weight.shape, self.block
        # A block may not be larger than the weight: its size comes from a configuration.
        scale = on.repeat(scale, min(block_k, k), 1)[:, :k]
        if len(scale) > 1:
            scale = on.repeat(scale, min(block_n, n), 0)[:n]
        return weight * scale


def _grid(weight: tuple[int, ...], declared: object) -> tuple[int, ...] | None:
    """The number of blocks of a weight along each dimension; None for a malformed size of blocks."""
    try:
        block = _USUAL_BLOCK if declared is None else _block_size({"weight_block_size": declared})
    except FormatError:
        return None
    return tuple(-(-size // per) for size, per in zip(weight, block, strict=True))


def _usual_block(module: StoredModule, leaf: str) -> tuple[int, int]:
    """The size of blocks that nearly all producers use, if the scales fit it; else raises :class:`FormatError`."""
    if module.tensors[leaf].shape != _grid(module.tensors["weight"].shape, None):
        raise FormatError(
            f"{shape_text(leaf, module)}, but quantization_config has no weight_block_size, and they are no scales of "
            f"{shape_text('weight', module)} in blocks of {list(_USUAL_BLOCK)}"
        )
    return _USUAL_BLOCK


def _block_size(quantization: Mapping[str, object]) -> tuple[int, int]:
    block = quantization.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)):
        raise FormatError(f"weight_block_size {brief(block)} is no pair of positive numbers")
    return block[0], block[1]


_WORDS = {"none": "unquantized", "dynamic": "dynamic", "static": "static"}


def _activations(module: StoredModule, quantization: Quantization, scheme: Scheme | None) -> str:
    """``static``, ``dynamic`` or ``none``, by the tensors. Raises :class:`FormatError` if the configuration differs."""
    static = not module.tensors.keys().isdisjoint(_INPUTS)
    have, stored = ("an", "static") if static else ("no", "dynamic")
    if scheme is not None:
        if (scheme.activations == "static") != (stored == "static"):
            raise FormatError(
                f"{scheme.described} has {_WORDS[scheme.activations]} activations, but the module has {have} "
                "input_scale"
            )
        return scheme.activations
    declared = quantization.get("activation_scheme", stored)
    if declared not in ("static", "dynamic"):
        raise FormatError(f"activation_scheme {brief(declared)} is neither static nor dynamic")
    if declared != stored:
        raise FormatError(f"activation_scheme is {declared!r}, but the module has {have} input_scale")
    return stored
