"""Heads of classifiers and reward models that SGLang makes with a bias, and checkpoints have without one."""

from __future__ import annotations

from collections.abc import Container

from torch.nn import Linear, Module

__all__ = ["drop_unstored_biases"]


def drop_unstored_biases(model: Module, tensors: Container[str]) -> None:
    """Removes the bias of each of ``model``'s own linears whose weight is among ``tensors`` and whose bias is not.

    SGLang would add random numbers to the scores: ``Qwen3ForSequenceClassification`` makes ``score`` with a bias, which
    transformers' class does not have (models/qwen3_classification.py:136 of 0.5.17,
    https://github.com/sgl-project/sglang/issues/38768).
    """
    for name, module in model.named_children():
        if type(module) is Linear and f"{name}.weight" in tensors and f"{name}.bias" not in tensors:
            module.register_parameter("bias", None)
