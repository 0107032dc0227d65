"""MXFP4 experts on Marlin: SGLang's class for those of DeepSeek-V4, also for what other producers store.

The bytes are the same but for names and dtypes. gpt-oss's have biases as well, which the class does not make and Marlin
takes; SGLang pads them, and so are they here.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization import mxfp4_marlin_moe
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config
from torch.nn import Parameter
from torch.nn.functional import pad

from mixprec_build.formats.base import Format
from mixprec_build.formats.mxfp4 import Mxfp4

from .base import Served, may_have_biases
from .marlin import (
    PACKED_AS_WEIGHT,
    ROUTER_WEIGHTS,
    changed_attributes,
    create_runner,
    may_get_negative_ids,
    recast,
    rename,
    require_activation,
    skip_negative_ids,
)
from .repair import ADVICE, Call, Repair

__all__ = ["ServedMxfp4"]


_FILE = "srt/layers/quantization/mxfp4_marlin_moe.py"
_BLOCK = 32
_VALUES, _SCALES = "weight", "weight_scale_inv"
"""The class's names of the two parameters, whose dtypes are int8 and E8M0."""
_DTYPES = {"U8": torch.uint8, "I8": torch.int8, "F8_E8M0": torch.float8_e8m0fnu}


class _NothingBefore:
    """Stands for SGLang's FP8 method, which prepares such experts on other GPUs than NVIDIA's."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Leaves ``layer`` as it is."""


class _OnMarlin(Mxfp4Config):
    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
            raise ValueError(
                f"{prefix}: on this GPU SGLang runs MXFP4 on no kernel, or on one that mixprec does not serve yet; "
                "build the checkpoint with another format for it, or serve it on compute capability 9.0 (Hopper)"
            )
        if isinstance(layer, LinearBase):
            raise ValueError(
                f"{prefix}: SGLang has no kernel for linears in MXFP4 on this generation of GPUs, only for experts; "
                "build the checkpoint with another format for it"
            )
        return mxfp4_marlin_moe.Mxfp4MarlinMoEMethod(_NothingBefore(), prefix)


