"""Base class and repairs of the formats that SGLang runs on its Marlin kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from sglang.srt.layers.moe import get_moe_runner_backend
from sglang.srt.layers.quantization.marlin_utils import (
    check_marlin_supports_shape,
    check_moe_marlin_supports_layer,
    marlin_moe_permute_scales,
)
from torch.nn import Parameter

from mixprec_build.formats.base import Format
from mixprec_build.formats.grouped import Grouped

from .. import launch
from .base import Served
from .places import add_alias
from .repair import ADVICE, PULLS, Call, Repair

__all__ = [
    "PACKED_AS_WEIGHT",
    "PLACEHOLDER_MAP",
    "ROUTER_WEIGHTS",
    "ServedGrouped",
    "changed_attributes",
    "create_runner",
    "ids_of_other_ranks",
    "in_float32",
    "may_get_negative_ids",
    "permute_by_groups",
    "recast",
    "rename",
    "require_activation",
    "require_shapes",
    "require_whole_words",
    "skip_negative_ids",
    "zero_points_by_tiles",
]

G = TypeVar("G", bound=Grouped)

PLACEHOLDER_MAP = torch.empty(0, dtype=torch.int32)
_TILE = 64
"""Inputs of the smallest tile of weights that a Marlin kernel multiplies at a time."""


class ServedGrouped(Served[G]):
    def check_experts(self, layer: Any, fmt: G, prefix: str) -> None:
        require_activation(layer, fmt, prefix)
        # For shapes that Marlin excludes, GPTQ computes wrong results, and AWQ falls back to kernels that do not skip
        # ids of -1 (quantization/awq/awq.py:352).
        if not check_moe_marlin_supports_layer(layer, fmt.group_size):
            raise ValueError(
                f"{prefix} ({fmt.kind}): Marlin has no kernel for experts of hidden size {layer.hidden_size} and "
                f"{layer.intermediate_size_per_partition} intermediate columns a rank in groups of {fmt.group_size}. "
                f"{ADVICE}"
            )

    def unmovable(self, fmt: G) -> str:
        return ""

    def runners(self, fmt: G) -> tuple[str, ...]:
        return ("marlin",)

    def may_be_empty(self, name: str, fmt: G) -> bool:
        # Without act_order there is no input order to store.
        return name.endswith("g_idx_sort_indices") or (name.endswith("g_idx") and not fmt.act_order)

    def values_in(self, name: str, parameter: torch.Tensor, fmt: G) -> int:
        if name.endswith(fmt.values_leaf):
            return parameter.numel() * fmt.pack
        return super().values_in(name, parameter, fmt)


def require_activation(layer: Any, fmt: Format, prefix: str) -> None:
    """Raises ``ValueError`` for experts whose activation Marlin lacks.

    check_moe_marlin_supports_layer of SGLang's marlin_utils.py has these rules without a reason, but for limits, which
    its runner ignores (moe_runner/marlin.py).
    """
    config = layer.moe_runner_config
    unfit = ""
    if config.apply_router_weight_on_input:
        unfit = "multiplies outputs of experts by the router's weights, and this model their inputs"
    elif config.activation not in ({"silu", "situ"} if config.is_gated else {"silu", "relu2"}):
        unfit = f"has no {config.activation} for experts"
    elif config.gemm1_clamp_limit is not None and config.gemm1_alpha is None:
        unfit = f"ignores the limit of this activation ({config.gemm1_clamp_limit})"
    if unfit:
        raise ValueError(
            f"{prefix} ({fmt.kind}): Marlin {unfit}. Build the checkpoint with another format for this module."
        )


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


def permute_by_groups(where: str, *names: str) -> Repair:
    """A repair for experts whose scales (parameters ``names``) SGLang permutes for another number of inputs."""

    def process_weights_after_loading(call: Call, layer: Any) -> None:
        loaded = {name: layer._parameters[name].data.clone() for name in names}
        call.stock(layer)
        for name, scales in loaded.items():
            now = layer._parameters[name].data
            if now.shape != scales.shape:
                raise RuntimeError(
                    f"{name} has another shape after SGLang processed it, {list(now.shape)} instead of "
                    f"{list(scales.shape)}, so that it cannot be repaired"
                )
            groups, columns = scales.shape[1:]
            inputs = groups * call.fmt.group_size
            now.copy_(marlin_moe_permute_scales(scales, inputs, columns, call.fmt.group_size))

    return Repair(
        name="scales of gate and up permuted by the wrong inputs",
        why="The scales of w13 are permuted for this rank's intermediate size, or for the number of repacked words, "
        "instead of the hidden size, which is wrong where the former is one group. Here the number of inputs is that "
        "of the groups in the scales.",
        where=where,
        issues=("https://github.com/vllm-project/vllm/pull/50196",),
        layer="experts",
        process=process_weights_after_loading,
    )


def zero_points_by_tiles(layer_kind: str, *pairs: tuple[str, str], applies: Callable[[Any], bool]) -> Repair:
    """A repair for ``layer_kind`` with zero points: groups become as short as a tile, by repeating what they share.

    Args:
        pairs: names of parameters in Marlin's layout, scales ``[..., groups, N]`` and zero points
            ``[..., groups, N/8]``.
    """

    def process_weights_after_loading(call: Call, layer: Any) -> None:
        call.stock(layer)
        for names in pairs:
            for name in names:
                parameter = layer._parameters[name]
                times = call.fmt.group_size // _TILE
                # The only group of a weight is read once, before the first tile.
                if times > 1 and parameter.shape[-2] > 1:
                    repeated = parameter.data.repeat_interleave(times, dim=-2)
                    layer.register_parameter(name, Parameter(repeated, requires_grad=False))

    return Repair(
        name=f"zero points of {layer_kind} read while the next arrive",
        why="Of a group of 128 inputs, the kernel reads the zero points again for the second tile of 64, from a place "
        "in shared memory that other warps may by then have the next group's copied to. Products are then off by up "
        "to 1.4 %, now and then. Here groups have the length of a tile, with the same scales and zero points: each "
        "is read before the barrier that the copy waits for. Weights keep their values and take 4 % more memory.",
        where="kernels/jit/csrc/gemm/marlin_moe/marlin_template.h:1137",
        layer=layer_kind,
        applies=applies,
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
    issues=(f"{PULLS}/38115",),
    layer="experts",
    runner=_create_runner_with_map,
)


def _add_aliases(call: Call, layer: Any, *args: Any, **kwargs: Any) -> None:
    call.stock(layer, *args, **kwargs)
    for weight in ("w13", "w2"):
        add_alias(layer, f"{weight}_weight", of=f"{weight}_weight_packed")


def _drop_aliases(call: Call, layer: Any) -> None:
    for weight in ("w13", "w2"):
        layer._parameters.pop(f"{weight}_weight", None)
    call.stock(layer)


PACKED_AS_WEIGHT = Repair(
    name="packed values by another name",
    why="As DeepSeek-V4's class, Kimi-K3's (models/kimi_k3.py:2763) looks for weight_packed under the name weight, "
    "whatever the format, since SGLang's method for MXFP4 has a parameter of that name. It drops tensors without one, "
    "and says nothing.",
    where="srt/models/deepseek_v4.py:2970",
    layer="experts",
    applies=lambda fmt: fmt.values_leaf == "weight_packed",
    create=_add_aliases,
    process=_drop_aliases,
)


def in_float32(topk: Any) -> Any:
    """A router's output with its weights in float32, as Marlin reads them whatever they are."""
    weights = getattr(topk, "topk_weights", None)
    if weights is None or weights.dtype == torch.float32:
        return topk
    return topk._replace(topk_weights=weights.float())


