"""Has SGLang repack experts for Marlin while the weights of other layers are still being read."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from torch.nn import Module

from ..formats.registry import served
from ..native import format_of
from .strict import may_be_empty

__all__ = ["Repacking"]


class Repacking:
    """The layers with experts on Marlin, each of which is processed once its own parameters are filled.

    SGLang processes layers one after the other when all weights are read (model_loader/loader.py:860), while the disk
    waits. For other kernels there is little to do; DeepSeek's class requantizes scales of FP8 experts before it
    (models/deepseek_common/deepseek_weight_loader.py:788).

    Args:
        model: the model, with parameters on one device.
        read: the parameters that are read, by their names in ``model``; a layer with others is left to SGLang.
    """

    def __init__(self, model: Module, read: Container[str]):
        self._layers: list[tuple[Any, set[str]]] = []  # and the parameters that each waits for
        self._place: dict[str, int] = {}
        empty = may_be_empty(model)
        for prefix, module in model.named_modules():
            fmt = format_of(module) if isinstance(module, FusedMoE) else None
            if fmt is None or "marlin" not in served(fmt).runners(fmt):
                continue
            names = (f"{prefix}.{name}" for name, value in module.named_parameters(recurse=False) if value.numel())
            own = {name for name in names if name in read or not empty(name)}
            if all(name in read for name in own):
                self._place |= dict.fromkeys(own, len(self._layers))
                self._layers.append((module, own))

    def place(self, name: str) -> int:
        """When to read a parameter: layers to process come last, one after the other."""
        return self._place.get(name, -1)

    def filled(self, name: str) -> None:
        """Processes the layer of the parameter ``name``, if that was its last one, on the current stream."""
        place = self._place.get(name)
        if place is None:
            return
        layer, waits_for = self._layers[place]
        waits_for.discard(name)
        if not waits_for:
            layer.quant_method.process_weights_after_loading(layer)
            # SGLang calls it for all modules, and repacked weights would be repacked again.
            layer.quant_method.process_weights_after_loading = _processed


def _processed(_: torch.nn.Module) -> None:
    pass
