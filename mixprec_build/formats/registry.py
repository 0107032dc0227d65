"""Finds the format of a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..manifest import METHOD, Declaration
from .awq import Awq
from .base import Format, FormatError, shape_text
from .dense import Dense
from .fp8 import Fp8
from .gptq import Gptq
from .int8 import Int8

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint, StoredModule

__all__ = ["ALIASES", "detect", "format_from_json", "recognise"]

FORMATS: tuple[type[Format], ...] = (Dense, Fp8, Int8, Gptq, Awq)

_KINDS: Mapping[str, type[Format]] = {
    "bf16": Dense, "fp16": Dense, "fp32": Dense,
    "fp8_block": Fp8, "fp8_channel": Fp8, "fp8_tensor": Fp8,
    "int8_block": Int8, "int8_channel": Int8, "int8_tensor": Int8,
    "gptq_int4": Gptq, "gptq_int8": Gptq, "awq_int4": Awq,
}  # fmt: skip

ALIASES: Mapping[str, frozenset[str]] = {kind: frozenset({kind}) for kind in _KINDS} | {
    "fp16": frozenset({"fp16", "bf16"}),
    "fp8": frozenset({"fp8_block", "fp8_channel", "fp8_tensor"}),
    "int4": frozenset({"gptq_int4", "awq_int4"}),
    "int8": frozenset({"gptq_int8", "int8_channel", "int8_block", "int8_tensor"}),
}
"""A word for a format in a recipe -> the kinds it may stand for."""

# What is recognised by its tensors and not read: (a leaf, its dtype or None) -> its name
_UNREAD = {
    ("weight_packed", None): "compressed-tensors pack-quantized",
    ("weight", "F8_E5M2"): "FP8 E5M2",
    ("weight", "U8"): "a 4-bit float format (NVFP4, MXFP4)",
}


def detect(checkpoint: Checkpoint) -> dict[str, Format | FormatError]:
    """The format of each module of a checkpoint, or why it has none that is read: only used ones matter."""
    declaration = None
    if checkpoint.quantization.get("quant_method") == METHOD:
        declaration = Declaration.from_json(checkpoint.quantization)
    found: dict[str, Format | FormatError] = {}
    for name, module in checkpoint.modules.items():
        try:
            if declaration is not None:
                found[name] = fmt = declaration.format_of(name)
                fmt.check(module)
            else:
                found[name] = recognise(module, checkpoint.quantization)
        except FormatError as error:
            found[name] = error.with_traceback(None)  # which would keep all that was at hand, for every module
    return found


def recognise(module: StoredModule, quantization: Mapping[str, object]) -> Format:
    """The format a source stores a module in.

    Raises:
        FormatError: it is none that is read, or contradicts itself.
    """
    for candidate in FORMATS:
        found = candidate.recognise(module, quantization)
        if found is not None:
            return found
    stored = ", ".join(shape_text(leaf, module) for leaf in sorted(module.tensors))
    for (leaf, dtype), name in _UNREAD.items():
        tensor = module.tensors.get(leaf)
        if tensor is not None and dtype in (None, tensor.dtype):
            raise FormatError(f"stored as {name} ({stored}), which this version of mixprec does not read")
    raise FormatError(f"stored in no format mixprec knows ({stored})")


def format_from_json(data: Mapping[str, Any]) -> Format:
    """Inverse of ``Format.to_json``. Raises ``KeyError``, ``TypeError`` or ``ValueError`` on nonsense."""
    kind = data["kind"]
    return _KINDS[kind].from_json(data) if kind in _KINDS else Dense.from_json(data)
