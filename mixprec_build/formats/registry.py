"""Finds the format of a module."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any

from .awq import Awq
from .base import Format, FormatError, shape_text
from .dense import Dense
from .fp8 import Fp8
from .gptq import Gptq
from .int8 import Int8
from .keys import check_keys, rotates
from .packed import Packed

if TYPE_CHECKING:
    from ..storage.module import StoredModule

__all__ = ["ALIASES", "format_from_json", "recognise"]


FORMATS: tuple[type[Format], ...] = (Dense, Fp8, Int8, Gptq, Awq, Packed)

_KINDS: Mapping[str, type[Format]] = {
    "bf16": Dense, "fp16": Dense, "fp32": Dense,
    "fp8_block": Fp8, "fp8_channel": Fp8, "fp8_tensor": Fp8,
    "int8_block": Int8, "int8_channel": Int8, "int8_tensor": Int8,
    "gptq_int4": Gptq, "gptq_int8": Gptq, "awq_int4": Awq,
    "ct_int4": Packed, "ct_int8": Packed,
}  # fmt: skip

ALIASES: Mapping[str, frozenset[str]] = {kind: frozenset({kind}) for kind in _KINDS} | {
    "fp16": frozenset({"fp16", "bf16"}),
    "fp8": frozenset({"fp8_block", "fp8_channel", "fp8_tensor"}),
    "int4": frozenset({"gptq_int4", "awq_int4", "ct_int4"}),
    "int8": frozenset({"gptq_int8", "ct_int8", "int8_channel", "int8_block", "int8_tensor"}),
}
"""A word for a format in a recipe -> the kinds it may stand for."""

# What is recognised by its tensors and not read: its name, and tensors with their dtypes.
_UNREAD: Sequence[tuple[str, Mapping[str, str]]] = (
    ("NVFP4", {"weight_packed": "U8", "weight_scale": "F8_E4M3"}),
    ("NVFP4", {"weight": "U8", "weight_scale": "F8_E4M3"}),
    ("MXFP4", {"weight_packed": "U8", "weight_scale": "U8"}),
    ("MXFP4", {"weight": "U8", "weight_scale": "U8"}),
    ("MXFP4", {"weight": "U8", "weight_scale": "F8_E8M0"}),
    ("a 4-bit float format (NVFP4, MXFP4)", {"weight": "U8"}),
    ("a 4-bit float format (NVFP4, MXFP4)", {"weight_packed": "U8"}),
    ("FP8 E5M2", {"weight": "F8_E5M2"}),
)
_FP4 = "NVFP4", "MXFP4", "4-bit float"


def recognise(module: StoredModule, quantization: Mapping[str, object]) -> Format:
    """The format a source stores a module in.

    Raises:
        FormatError: it is none that is read, or contradicts itself.
    """
    # gpt-oss: all experts of a layer in one parameter of bytes, and one of scales, which would pass for buffers
    packed = module.tensors.keys() == {""} and module.name.endswith(("_blocks", "_scales"))
    if packed and quantization.get("quant_method") == "mxfp4":
        raise FormatError(_unread("MXFP4", shape_text("", module)))
    if (key := rotates(quantization)) is not None:
        raise FormatError(
            f"quantization_config has `{key}`: these weights are stored rotated, and neither mixprec nor SGLang "
            "rotates what they multiply; take these modules from another source"
        )
    if (foreign := _foreign(module, quantization)) is not None:
        raise FormatError(foreign)
    for candidate in FORMATS:
        found = candidate.recognise(module, quantization)
        if found is not None:
            if found.quantized:
                check_keys(quantization)
            return found
    stored = ", ".join(shape_text(leaf, module) for leaf in sorted(module.tensors))
    held = {leaf: tensor.dtype for leaf, tensor in module.tensors.items()}
    for name, leaves in _UNREAD:
        if leaves.items() <= held.items():
            raise FormatError(_unread(name, stored))
    raise FormatError(f"stored in no format mixprec knows ({stored})")


_READ_METHODS = frozenset(
    {"gptq", "awq", "fp8", "compressed-tensors", "modelopt", "fbgemm_fp8", "w8a8_fp8", "w8a8_int8", "blockwise_int8"}
)
_INDEX = re.compile(r"(.+\.)?(\w*position_ids|\w*_ids|num_batches_tracked|\w*token_map|tid2eid|d2t|t2d)")
"""Integers that are buffers of models."""


def _foreign(module: StoredModule, quantization: Mapping[str, object]) -> str | None:
    """Why a bare parameter is part of a weight in another format, and no buffer; None where it may be one."""
    tensor = module.tensors.get("")
    if tensor is None or tensor.dtype[:1] not in ("I", "U") or _INDEX.fullmatch(module.name):
        return None
    method = quantization.get("quant_method")
    sparsity = quantization.get("sparsity_config")
    stored = shape_text("", module)
    if method is not None and method not in _READ_METHODS:
        return f"{stored} beside quant_method {brief(method)}, whose format mixprec does not read"
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        return f"{stored} beside sparsity_config of the format {brief(sparsity['format'])}, which mixprec does not read"
    parent = module.name.rpartition(".")[0]
    if len(tensor.shape) > 1 and parent.endswith(("proj", "fc1", "fc2", ".w1", ".w2", ".w3")):
        return f"{stored} is part of a linear in a format that mixprec does not know"
    return None


def _unread(name: str, stored: str) -> str:
    text = f"stored as {name} ({stored}), which this version of mixprec does not read"
    if not any(word in name for word in _FP4):
        return text
    return (
        f"{text}: it has no code for packed 4-bit floats and their two levels of scales, nor for SGLang's methods that "
        "run them; take this module from a BF16, FP8, Int8 or Int4 checkpoint"
    )


def format_from_json(data: Mapping[str, Any]) -> Format:
    """Inverse of ``Format.to_json``. Raises ``KeyError``, ``TypeError`` or ``ValueError`` on nonsense."""
    kind = data["kind"]
    return _KINDS[kind].from_json(data) if kind in _KINDS else Dense.from_json(data)
