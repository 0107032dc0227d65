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
from .marlin import ServedGrouped, changed_attributes, ids_of_other_ranks, recast
from .repair import Call, Repair

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
    with changed_attributes(layer, moe_tp_size=1):
        call.stock(layer, num_experts, hidden_size, intermediate_size_per_partition, params_dtype, **kwargs)
    for weight in ("w13", "w2"):
        recast(layer, f"{weight}_scales", params_dtype)
        recast(layer, f"{weight}_qzeros", torch.int32)


def _permute_scales(call: Call, layer: Any) -> None:
    with changed_attributes(layer, intermediate_size_per_partition=layer.hidden_size):
        call.stock(layer)
    for name in ("w13_qzeros", "w2_qzeros"):
        layer._parameters.pop(name, None)


class ServedGptq(ServedGrouped[Gptq]):
    format: ClassVar[type[Format]] = Gptq
    repairs: ClassVar[tuple[Repair, ...]] = (
        Repair(
            name="linears that Marlin does not take",
            why="The result of check_marlin_supports_shape is ignored. For shapes that Marlin excludes, GPTQConfig "
            "has a kernel for FP16 activations, removed by 0.5.23.",
            where="srt/hardware_backend/gpu/quantization/gptq_kernels.py:139",
            layer="linear",
            check=_fall_back_to_exllama,
        ),
        Repair(
            name="scales of experts",
            why="They are FP16 in every model (:217), and the kernel refuses BF16 activations: here they have the "
            "model's dtype, with one rounding at load. Without desc_act, w2_scales has the rows of all ranks instead "
            "of this rank's, and is then filled in part or fails to load. The scales of w13 are permuted for this "
            "rank's intermediate size instead of the hidden size (gptq_kernels.py:338), which is wrong where the "
            "former is one group. Zero points are made in the model's dtype and stay in memory, although symmetric "
            "weights need none.",
            where="srt/layers/quantization/gptq/schemes/gptq_moe.py:184",
            layer="experts",
            create=_create_scales,
            process=_permute_scales,
        ),
        Repair(
            name="experts in act-order under tensor parallelism",
            why="Each rank would need the inputs of the others.",
            where="srt/layers/quantization/gptq/schemes/gptq_moe.py",
            layer="experts",
            applies=lambda fmt: bool(fmt.desc_act),
            create=_refuse_cut_orders,
        ),
        ids_of_other_ranks,
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
