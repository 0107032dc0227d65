"""Finds the format of a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .awq import Awq
from .base import Format, FormatError, shape_text
from .dense import Dense
from .fp8 import Fp8
from .gptq import Gptq
from .int8 import Int8
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
    for candidate in FORMATS:
        found = candidate.recognise(module, quantization)
        if found is not None:
            return found
    stored = ", ".join(shape_text(leaf, module) for leaf in sorted(module.tensors))
    held = {leaf: tensor.dtype for leaf, tensor in module.tensors.items()}
    for name, leaves in _UNREAD:
        if leaves.items() <= held.items():
            raise FormatError(_unread(name, stored))
    raise FormatError(f"stored in no format mixprec knows ({stored})")


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
