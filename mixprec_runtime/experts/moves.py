"""Experts that SGLang's EPLB moves to other places while it serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["move_layer"]


def move_layer(
    original: Callable[..., Any],
    routed_experts_weights: Sequence[torch.Tensor],
    temp_buffers: Sequence[torch.Tensor],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Around ``update_expert_weights_single_layer``: gives a layer buffers with the shapes and dtypes of its weights.

    SGLang makes buffers for the first layer only, and passes them to all (eplb/expert_location_updater.py:148). Experts
    of a layer in another format would be converted to the first one's dtypes on their way, or not fit at all. Weights
    without values, such as unused orders of inputs, are not passed on.
    """
    weights = [weight for weight in routed_experts_weights if weight.numel()]
    buffers = [buffer for buffer in temp_buffers if buffer.numel()]
    if [(b.shape, b.dtype) for b in buffers] != [(w.shape, w.dtype) for w in weights]:
        buffers = [torch.empty_like(weight) for weight in weights]
    return original(weights, buffers, *args, **kwargs)
