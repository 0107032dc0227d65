"""Memory of the weights on this rank, counted from the loaded model."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any
from weakref import WeakSet

import torch
from torch.nn import Module

from mixprec_build.families.names import layer_of
from mixprec_build.patterns.compress import natural_key
from mixprec_build.text import some
from mixprec_build.versions import __version__

from .formats.registry import served
from .native import format_of

__all__ = [
    "add_draft", "check_placement", "drafts", "get_mixed_precision_memory_stats", "measure", "name_files", "serve",
]  # fmt: skip


logger = logging.getLogger(__name__)

_MIB = 1 << 20
_served: list[Module] = []
_drafts: WeakSet[Module] = WeakSet()


def get_mixed_precision_memory_stats() -> dict[str, Any]:
    """The memory of the weights of the mixprec model that this process serves.

    Returns:
        ``weight_mb``, ``bf16_mb`` (what the same weights take in 16 bits), ``memory_saved_mb``,
        ``compression_ratio`` (``bf16_mb / weight_mb``), ``bytes_by_format`` and ``bytes_by_layer`` (keys are layer
        numbers as text, ``draft`` for a draft from a compiled checkpoint, and ``other``). MB are 2**20 bytes. Empty in
        a process without such a model, like SGLang's main process: there ``Engine.get_server_info()`` and GET
        ``/server_info`` have the same in ``internal_states[i]["mixprec"]``.
    """
    return measure(*_served) if _served else {}


def add_draft(model: Module) -> None:
    """Notes that ``model``, from a compiled checkpoint, drafts tokens for the one that is served."""
    _drafts.add(model)


def drafts() -> list[Module]:
    """The models of :func:`add_draft` that still exist."""
    return list(_drafts)


def name_files(model: Module, where: str) -> None:
    """Notes the files that the weights of ``model`` come from, for the line that :func:`serve` logs.

    The class of Mistral-3 is no module, and SGLang serves the module inside: the first of ``modules()`` in any case.
    """
    next(model.modules()).__dict__["mixprec_files"] = where


def serve(*models: Module) -> None:
    """Makes ``models`` those that :func:`get_mixed_precision_memory_stats` measures, and logs what they are."""
    _served[:] = models
    stats = measure(*models)
    names = " and ".join(f"{type(model).__name__} from {model.__dict__['mixprec_files']}" for model in models)
    formats = ", ".join(f"{kind} {size / _MIB:.0f} MB" for kind, size in stats["bytes_by_format"].items())
    logger.info(
        "mixprec %s serves %s; weights take %.0f MB on this rank (%s), %.0f MB less than in 16 bits (%.2f x smaller)",
        __version__,
        names,
        stats["weight_mb"],
        formats,
        stats["memory_saved_mb"],
        stats["compression_ratio"],
    )


def measure(*models: Module) -> dict[str, Any]:
    """As :func:`get_mixed_precision_memory_stats`, for ``models``. Parameters that share memory count once."""
    by_format: Counter[str] = Counter()
    by_layer: Counter[str] = Counter()
    dense = 0
    seen: set[tuple[int, int]] = set()
    found = [(model, path, module) for model in models for path, module in model.named_modules()]
    # Those with a format first: modules around them, such as LoRA's, may have a parameter of theirs, too.
    for owner, path, module in sorted(found, key=lambda entry: format_of(entry[2]) is None):
        fmt = format_of(module)
        layer = "draft" if owner in _drafts else layer_of(f"{path}.")
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
    """Raises :class:`RuntimeError` if a parameter or buffer of ``model`` is on another kind of device.

    Buffers that are not of the checkpoint count as little as natively: Kimi-K2.5's vision tower makes one on the CPU.
    """
    tensors = model.state_dict(keep_vars=True).items()
    strays = [f"{name} ({tensor.device})" for name, tensor in tensors if tensor.device.type != device.type]
    if strays:
        raise RuntimeError(
            f"{len(strays)} tensors of the model are not on {device}: {some(strays)}. mixprec serves from one kind of "
            "device: leave out --cpu-offload-gb"
        )
