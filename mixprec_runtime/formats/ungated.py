"""Repair of experts without a gate, which have up and down only (Nemotron)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from .marlin import changed_attributes
from .repair import Call, Repair

__all__ = ["WITHOUT_GATE", "WITHOUT_GATE_TENSOR"]

_FILE = "srt/layers/quantization/fp8.py:1312"


def _halve(
    call: Call,
    layer: Any,
    num_experts: int,
    hidden_size: int,
    intermediate_size_per_partition: int,
    params_dtype: torch.dtype,
    **kwargs: Any,
) -> None:
    """Makes parameters of ``w13`` for up alone, where SGLang's method makes them for gate and up."""
    call.stock(layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **kwargs)
    if layer.moe_runner_config.is_gated:
        return
    for leaf in call.fmt.leaves:
        name, axis = f"w13_{call.fmt.sglang_name(leaf)}", call.fmt.axes(leaf).n
        parameter = layer._parameters.get(name)
        if parameter is None or not parameter.numel() or axis is None:
            continue
        dim = 1 + (1 - axis.dim if call.fmt.transposed_in_experts(leaf) else axis.dim)
        outputs = -(-intermediate_size_per_partition // axis.per)
        if parameter.shape[dim] != outputs:
            _shrink(layer, name, dim, outputs)


def _shrink(layer: Any, name: str, dim: int, size: int) -> None:
    old = layer._parameters[name]
    made = Parameter(old.data.narrow(dim, 0, size).clone(), requires_grad=False)
    made.__dict__.update(old.__dict__)
    layer.register_parameter(name, made)


def _keep_one_scale(call: Call, layer: Any, *args: Any, **kwargs: Any) -> None:
    call.stock(layer, *args, **kwargs)
    if not layer.moe_runner_config.is_gated:
        _shrink(layer, "w13_weight_scale", 1, 1)


def _process_one_scale(call: Call, layer: Any) -> None:
    """Has SGLang find two equal scales, and no experts whose values it would quantize again for a common one."""
    if layer.moe_runner_config.is_gated:
        call.stock(layer)
        return
    scale = layer._parameters["w13_weight_scale"]
    scale.data = scale.data.repeat(1, 2)
    with changed_attributes(layer, num_local_experts=0):
        call.stock(layer)


WITHOUT_GATE = Repair(
    name="experts without a gate",
    why="Methods make w13 for gate and up, whatever the layer has: half of it is never filled, and the kernels read "
    "it. Only unquantized experts and ModelOpt's are made without, from 0.5.19 on Fp8Config's, too.",
    where=_FILE,
    layer="experts",
    create=_halve,
)

WITHOUT_GATE_TENSOR = Repair(
    name="one scale of experts without a gate",
    why="Each expert has scales of gate and up, of which the first is that of up here and the second 1: the larger one "
    "is used for both.",
    where=_FILE,
    layer="experts",
    applies=lambda fmt: fmt.granularity == "tensor" and fmt.activations != "none",
    until="0.5.19",
    create=_keep_one_scale,
    process=_process_one_scale,
)
