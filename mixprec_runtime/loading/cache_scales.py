"""Loads the scales of an FP8 KV cache into SGLang's attention.

Some of SGLang's models make attention without a quantization config (``models/qwen3_moe.py:534`` of 0.5.17), and some
of their loaders ignore these scales, so their parameters are made and filled here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn import Module

__all__ = ["make", "take"]


logger = logging.getLogger(__name__)


def make(model: Module, config: Any, scales: Mapping[str, Sequence[str]]) -> None:
    """Makes the parameters ``k_scale`` and ``v_scale`` of attention layers that lack them.

    ``scales``: tensor of the checkpoint -> the parameters that it fills.
    """
    from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod
    from sglang.srt.layers.radix_attention import RadixAttention

    due = {parameter.rpartition(".")[0] for parameters in scales.values() for parameter in parameters}
    for path, module in model.named_modules() if due else ():
        if path in due and isinstance(module, RadixAttention) and module.k_scale is None:
            method = BaseKVCacheMethod(config)
            method.create_weights(module)
            module.quant_method = method


def take(
    model: Module, weights: Iterable[tuple[str, torch.Tensor]], scales: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields ``weights`` without the scales of the KV cache, which it copies into their parameters."""
    parameters = dict(model.named_parameters()) if scales else {}
    for name, tensor in weights:
        if name not in scales:
            yield name, tensor
            continue
        for parameter in scales[name]:
            if parameter in parameters:
                parameters[parameter].data.copy_(tensor.reshape(()))
            elif any(other.startswith(f"{_attention_of(parameter)}.") for other in parameters):
                # A model without this attention is of another pipeline stage, or has no draft layers.
                logger.warning("mixprec: SGLang's model has no %s: %s is not loaded", parameter, name)


def _attention_of(parameter: str) -> str:
    """``model.layers.0.self_attn`` for ``model.layers.0.self_attn.attn.k_scale``."""
    return parameter.rsplit(".", 2)[0]
