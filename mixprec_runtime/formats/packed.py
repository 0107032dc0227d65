"""compressed-tensors' packed Int4 and Int8 on Marlin: ``CompressedTensorsConfig``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from torch.nn import Parameter

from mixprec_build.formats.base import Format
from mixprec_build.formats.packed import Packed

from .marlin import (
    PACKED_AS_WEIGHT,
    PLACEHOLDER_MAP,
    ROUTER_WEIGHTS,
    ServedGrouped,
    create_runner,
    may_get_negative_ids,
    permute_by_groups,
    recast,
    require_shapes,
    require_whole_words,
    zero_points_by_tiles,
)
from .one_scheme import OneScheme
from .repair import Call, Repair
from .ungated import WITHOUT_GATE

__all__ = ["ServedPacked"]


_MOE = "compressed_tensors/schemes/compressed_tensors_wNa16_moe"


def _drop_packed(call: Call, layer: Any) -> None:
    parameters = layer._parameters
    alias = "weight" in parameters and parameters["weight"] is parameters.get("weight_packed")
    call.stock(layer)
    if alias:
        layer.weight = layer.weight_packed


def _create_experts(
    call: Call,
    layer: Any,
    num_experts: int,
    hidden_size: int,
    intermediate_size_per_partition: int,
    params_dtype: torch.dtype,
    **kwargs: Any,
) -> None:
    if call.fmt.actorder and layer.moe_tp_size > 1:
        raise ValueError(
            "experts with weight_g_idx cannot be cut for tensor parallelism; use expert parallelism (--ep-size)."
        )
    call.stock(layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **kwargs)
    for weight in ("w13", "w2"):
        recast(layer, f"{weight}_weight_shape", torch.int64)
        for name in (f"{weight}_weight_g_idx", f"{weight}_g_idx_sort_indices"):
            if not call.fmt.actorder:
                empty = torch.empty((num_experts, 0), dtype=torch.int32, device=layer._parameters[name].device)
                layer.register_parameter(name, Parameter(empty, requires_grad=False))


def _drop_shapes(call: Call, layer: Any) -> None:
    for name in ("w13_weight_shape", "w2_weight_shape"):
        layer._parameters.pop(name, None)
    call.stock(layer)


def _run_with_map(call: Call, layer: Any, dispatch_output: Any) -> Any:
    scheme = layer.scheme
    if not may_get_negative_ids(layer) or not scheme.runner.runner_backend.is_marlin():
        return call.stock(layer, dispatch_output)
    info = scheme.get_marlin_quant_info(layer)
    info.expert_map = PLACEHOLDER_MAP
    return scheme.runner.run(dispatch_output, info)


def _run_with_alpha(call: Call, layer: Any, dispatch_output: Any) -> Any:
    scheme = layer.scheme
    plain = scheme.moe_runner_config.gemm1_alpha is None or not scheme.runner.runner_backend.is_marlin()
    if plain or may_get_negative_ids(layer):  # these are left out by the runner, in the repair above
        return call.stock(layer, dispatch_output)
    return scheme.runner.run(dispatch_output, scheme.get_marlin_quant_info(layer))


class ServedPacked(ServedGrouped[Packed]):
    format: ClassVar[type[Format]] = Packed
    repairs: ClassVar[tuple[Repair, ...]] = (
        require_shapes(lambda fmt: True, lambda fmt: int(fmt.group_size)),
        require_whole_words(lambda fmt: not fmt.sym),
        zero_points_by_tiles("linear", ("weight_scale", "weight_zero_point"), applies=lambda fmt: not fmt.sym),
        Repair(
            name="packed weights kept beside repacked ones",
            why="DeepSeek's dense MLPs register weight_packed as weight, too, which keeps it in memory after Marlin "
            "has repacked it.",
            where="srt/models/deepseek_v2.py:290",
            layer="linear",
            process=_drop_packed,
        ),
        Repair(
            name="shapes and orders of experts",
            why="The parameter for the integers of weight_shape is float32: here int64. Input orders have full size "
            "even where none are loaded: here they are empty. With input orders, each rank would need the inputs of "
            "others: as for GPTQ, tensor parallelism is refused.",
            where=f"srt/layers/quantization/{_MOE}.py",
            layer="experts",
            create=_create_experts,
        ),
        PACKED_AS_WEIGHT,
        permute_by_groups(f"srt/layers/quantization/{_MOE}.py:300", "w13_weight_scale", "w2_weight_scale"),
        Repair(
            name="shapes of experts that nobody reads",
            why="They stay in memory: here they are removed after loading.",
            where=f"srt/layers/quantization/{_MOE}.py",
            layer="experts",
            process=_drop_shapes,
        ),
        Repair(
            name="ids of experts in other groups",
            why="The kernel skips ids of -1 only if the layer's dispatcher has a map of experts, which a group lacks.",
            where=f"srt/layers/quantization/{_MOE}.py:468",
            layer="experts",
            runner=create_runner,
            run=_run_with_map,
        ),
        Repair(
            name="activations with an alpha",
            why="The class calls Marlin without the alpha and the limit of the activation (MiniMax-M3's), and so "
            "computes SiLU. SGLang's runner passes both.",
            where=f"srt/layers/quantization/{_MOE}.py:474",
            layer="experts",
            run=_run_with_alpha,
        ),
        ROUTER_WEIGHTS,
        WITHOUT_GATE,
    )

    def sglang_config(self, fmt: Packed) -> QuantizationConfig:
        size: dict[str, Any] = {"strategy": "channel"}
        if fmt.group_size != -1:
            size = {"strategy": "group", "group_size": fmt.group_size}
        weights = {"num_bits": fmt.bits, "type": "int", "symmetric": fmt.sym, **size}
        return OneScheme.of(fmt, weights, actorder=fmt.actorder)
