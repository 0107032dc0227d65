"""Base class and repairs of the formats that SGLang runs on its Marlin kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from sglang.srt.layers.moe import get_moe_runner_backend
from sglang.srt.layers.quantization.marlin_utils import check_marlin_supports_shape, check_moe_marlin_supports_layer
from torch.nn import Parameter

from mixprec_build.formats.base import Format
from mixprec_build.formats.grouped import Grouped

from .. import launch
from .base import Served
from .repair import ADVICE, Call, Repair

__all__ = [
    "PLACEHOLDER_MAP",
    "ServedGrouped",
    "changed_attributes",
    "create_runner",
    "ids_of_other_ranks",
    "may_get_negative_ids",
    "permute_by_groups",
    "recast",
    "require_shapes",
    "require_whole_words",
    "skip_negative_ids",
]

G = TypeVar("G", bound=Grouped)

PLACEHOLDER_MAP = torch.empty(0, dtype=torch.int32)


class ServedGrouped(Served[G]):
    def check_experts(self, layer: Any, fmt: G, prefix: str) -> None:
        # For shapes that Marlin excludes, GPTQ computes wrong results, and AWQ falls back to kernels that do not skip
        # ids of -1 (quantization/awq/awq.py:352).
        if not check_moe_marlin_supports_layer(layer, fmt.group_size):
            raise ValueError(
                f"{prefix} ({fmt.kind}): Marlin has no kernel for experts of hidden size {layer.hidden_size} and "
                f"{layer.intermediate_size_per_partition} intermediate columns a rank in groups of {fmt.group_size}. "
                f"{ADVICE}"
            )

    def may_be_empty(self, name: str, fmt: G) -> bool:
        # Without act_order there is no input order to store.
        return name.endswith("g_idx_sort_indices") or (name.endswith("g_idx") and not fmt.act_order)

    def values_in(self, name: str, parameter: torch.Tensor, fmt: G) -> int:
        if name.endswith(fmt.values_leaf):
            return parameter.numel() * fmt.pack
        return super().values_in(name, parameter, fmt)


def require_shapes(applies: Callable[[Any], bool], group_size: Callable[[Any], int]) -> Repair:
    """A repair that refuses linears whose shape Marlin excludes, for formats where ``applies`` is true."""

    def check(fmt: Format, layer: Any, outputs: list[int], inputs: int, uncut: tuple[int, int]) -> None:
        fits, why = check_marlin_supports_shape(sum(outputs), inputs, uncut[1], group_size(fmt))
        if not fits:
            raise ValueError(str(why))

    return Repair(
        name="shapes that Marlin does not take",
        why="AWQ falls back to a kernel for FP16 activations, whatever the model's dtype; other formats stop without "
        "naming the layer.",
        where="srt/layers/quantization/awq/awq.py:337",
        layer="linear",
        applies=applies,
        check=check,
    )


def require_whole_words(applies: Callable[[Any], bool]) -> Repair:
    """A repair that refuses ranks whose outputs end inside a packed word of eight."""

    def check(fmt: Format, layer: Any, outputs: list[int], inputs: int, uncut: tuple[int, int]) -> None:
        for size in outputs:
            if size % 8:
                raise ValueError(f"a rank would hold {size} outputs of a part, no multiple of 8.")

    return Repair(
        name="outputs that end inside a word",
        why="Outputs that are packed in words of eight are cut by words, and a remainder is silently dropped.",
        where="srt/layers/linear.py",
        layer="linear",
        applies=applies,
        check=check,
    )


def permute_by_groups(module: str, where: str) -> Repair:
    """A repair for experts whose method calls ``marlin_moe_permute_scales`` of the module named ``module``."""

    def process_weights_after_loading(call: Call, layer: Any) -> None:
        found = import_module(module)  # not at the top: it needs a GPU's libraries
        permute = found.marlin_moe_permute_scales

        def by_groups(s: torch.Tensor, size_k: int, size_n: int, group_size: int) -> torch.Tensor:
            permuted: torch.Tensor = permute(s, s.shape[1] * group_size, size_n, group_size)
            return permuted

        with patch.object(found, "marlin_moe_permute_scales", by_groups):
            call.stock(layer)

    return Repair(
        name="scales of gate and up permuted by the wrong inputs",
        why="The scales of w13 are permuted for this rank's intermediate size, or for the number of repacked words, "
        "instead of the hidden size, which is wrong where the former is one group. Here the number of inputs is that "
        "of the groups in the scales.",
        where=where,
        layer="experts",
        process=process_weights_after_loading,
    )


def create_runner(call: Call, layer: Any, *args: Any, **kwargs: Any) -> None:
    """Has SGLang make the runner of experts. Raises where arguments of the server exclude it, or experts elsewhere."""
    if not get_moe_runner_backend().is_auto():
        raise ValueError(f"{call.fmt.kind} experts run on Marlin: leave out --moe-runner-backend")
    call.stock(layer, *args, **kwargs)
    if may_get_negative_ids(layer):
        launch.check_experts_elsewhere(call.fmt.kind)


def _create_runner_with_map(call: Call, layer: Any, *args: Any, **kwargs: Any) -> None:
    if not get_moe_runner_backend().is_auto():  # SGLang asserts it, without a message (gptq_kernels.py:360)
        raise ValueError(f"{call.fmt.kind} experts run on Marlin only: leave out --moe-runner-backend")
    call.stock(layer, *args, **kwargs)
    if may_get_negative_ids(layer):
        skip_negative_ids(layer.scheme.kernel.runner)


ids_of_other_ranks = Repair(
    name="ids of experts on other ranks",
    why="The kernel skips ids of -1, for experts on other ranks, only if it gets an expert_map, which GPTQ and AWQ do "
    "not pass: it then reads memory before the weights. The contents of the map do not matter.",
    where="srt/layers/moe/fused_moe_triton/fused_marlin_moe.py",
    layer="experts",
    runner=_create_runner_with_map,
)


def skip_negative_ids(runner: Any) -> None:
    """Gives a Marlin runner a map of experts where it is given none, so that it leaves out ids of -1."""
    run = runner.run

    def run_with_map(dispatch_output: Any, quant_info: Any, *args: Any, **kwargs: Any) -> Any:
        if quant_info.expert_map is None:
            quant_info.expert_map = PLACEHOLDER_MAP
        return run(dispatch_output, quant_info, *args, **kwargs)

    runner.run = run_with_map


def may_get_negative_ids(layer: Any) -> bool:
    """Whether routed ids may be -1, for experts on other ranks or in other groups of a mixed layer."""
    return bool(layer.moe_ep_size > 1 or getattr(layer, "virtual_rank", False))


def recast(layer: Any, name: str, dtype: torch.dtype) -> None:
    """Replaces a parameter, before anything is loaded into it, by an uninitialized one of ``dtype``."""
    old = getattr(layer, name)
    if old.dtype != dtype:
        new = Parameter(torch.empty_like(old, dtype=dtype), requires_grad=False)
        new.__dict__.update(old.__dict__)
        layer.register_parameter(name, new)


@contextmanager
def changed_attributes(layer: Any, **values: Any) -> Iterator[None]:
    """Sets attributes of a layer while the context lasts, to the values that SGLang's code should have read."""
    before = {name: getattr(layer, name) for name in values}
    layer.__dict__.update(values)
    try:
        yield
    finally:
        layer.__dict__.update(before)