def _create_experts(
    call: Call,
    layer: Any,
    num_experts: int,
    hidden_size: int,
    intermediate_size_per_partition: int,
    params_dtype: torch.dtype,
    **kwargs: Any,
) -> None:
    method: Any = call.method
    # Again, for 0.5.15 tells only now whether there are biases.
    biases = bool(kwargs.get("with_bias"))
    _require_tiles(method.prefix, call.fmt, hidden_size, intermediate_size_per_partition, biases=biases)
    call.stock(layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **kwargs)
    method.hidden_pad = 0
    sizes = {
        "w13": (2 * intermediate_size_per_partition, hidden_size),
        "w2": (hidden_size, intermediate_size_per_partition),
    }
    for weight, (outputs, inputs) in sizes.items():
        for (theirs, name, dtype), in_one in zip(_stored(call.fmt), (2, _BLOCK), strict=True):
            shape = (num_experts, outputs, inputs // in_one)
            recast(layer, f"{weight}_{theirs}", _DTYPES[dtype], shape)
            rename(layer, f"{weight}_{theirs}", f"{weight}_{name}")
        if biases:
            bias = torch.empty((num_experts, outputs), dtype=params_dtype, device=next(layer.parameters()).device)
            layer.register_parameter(f"{weight}_bias", Parameter(bias, requires_grad=False))
    layer.moe_runner_config.gate_up_interleaved = False  # gate and up are two halves, whatever the activation


def _require_tiles(prefix: str, fmt: Format, hidden: int, columns: int, *, biases: bool) -> None:
    """Raises ``ValueError`` for sizes of a rank's experts that Marlin's tiles do not divide; with biases, they are
    padded."""
    if hidden % (64 if biases else 128) or columns % 64:
        raise ValueError(
            f"{prefix} ({fmt.kind}): Marlin has no kernel for experts of hidden size {hidden} and {columns} "
            f"intermediate columns a rank. {ADVICE}"
        )


def _process_experts(call: Call, layer: Any) -> None:
    for weight in ("w13", "w2"):
        for (theirs, name, _), dtype in zip(_stored(call.fmt), (torch.int8, torch.float8_e8m0fnu), strict=True):
            rename(layer, f"{weight}_{name}", f"{weight}_{theirs}")
            parameter = layer._parameters[f"{weight}_{theirs}"]
            parameter.data = parameter.data.view(dtype)
    if "w2_bias" in layer._parameters:
        if layer.moe_tp_rank:  # the ranks' outputs are added up
            layer.w2_bias.data.zero_()
        _pad_as_sglang(layer)
    call.stock(layer)
    for weight in ("w13", "w2"):
        layer._parameters.pop(f"{weight}_bias", None)
        layer._parameters.pop(f"{weight}_{_SCALES}", None)  # 0.5.15 and 0.5.16 keep them beside repacked ones


def _process_halves(call: Call, layer: Any) -> None:
    with changed_attributes(layer.moe_runner_config, gemm1_alpha=None):  # which the method's runner has, too
        call.stock(layer)


def _pad_as_sglang(layer: Any) -> None:
    """Adds zeros up to the sizes that SGLang's classes make for experts with biases: 128 columns and 256 inputs."""
    columns, inputs = layer.w2_weight.shape[2] * 2, layer.w2_weight.shape[1]
    more_columns, more_inputs = -columns % 128, -inputs % 256
    for name, in_one, filler in ((_VALUES, 2, 0), (_SCALES, _BLOCK, 127)):
        w13, w2 = layer._parameters[f"w13_{name}"], layer._parameters[f"w2_{name}"]
        halves = w13.data.view(torch.uint8).unflatten(1, (2, columns))
        halves = pad(halves, (0, more_inputs // in_one, 0, more_columns), value=filler).flatten(1, 2)
        downs = pad(w2.data.view(torch.uint8), (0, more_columns // in_one, 0, more_inputs), value=filler)
        w13.data, w2.data = halves.view(w13.dtype), downs.view(w2.dtype)
    w13, w2 = layer.w13_bias, layer.w2_bias
    w13.data = pad(w13.data.unflatten(1, (2, columns)), (0, more_columns)).flatten(1, 2)
    w2.data = pad(w2.data, (0, more_inputs))


def _stored(fmt: Mxfp4) -> tuple[tuple[str, str, str], ...]:
    """SGLang's name, that by which it is loaded, and its dtype, of the values and of the scales."""
    return (_VALUES, fmt.values, fmt.values_dtype), (_SCALES, fmt.sglang_name(fmt.scales), fmt.scales_dtype)


def _create_runner(call: Call, layer: Any, *args: Any, **kwargs: Any) -> None:
    create_runner(call, layer, *args, **kwargs)
    if may_get_negative_ids(layer):
        skip_negative_ids(call.method.runner)


def _create_scaled(call: Call, layer: Any, *args: Any, **kwargs: Any) -> None:
    call.stock(layer, *args, **kwargs)
    models: Any = importlib.import_module("sglang.srt.models.deepseek_v2")
    add = models.maybe_fuse_routed_scale_and_shared_add
    if hasattr(add, "leaves_to_runner"):
        return

    def add_scaled(
        experts: Any, routed: torch.Tensor, shared: torch.Tensor | None, routed_scaling_factor: float
    ) -> torch.Tensor:
        """DeepSeek's blocks multiply by the factor where the method of their experts is SGLang's for MXFP4."""
        ours = hasattr(experts.quant_method, "mixprec_repairs")
        return cast(torch.Tensor, add(experts, routed, shared, 1.0 if ours else routed_scaling_factor))

    add_scaled.leaves_to_runner = True  # type: ignore[attr-defined]
    models.maybe_fuse_routed_scale_and_shared_add = add_scaled


def _run_scaled(call: Call, layer: Any, dispatch_output: Any) -> Any:
    factor = layer.moe_runner_config.routed_scaling_factor
    # A group's router is that of the mixed layer, whose method does not ask it to multiply.
    in_router = layer.should_fuse_routed_scaling_factor_in_topk and not getattr(layer, "virtual_rank", False)
    if factor in (None, 1.0) or in_router:
        return call.stock(layer, dispatch_output)
    topk = dispatch_output.topk_output
    scaled = topk._replace(topk_weights=topk.topk_weights * factor)
    return call.stock(layer, dispatch_output._replace(topk_output=scaled))


class ServedMxfp4(Served[Mxfp4]):
    format: ClassVar[type[Format]] = Mxfp4
    biased_experts: ClassVar[bool] = True
    repairs: ClassVar[tuple[Repair, ...]] = (
        Repair(
            name="MXFP4 by other names, and without padding",
            why="SGLang's class for Marlin has DeepSeek-V4's names and dtypes, and parameters that are padded beyond "
            "what Marlin needs, in part with uninitialized values that are multiplied, in part so that loading fails. "
            "Here parameters have the checkpoint's names, dtypes and shapes until they are repacked. Biases of "
            "gpt-oss's experts, which the class does not make, are added.",
            where=f"{_FILE}:60",
            layer="experts",
            create=_create_experts,
            process=_process_experts,
        ),
        PACKED_AS_WEIGHT,
        Repair(
            name="rows of gate and up that do not alternate",
            why="Where activations have an alpha, the class moves rows of w13 as if those of gate and up alternated, "
            "as in gpt-oss's release. Here they are two halves, for gpt-oss, Kimi-K3 and MiniMax-M3 alike, and stay "
            "where they are.",
            where=f"{_FILE}:168",
            layer="experts",
            process=_process_halves,
        ),
        Repair(
            name="ids of experts elsewhere, of MXFP4",
            why="Ids of -1 are left out only where the layer's dispatcher has a map of experts, which a group of "
            "experts has not.",
            where=f"{_FILE}:29",
            layer="experts",
            runner=_create_runner,
        ),
        ROUTER_WEIGHTS,
        Repair(
            name="the scaling factor of routed experts",
            why="Marlin's runner leaves it out for MXFP4, and models that rely on runners for it lose it. Here the "
            "router's weights are multiplied by it, where the router has not done so, and DeepSeek's blocks, which "
            "multiply by it for this class alone, do not.",
            where="srt/layers/moe/fused_moe_triton/fused_marlin_moe.py:418",
            layer="experts",
            create=_create_scaled,
            run=_run_scaled,
        ),
    )

    def sglang_config(self, fmt: Mxfp4) -> QuantizationConfig:
        return _OnMarlin(is_checkpoint_mxfp4_serialized=True)

    def check_experts(self, layer: Any, fmt: Mxfp4, prefix: str) -> None:
        require_activation(layer, fmt, prefix)
        if not layer.moe_runner_config.is_gated:  # SGLang's class takes w13 for gate and up
            raise ValueError(
                f"{prefix} ({fmt.kind}): Marlin runs no such experts without a gate. Build the checkpoint with another "
                "format for this module."
            )
        sizes = layer.hidden_size, layer.intermediate_size_per_partition
        _require_tiles(prefix, fmt, *sizes, biases=may_have_biases(layer))

    def as_stored(
        self, fmt: Mxfp4, tensors: dict[str, torch.Tensor], widths: list[int] | None
    ) -> tuple[Format, dict[str, torch.Tensor]]:
        return replace(fmt, scales=fmt.sglang_name(fmt.scales)), tensors

    def unmovable(self, fmt: Mxfp4) -> str:
        return ""

    def runners(self, fmt: Mxfp4) -> tuple[str, ...]:
        return ("marlin",)

    def values_in(self, name: str, parameter: torch.Tensor, fmt: Mxfp4) -> int:
        if not name.endswith(("weight", "weight_packed")):
            return 0
        return parameter.numel() * (8 if parameter.dtype == torch.int32 else 2)
