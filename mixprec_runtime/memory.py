"""Memory of the weights on this rank, counted from the loaded model."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch
from torch.nn import Module

from mixprec_build.families.names import layer_of
from mixprec_build.patterns.compress import natural_key
from mixprec_build.text import some

from .formats.registry import served
from .native import format_of

__all__ = ["check_placement", "get_mixed_precision_memory_stats", "measure", "serve"]


logger = logging.getLogger(__name__)

_MIB = 1 << 20
_served: list[Module] = []


def get_mixed_precision_memory_stats() -> dict[str, Any]:
    """The memory of the weights of the mixprec model that this process serves.

    Returns:
        ``weight_mb``, ``bf16_mb`` (what the same weights take in 16 bits), ``memory_saved_mb``,
        ``compression_ratio`` (``bf16_mb / weight_mb``), ``bytes_by_format`` and ``bytes_by_layer`` (keys are layer
        numbers as text, and ``other``). MB are 2**20 bytes. Empty in a process without such a model, like SGLang's
        main process: there ``Engine.get_server_info()`` and GET ``/server_info`` have the same in
        ``internal_states[i]["mixprec"]``.
    """
    return measure(_served[-1]) if _served else {}


def serve(model: Module) -> None:
    """Makes ``model`` the one that :func:`get_mixed_precision_memory_stats` measures, and logs its memory."""
    _served[:] = [model]
    stats = measure(model)
    formats = ", ".join(f"{kind} {size / _MIB:.0f} MB" for kind, size in stats["bytes_by_format"].items())
    logger.info(
        "mixprec: weights take %.0f MB on this rank (%s), %.0f MB less than in 16 bits (%.2f x smaller)",
        stats["weight_mb"],
        formats,
        stats["memory_saved_mb"],
        stats["compression_ratio"],
    )


def measure(model: Module) -> dict[str, Any]:
    """As :func:`get_mixed_precision_memory_stats`, for ``model``. Parameters that share memory count once."""
    by_format: Counter[str] = Counter()
    by_layer: Counter[str] = Counter()
    dense = 0
    seen: set[tuple[int, int]] = set()
    for path, module in model.named_modules():
        fmt = format_of(module)
        layer = layer_of(f"{path}.")
        for name, parameter in module.named_parameters(recurse=False):
            place = (parameter.data_ptr(), parameter.numel())
            if not parameter.numel() or place in seen:
                continue
            seen.add(place)
            by_layer["other" if layer is None else str(layer)] += parameter.nbytes
            if fmt is not None and fmt.quantized and name != "bias":
                by_format[fmt.kind] += parameter.nbytes
                dense += 2 * served(fmt).values_in(name, parameter, fmt)
            else:
                by_format[_DTYPES.get(parameter.dtype, str(parameter.dtype))] += parameter.nbytes
                dense += parameter.nbytes
    total = by_format.total()
    return {
        "weight_mb": total / _MIB,
        "bf16_mb": dense / _MIB,
        "memory_saved_mb": (dense - total) / _MIB,
        "compression_ratio": dense / total if total else 1.0,
        "bytes_by_format": dict(by_format.most_common()),
        "bytes_by_layer": dict(sorted(by_layer.items(), key=lambda item: natural_key(item[0]))),
    }


_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def check_placement(model: Module, device: torch.device) -> None:
    """Raises :class:`RuntimeError` if a parameter or buffer of ``model`` is on another kind of device."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    strays = [f"{name} ({tensor.device})" for name, tensor in tensors if tensor.device.type != device.type]
    if strays:
        raise RuntimeError(
            f"{len(strays)} tensors of the model are not on {device}: {some(strays)}. mixprec serves from one kind of "
            "device: leave out --cpu-offload-gb"
        )
