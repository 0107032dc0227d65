"""A quantized ``lm_head``: gives SGLang's ``ParallelLMHead`` a method for linears.

SGLang computes logits by the ``apply`` of any quantized method (``layers/logits_processor.py``,
``should_apply_lm_head_quant_method``), so every method for linears fits. Two things are added here: the configs of most
formats make methods for linears only; and the layer's weight loader takes tensors with a row for each entry of the
vocabulary, but neither scales of blocks nor, where the vocabulary is padded, packed columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizationConfig
from torch.nn import Module

from mixprec_build.formats.base import Axes, Format

__all__ = ["filled_elements", "head_method", "load_as_vocabulary"]


def head_method(config: QuantizationConfig, layer: Any, prefix: str) -> LinearMethodBase | None:
    """The method of ``config`` for a linear of the size of ``layer``, a ``ParallelLMHead`` under construction."""
    from sglang.srt.layers.linear import LinearBase

    linear: Any = LinearBase(layer.embedding_dim, layer.num_embeddings_padded)
    linear.input_size_per_partition = layer.embedding_dim
    linear.output_size_per_partition = layer.num_embeddings_padded // layer.tp_size
    method: Any = config.get_quant_method(linear, prefix)
    scheme = getattr(linear, "scheme", None)
    if scheme is not None:  # methods of AWQ and compressed-tensors read it from their layer
        layer.scheme = scheme
    found: LinearMethodBase | None = method
    return found


def load_as_vocabulary(method: Any, fmt: Format) -> None:
    """Has ``method`` make the head's parameters with a loader that cuts every tensor of ``fmt`` by the vocabulary."""
    create = method.create_weights

    def create_weights(layer: Any, *args: Any, params_dtype: torch.dtype, **kwargs: Any) -> None:
        layer.params_dtype = params_dtype  # linear layers set it themselves
        kwargs["weight_loader"] = _loader(layer, fmt)
        create(layer, *args, params_dtype=params_dtype, **kwargs)

    method.create_weights = create_weights


def filled_elements(layer: Module, fmt: Format) -> Iterator[tuple[str, int]]:
    """Yields each parameter of a head by its leaf, and how many of its elements are filled from the checkpoint.

    The others belong to entries that pad the vocabulary.
    """
    axes = _axes(fmt)
    for leaf, parameter in layer.named_parameters(recurse=False):
        axis = axes[leaf][0].n if leaf in axes else None
        if axis is not None and parameter.numel():
            first, last = _part(layer, axis.per)
            yield leaf, parameter.numel() // parameter.shape[axis.dim] * (last - first)


def _axes(fmt: Format) -> dict[str, tuple[Axes, int]]:
    """SGLang's name of a tensor -> its axes, and the value of its padding."""
    # Where two leaves have one name in SGLang, the leaf that is stored under that name wins.
    leaves = sorted(fmt.leaves, key=lambda leaf: fmt.sglang_name(leaf) != leaf)
    return {fmt.sglang_name(leaf): (fmt.axes(leaf), fmt.filler(leaf)) for leaf in leaves}


def _part(layer: Any, per: int) -> tuple[int, int]:
    """This rank's range ``(start, stop)`` of an axis with one index for ``per`` entries of the vocabulary."""
    indices = layer.shard_indices
    start, end = indices.org_vocab_start_index, indices.org_vocab_end_index
    return (start // per, -(-end // per)) if end > start else (0, 0)


def _loader(layer: Any, fmt: Format) -> Callable[[Any, torch.Tensor], None]:
    axes = _axes(fmt)

    def load(parameter: Any, loaded: torch.Tensor) -> None:
        leaf = next(name for name, own in layer.named_parameters(recurse=False) if own is parameter)
        held = parameter.data
        axis, filler = (axes[leaf][0].n, axes[leaf][1]) if leaf in axes else (None, 0)
        if axis is None:  # the same on all ranks
            if loaded.numel() == held.numel() == 1:
                loaded = loaded.reshape(held.shape)
            _require(leaf, loaded, held.shape)
            held.copy_(loaded)
            return
        due = list(held.shape)
        due[axis.dim] = -(-layer.org_vocab_size // axis.per)
        _require(leaf, loaded, tuple(due))
        first, last = _part(layer, axis.per)
        count = last - first
        if count < held.shape[axis.dim]:
            held.narrow(axis.dim, count, held.shape[axis.dim] - count).fill_(filler)
        if count:
            held.narrow(axis.dim, 0, count).copy_(loaded.narrow(axis.dim, first, count))

    return load


def _require(leaf: str, loaded: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(loaded.shape) != tuple(shape):
        raise ValueError(
            f"{leaf} of lm_head is {list(loaded.shape)}, and {list(shape)} was expected for its vocabulary"
        )
