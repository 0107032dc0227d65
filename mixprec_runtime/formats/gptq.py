"""GPTQ on Marlin: ``GPTQMarlinConfig``."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.gptq import GPTQConfig, GPTQMarlinConfig
from sglang.srt.layers.quantization.marlin_utils import check_marlin_supports_shape
from sglang.srt.utils import is_cpu

from mixprec_build.formats.base import Format
from mixprec_build.formats.gptq import Gptq

from .base import no_kernel
from .marlin import ROUTER_WEIGHTS, ServedGrouped, ids_of_other_ranks, permute_by_groups, recast
from .repair import ISSUES, PULLS, Call, Repair
from .ungated import WITHOUT_GATE

__all__ = ["ServedGptq"]


def _fall_back_to_exllama(fmt: Gptq, layer: Any, outputs: list[int], inputs: int, uncut: tuple[int, int]) -> None:
    fits, why = check_marlin_supports_shape(sum(outputs), inputs, uncut[1], fmt.group_size)
    if fits:
        return
    if not fmt.fits_untiled(outputs, inputs):
        raise ValueError(str(why))
    if layer.params_dtype != torch.half and not is_cpu():
        raise ValueError(f"{why} SGLang's other GPTQ kernel supports it, in FP16 only: give --dtype half.")
    other = GPTQConfig(fmt.bits, fmt.group_size, fmt.desc_act, False, {})
    try:
        layer.scheme = other.get_linear_scheme(layer)
    except RuntimeError as error:
        raise ValueError(f"{why} This SGLang has no other kernel: {error}") from error


def _refuse_cut_orders(
    call: Call,
    layer: Any,
    num_experts: int,
    hidden_size: int,
    intermediate_size_per_partition: int,
    params_dtype: torch.dtype,
    **kwargs: Any,
) -> None:
    if call.fmt.desc_act and layer.moe_tp_size > 1:
        raise ValueError(
            "experts with desc_act cannot be cut for tensor parallelism; use expert parallelism (--ep-size)."
        )
    call.stock(layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **kwargs)


def _create_scales(
    call: Call,
    layer: Any,
    num_experts: int,
    hidden_size: int,
    intermediate_size_per_partition: int,
    params_dtype: torch.dtype,
    **kwargs: Any,
) -> None:
    fmt: Gptq = call.fmt
    call.stock(layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **kwargs)
    groups = 1 if fmt.group_size == -1 else intermediate_size_per_partition // fmt.group_size
    recast(layer, "w13_scales", params_dtype)
    recast(layer, "w2_scales", params_dtype, (num_experts, groups, hidden_size))
    recast(layer, "w13_qzeros", torch.int32)
    recast(layer, "w2_qzeros", torch.int32, (num_experts, groups, hidden_size // fmt.pack))


def _drop_zero_points(call: Call, layer: Any) -> None:
    call.stock(layer)
    for name in ("w13_qzeros", "w2_qzeros"):
        layer._parameters.pop(name, None)


class ServedGptq(ServedGrouped[Gptq]):
    format: ClassVar[type[Format]] = Gptq
    repairs: ClassVar[tuple[Repair, ...]] = (
        Repair(
            name="linears that Marlin does not take",
            why="The result of check_marlin_supports_shape is ignored. For shapes that Marlin excludes, GPTQConfig "
            "has a kernel for FP16 activations, removed by 0.5.20.",
            where="srt/hardware_backend/gpu/quantization/gptq_kernels.py:139",
            layer="linear",
            issues=(f"{PULLS}/33988", f"{PULLS}/39741"),
            check=_fall_back_to_exllama,
        ),
        Repair(
            name="scales of experts",
            why="They are FP16 in every model (:217), and the kernel refuses BF16 activations: here they have the "
            "model's dtype, with one rounding at load. Without desc_act, w2_scales has the rows of all ranks instead "
            "of this rank's, and is then filled in part or fails to load. Zero points are made in the model's dtype "
            "and stay in memory, although symmetric weights need none.",
            where="srt/layers/quantization/gptq/schemes/gptq_moe.py:184",
            layer="experts",
            issues=(f"{ISSUES}/20599", f"{ISSUES}/36822", f"{ISSUES}/13252", f"{PULLS}/35955"),
            create=_create_scales,
            process=_drop_zero_points,
        ),
        permute_by_groups("srt/hardware_backend/gpu/quantization/gptq_kernels.py:338", "w13_scales", "w2_scales"),
        Repair(
            name="experts in act-order under tensor parallelism",
            why="Each rank would need the inputs of the others.",
            where="srt/layers/quantization/gptq/schemes/gptq_moe.py",
            layer="experts",
            applies=lambda fmt: bool(fmt.desc_act),
            create=_refuse_cut_orders,
        ),
        ids_of_other_ranks,
        ROUTER_WEIGHTS,
        WITHOUT_GATE,
    )

    def sglang_config(self, fmt: Gptq) -> QuantizationConfig:
        if not fmt.sym:
            raise no_kernel(fmt)
        settings: dict[str, Any] = {
            "bits": fmt.bits, "group_size": fmt.group_size, "sym": True, "desc_act": fmt.desc_act,
            "quant_method": "gptq",
        }  # fmt: skip
        return GPTQMarlinConfig(
            weight_bits=fmt.bits,
            group_size=fmt.group_size,
            desc_act=fmt.desc_act,
            is_sym=True,
            lm_head_quantized=False,
            dynamic={},
            full_config=settings,
        )

    def as_stored(
        self, fmt: Gptq, tensors: dict[str, torch.Tensor], widths: list[int] | None
    ) -> tuple[Format, dict[str, torch.Tensor]]:
        if not fmt.desc_act:
            # Its groups are those of the uncut weight; the scales may be those of this rank.
            tensors.pop("g_idx", None)
        return fmt, tensors
