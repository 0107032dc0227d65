"""W4AFP8 experts on SGLang's CUTLASS kernel for compute capability 9.0."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.w4afp8 import W4AFp8Config

from mixprec_build.formats.base import Format
from mixprec_build.formats.w4afp8 import W4afp8

from .base import ONE_INPUT_SCALE, Served
from .marlin import may_get_negative_ids
from .places import make_input_scale
from .repair import ADVICE, Call, Repair

__all__ = ["ServedW4afp8"]


_GROUP = 128


class _ExpertsOnly(W4AFp8Config):
    """No method for linears, for which SGLang's config has that of block FP8."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        return None if isinstance(layer, LinearBase) else super().get_quant_method(layer, prefix)


def _create_input_scales(call: Call, layer: Any, *args: Any, **kwargs: Any) -> None:
    call.stock(layer, *args, **kwargs)
    for weight in ("w13", "w2"):
        make_input_scale(layer, f"{weight}_input_scale")


def _run(call: Call, layer: Any, dispatch_output: StandardDispatchOutput, *args: Any, **kwargs: Any) -> Any:
    topk = dispatch_output.topk_output
    if may_get_negative_ids(layer):
        ids = torch.where(topk.topk_ids < 0, layer.num_local_experts, topk.topk_ids)
        dispatch_output = dispatch_output._replace(topk_output=topk._replace(topk_ids=ids))
    return call.stock(layer, dispatch_output, *args, **kwargs)


class ServedW4afp8(Served[W4afp8]):
    format: ClassVar[type[Format]] = W4afp8
    repairs: ClassVar[tuple[Repair, ...]] = (
        Repair(
            name="scales of inputs that are rounded before they are compared",
            why="The scales of gate and up are loaded into one parameter in BF16. The second one is compared with what "
            "the first was rounded to, and the load stops where rounding changed it by more than 1e-5.",
            where="srt/layers/moe/fused_moe_triton/layer.py:1163",
            layer="experts",
            create=_create_input_scales,
        ),
        Repair(
            name="ids of experts elsewhere, of W4AFP8",
            why="Rows of experts elsewhere are skipped by the id after the last one. SGLang puts it in place of -1 "
            "where expert parallelism is on, but a group of a mixed layer gets -1 without it, too. From 0.5.23 on, "
            "kernels skip every id that is no expert's.",
            where="srt/layers/moe/cutlass_w4a8_moe.py:131",
            layer="experts",
            until="0.5.23",
            run=_run,
        ),
    )

    def sglang_config(self, fmt: W4afp8) -> QuantizationConfig:
        return _ExpertsOnly()

    def check_experts(self, layer: Any, fmt: W4afp8, prefix: str) -> None:
        if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9:
            raise ValueError(
                f"{prefix} ({fmt.kind}): SGLang's kernel for W4AFP8 runs on compute capability 9.0 only; build the "
                "checkpoint with another format for these experts"
            )
        hidden, intermediate = layer.hidden_size, layer.intermediate_size_per_partition
        if hidden % _GROUP or intermediate % _GROUP:
            raise ValueError(
                f"{prefix} ({fmt.kind}): SGLang has no kernel for experts of hidden size {hidden} and {intermediate} "
                f"intermediate columns a rank, which must be multiples of {_GROUP}. {ADVICE}"
            )
        config = layer.moe_runner_config
        limits = config.gemm1_alpha, config.gemm1_clamp_limit, getattr(config, "swiglu_limit", None)
        plain = not config.apply_router_weight_on_input and not config.no_combine
        if config.activation != "silu" or not config.is_gated or any(limits) or not plain:
            raise ValueError(
                f"{prefix} ({fmt.kind}): SGLang's kernel for W4AFP8 computes gated SiLU only, and multiplies "
                "outputs by the router's weights; build the checkpoint with another format for these experts"
            )

    def runners(self, fmt: W4afp8) -> tuple[str, ...]:
        return ("cutlass",)

    def unmovable(self, fmt: W4afp8) -> str:
        return ONE_INPUT_SCALE

    def product_error(self, fmt: W4afp8) -> float:
        # Activations are rounded to FP8.
        return 0.06

    def values_in(self, name: str, parameter: torch.Tensor, fmt: W4afp8) -> int:
        return 2 * parameter.numel() if name.endswith("weight") else 0
