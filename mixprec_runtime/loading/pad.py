"""Makes layers wider, where zeros are added to a rank's share."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from mixprec_build.families.base import Family

from ..formats.marlin import changed_attributes

__all__ = ["pad", "stored_columns"]


def pad(method: Any, prefix: str, padded: Mapping[str, tuple[int, int]], family: Family) -> None:
    """Has ``method`` make the layer ``prefix`` with added columns, if it is one of ``padded``.

    ``padded``: MLP or ``...experts`` -> a rank's intermediate columns ``(native, stored)``: as SGLang divides them, and
    with zeros added up to complete blocks.
    """
    for name in family.served_names(prefix):
        if name in padded:
            _pad_experts(method, name, *padded[name])
        elif name.rpartition(".")[0] in padded:
            _pad_linear(method, name, *padded[name.rpartition(".")[0]], inputs=family.is_down(name))


def stored_columns(
    layer: Any, prefix: str, padded: Mapping[str, tuple[int, int]], family: Family
) -> AbstractContextManager[object]:
    """Has a layer of experts state its columns with added zeros, by which its method is chosen and its kernel checked.

    ``padded`` is that of :func:`pad`, which changes them for good once the weights are made.
    """
    found = [padded[name] for name in family.served_names(prefix) if name in padded]
    return changed_attributes(layer, intermediate_size_per_partition=found[0][1]) if found else nullcontext()


def _check_native(name: str, columns: set[int], native: int) -> None:
    if columns != {native}:
        raise RuntimeError(
            f"{name}: SGLang gives this rank {', '.join(map(str, sorted(columns)))} of its columns, but weights "
            f"are cut for {native}, with zeros added: leave out flags that have it cut unlike other layers, such as "
            "--moe-dense-tp-size"
        )


def _pad_linear(method: Any, name: str, native: int, stored: int, *, inputs: bool) -> None:
    create = method.create_weights

    def create_weights(
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        _check_native(name, {input_size_per_partition} if inputs else set(output_partition_sizes), native)
        if inputs:
            input_size = input_size // native * stored
            layer.input_size_per_partition = input_size_per_partition = stored
        else:
            output_size = output_size // native * stored
            output_partition_sizes = [stored] * len(output_partition_sizes)
            layer.output_partition_sizes = output_partition_sizes
            layer.output_size_per_partition = sum(output_partition_sizes)
        create(layer, input_size_per_partition, output_partition_sizes, input_size, output_size, *args, **kwargs)

    method.create_weights = create_weights


def _pad_experts(method: Any, name: str, native: int, stored: int) -> None:
    create = method.create_weights

    def create_weights(layer: Any, *, intermediate_size_per_partition: int, **kwargs: Any) -> None:
        _check_native(name, {intermediate_size_per_partition}, native)
        layer.intermediate_size_per_partition = stored
        if getattr(layer.moe_runner_config, "intermediate_size_per_partition", None) is not None:
            layer.moe_runner_config.intermediate_size_per_partition = stored
        create(layer=layer, intermediate_size_per_partition=stored, **kwargs)

    method.create_weights = create_weights
