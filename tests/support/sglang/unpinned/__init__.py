"""Has torch make tensors without pinned memory, which SGLang's LoRA asks for, and which a machine without a GPU lacks.

SGLang imports this package in its workers where ``SGLANG_EXTERNAL_MODEL_PACKAGE`` names it. It has no models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

__all__: list[str] = []


def _unpinned(make: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(make)
    def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
        return make(*args, **kwargs)

    return made


if not torch.cuda.is_available():
    for _name in ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "empty_like"):
        setattr(torch, _name, _unpinned(getattr(torch, _name)))
    torch.Tensor.pin_memory = lambda tensor, *_: tensor  # type: ignore[assignment, method-assign]