def _run_with_float32(call: Call, layer: Any, dispatch_output: Any) -> Any:
    topk = getattr(dispatch_output, "topk_output", None)
    exact = in_float32(topk)
    return call.stock(layer, dispatch_output if exact is topk else dispatch_output._replace(topk_output=exact))


ROUTER_WEIGHTS = Repair(
    name="router weights that are not float32",
    why="The kernel reads the router's weights as float32 without a look at their dtype, and so beyond their end. The "
    "router of Phi-3.5-MoE (models/phimoe.py:105) has them in the model's dtype.",
    where="kernels/jit/csrc/gemm/marlin_moe/moe_wna16_marlin.cuh:670",
    layer="experts",
    run=_run_with_float32,
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


def recast(layer: Any, name: str, dtype: torch.dtype, shape: tuple[int, ...] | None = None) -> None:
    """Replaces a parameter, before anything is loaded into it, by an uninitialized one of ``dtype`` and ``shape``."""
    old = layer._parameters[name]
    shape = tuple(old.shape) if shape is None else shape
    if (old.dtype, tuple(old.shape)) != (dtype, shape):
        new = Parameter(torch.empty(shape, dtype=dtype, device=old.device), requires_grad=False)
        new.__dict__.update(old.__dict__)
        layer.register_parameter(name, new)


def rename(layer: Any, before: str, after: str) -> None:
    """Registers the parameter ``before`` as ``after`` instead, if there is one."""
    if before in layer._parameters:
        layer.register_parameter(after, layer._parameters.pop(before))


@contextmanager
def changed_attributes(layer: Any, **values: Any) -> Iterator[None]:
    """Sets attributes of a layer while the context lasts, to the values that SGLang's code should have read."""
    before = {name: getattr(layer, name) for name in values}
    layer.__dict__.update(values)
    try:
        yield
    finally:
        layer.__dict__.update(before)
