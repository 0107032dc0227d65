"""Refuses formats that are recognised by their tensors but not supported: by name, with advice."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from reprlib import repr as brief
from typing import TYPE_CHECKING, NoReturn

from .base import FormatError, shape_text
from .e8m0 import E8M0_DTYPES
from .keys import rotates

if TYPE_CHECKING:
    from ..storage.header import TensorInfo
    from ..storage.module import StoredModule
    from .quantization import Quantization

__all__ = ["LEAVES", "UNREAD", "by_its_name", "refuse_first", "refuse_unknown"]


@dataclass(frozen=True, slots=True)
class Unread:
    """A format that is not supported. ``tensors`` that its modules have: leaf -> dtype."""

    name: str
    tensors: Mapping[str, str]
    advice: str = ""


_FLOATS = (
    ": its scales are neither those of NVFP4 nor of MXFP4; take this module from a BF16, FP8, Int8 or Int4 checkpoint"
)
_STACKED = (
    ": it keeps all experts of a layer in one tensor, in which rows of gate and up alternate, and mixprec does not "
    "take these apart; SGLang serves this release itself, without mixprec"
)
_MXFP8 = (
    ": SGLang runs FP8 with a scale for each 32 inputs from compute capability 10.0 on, and mixprec serves 8.0 to 9.0, "
    "for which weights would have to be converted, which changes their values; take this module from a checkpoint in "
    "BF16, or in FP8 by blocks of outputs and inputs"
)
_SIGNED = (
    ": its 4-bit integers are signed, which SGLang has no kernel for and AutoAWQ's kernels would read as other "
    "numbers; take this module from another source, as of AutoAWQ, GPTQ or AutoRound"
)
_MISTRAL = (
    ": its names and scales are of Mistral's own layout (consolidated.safetensors, params.json); take the release in "
    "Hugging Face's layout, which has weight_scale_inv and activation_scale, and leave these files out"
)
_SOME_FLOATS = "a 4-bit float format (NVFP4, MXFP4)"

_SCALES = ("weight_scale", "weight_scale_inv", "scale")

UNREAD = (
    Unread(_SOME_FLOATS, {"weight": "U8"}, _FLOATS),
    Unread(_SOME_FLOATS, {"weight_packed": "U8"}, _FLOATS),
    Unread("FP8 E5M2", {"weight": "F8_E5M2"}),
    *(Unread("MXFP8", {"weight": "F8_E4M3", leaf: dtype}, _MXFP8) for leaf in _SCALES for dtype in E8M0_DTYPES),
    Unread("Quark's Int4", {"weight": "I32"}, _SIGNED),
)
"""The first that fits counts."""

_OF_MISTRAL = frozenset({"qscale_weight", "qscale_act"})
LEAVES = frozenset({"pre_quant_scale", "input_zero_point", "SCB"}) | _OF_MISTRAL
"""Last words of names of tensors that only these formats have."""


_INDEX = re.compile(r"(.+\.)?(\w*position_ids|\w*_ids|num_batches_tracked|\w*token_map|tid2eid|d2t|t2d)")
"""Names of integers that are buffers of models."""


def refuse_first(module: StoredModule, quantization: Quantization, methods: Set[str]) -> None:
    """Raises :class:`FormatError` for modules of these formats that look like supported ones.

    ``methods`` are those whose configurations are supported.
    """
    # gpt-oss: all experts of a layer in one parameter of bytes, and one of scales, which would pass for buffers
    packed = module.tensors.keys() == {""} and module.name.endswith(("_blocks", "_scales"))
    if packed and quantization.get("quant_method") == "mxfp4":
        raise FormatError(_refusal(Unread("gpt-oss's MXFP4", {}, _STACKED), shape_text("", module)))
    if own := sorted(_OF_MISTRAL & module.tensors.keys()):
        raise FormatError(_refusal(Unread("Mistral's static FP8", {}, _MISTRAL), shape_text(own[0], module)))
    if (key := rotates(quantization)) is not None:
        raise FormatError(
            f"quantization_config has `{key}`: these weights are stored rotated, and neither mixprec nor SGLang "
            "rotates what they multiply; take these modules from another source"
        )
    if (tensor := module.tensors.get("")) is not None and _is_of_fused_experts(module.name, tensor):
        raise FormatError(
            f"{shape_text('', module)} is of FP8 experts of which a layer has all in one tensor, which this version of "
            "mixprec does not read; take them from a checkpoint with a module for each expert"
        )
    if quantization.get("pack_method") is not None and "qweight" in module.tensors:
        raise FormatError(
            _refusal(Unread("Quark's AWQ", {}, _SIGNED), f"{shape_text('qweight', module)}, `pack_method`")
        )
    if (foreign := _foreign(module, quantization, methods)) is not None:
        raise FormatError(foreign)


def _is_of_fused_experts(name: str, tensor: TensorInfo) -> bool:
    """Whether a bare parameter is an FP8 weight of all experts of a layer, or its scales."""
    return (tensor.dtype.startswith("F8_") and len(tensor.shape) > 2) or name.endswith("_scale_inv")


def _foreign(module: StoredModule, quantization: Quantization, methods: Set[str]) -> str | None:
    """The reason why a bare parameter is part of a weight in another format; None if it may be a buffer."""
    tensor = module.tensors.get("")
    if tensor is None or tensor.dtype[:1] not in ("I", "U") or _INDEX.fullmatch(module.name):
        return None
    method = quantization.get("quant_method")
    sparsity = quantization.get("sparsity_config")
    stored = shape_text("", module)
    if method is not None and not (isinstance(method, str) and method in methods):
        return f"{stored} beside quant_method {brief(method)}, whose format mixprec does not read"
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        return f"{stored} beside sparsity_config of the format {brief(sparsity['format'])}, which mixprec does not read"
    parent = module.name.rpartition(".")[0]
    if len(tensor.shape) > 1 and parent.endswith(("proj", "fc1", "fc2", ".w1", ".w2", ".w3")):
        return f"{stored} is part of a linear in a format that mixprec does not know"
    return None


def by_its_name(error: FormatError, module: StoredModule, quantization: Quantization, methods: Set[str]) -> FormatError:
    """An error that names the declared method, in place of ``error``, which names only tensors.

    Returns ``error`` where it already names a format, and for supported ``methods`` and their supported algorithms.
    """
    text, method, algorithm = str(error), quantization.get("quant_method"), quantization.get("quant_algo")
    named = text.startswith("stored as ") and not text.startswith(f"stored as {_SOME_FLOATS}")
    if not isinstance(method, str) or named or "quant_method" in text:
        return error
    name = _NAMES.get(method, f"the method {brief(method)}")
    if method in methods:
        if not isinstance(algorithm, str) or algorithm in _ALGORITHMS:
            return error
        name = f"ModelOpt's {brief(algorithm)}"
    stored = ", ".join(shape_text(leaf, module) for leaf in sorted(module.tensors))
    return FormatError(
        f"stored as {name} ({stored}), which this version of mixprec does not read; take this module from a BF16, FP8, "
        "Int8 or Int4 checkpoint"
    )


_ALGORITHMS = ("FP8", "NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "MIXED_PRECISION")
"""ModelOpt's names of formats that are supported, or refused with a reason of their own."""
_NAMES = {"bitsandbytes": "bitsandbytes", "bitnet": "BitNet"}


def refuse_unknown(module: StoredModule) -> NoReturn:
    """Raises :class:`FormatError` for a module in no supported format, with the name of its format if it is known."""
    stored = ", ".join(shape_text(leaf, module) for leaf in sorted(module.tensors))
    dtypes = {leaf: tensor.dtype for leaf, tensor in module.tensors.items()}
    for unread in UNREAD:
        if unread.tensors.items() <= dtypes.items():
            raise FormatError(_refusal(unread, stored))
    raise FormatError(f"stored in no format mixprec knows ({stored})")


def _refusal(unread: Unread, stored: str) -> str:
    return f"stored as {unread.name} ({stored}), which this version of mixprec does not read{unread.advice}"
