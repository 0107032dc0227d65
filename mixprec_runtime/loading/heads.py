"""Biases of heads: those that SGLang makes and checkpoints lack, and those that it loads and leaves out."""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch.nn import Linear, Module

__all__ = ["add_left_out_biases", "drop_unstored_biases"]


def drop_unstored_biases(model: Module, tensors: Container[str]) -> None:
    """Removes the bias of each of ``model``'s own linears whose weight is among ``tensors`` and whose bias is not.

    SGLang would add random numbers to the scores: ``Qwen3ForSequenceClassification`` makes ``score`` with a bias, which
    transformers' class does not have (models/qwen3_classification.py:136 of 0.5.17,
    https://github.com/sgl-project/sglang/issues/38768).
    """
    for name, module in model.named_children():
        if type(module) is Linear and f"{name}.weight" in tensors and f"{name}.bias" not in tensors:
            module.register_parameter("bias", None)


def add_left_out_biases(model: Module) -> None:
    """Has logits get the bias of ``lm_head`` where there is one, as in Phi-3.5-MoE.

    SGLang's classes load it, and none passes it to the logits processor (models/phimoe.py:493 of 0.5.17, and all others
    up to 0.5.23), which then multiplies by the weight only.
    """
    from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        processor, head = getattr(module, "logits_processor", None), getattr(module, "lm_head", None)
        if processor is not None and isinstance(head, ParallelLMHead) and getattr(head, "bias", None) is not None:
            processor._compute_lm_head = _with_bias(processor._compute_lm_head)


def _with_bias(compute: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def compute_lm_head(hidden_states: torch.Tensor, lm_head: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        # A rank has the rows of its part of the vocabulary of both.
        return compute(hidden_states, lm_head, *args, **kwargs).add_(lm_head.bias)

    return compute_lm_head
