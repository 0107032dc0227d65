"""FP8: ``Fp8Config``, ``W8A8Fp8Config`` for scales by channel, compressed-tensors for unquantized activations."""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any, ClassVar

import torch
from sglang.srt.layers.quantization import fp8_utils
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.w8a8_fp8 import W8A8Fp8Config
from torch.nn import Parameter

from mixprec_build.formats.base import Format
from mixprec_build.formats.fp8 import Fp8

from .. import launch
from .base import NEVER_MOVED, ONE_INPUT_SCALE, no_kernel
from .marlin import may_get_negative_ids, require_shapes
from .one_scheme import OneScheme
from .repair import Call, Repair
from .scaled import BLOCK_REPAIRS, ServedScaled
from .ungated import WITHOUT_GATE, WITHOUT_GATE_TENSOR

__all__ = ["ServedFp8"]


_USUAL_BLOCK = (128, 128)


def _create_in_blocks(call: Call, layer: Any, *args: Any, **kwargs: Any) -> None:
    """Has Triton multiply in blocks of another size than the kernels take that SGLang chose."""
    method: Any = call.method
    chosen = method.w8a8_block_fp8_linear
    by_inputs = "weight_block_size" in signature(fp8_utils.dispatch_w8a8_block_fp8_linear).parameters
    if not (by_inputs and call.fmt.block[1] != _USUAL_BLOCK[1]):
        options = chosen.keywords if isinstance(chosen, partial) else {}
        method.w8a8_block_fp8_linear = partial(fp8_utils.triton_w8a8_block_fp8_linear, **options)
    call.stock(layer, *args, **kwargs)


def _process_experts(call: Call, layer: Any) -> None:
    call.stock(layer)
    if may_get_negative_ids(layer):
        for weight in ("w13", "w2"):
            scale = layer._parameters[f"{weight}_weight_scale"].data.reshape(-1, 1, 1)
            columns = scale.expand(-1, layer._parameters[f"{weight}_weight"].shape[1], 1).contiguous()
            layer.register_parameter(f"{weight}_weight_scale", Parameter(columns, requires_grad=False))


def _create_runner(call: Call, layer: Any, *args: Any, **kwargs: Any) -> None:
    """Has activations scaled token by token, with the same weights and weight scales."""
    call.stock(layer, *args, **kwargs)
    if not may_get_negative_ids(layer):
        return
    launch.check_experts_elsewhere("fp8_tensor")
    runner: Any = call.method.runner
    run = runner.run

    def run_by_token(dispatch_output: Any, quant_info: Any, *args: Any, **kwargs: Any) -> Any:
        quant_info.per_channel_quant = True
        return run(dispatch_output, quant_info, *args, **kwargs)

    runner.run = run_by_token


class ServedFp8(ServedScaled[Fp8]):
    format: ClassVar[type[Format]] = Fp8
    repairs: ClassVar[tuple[Repair, ...]] = (
        *BLOCK_REPAIRS,
        require_shapes(lambda fmt: fmt.activations == "none", lambda fmt: -1),
        Repair(
            name="blocks of other sizes than 128 x 128",
            why="SGLang chooses DeepGEMM or CUTLASS by the GPU alone, from 0.5.21 on also by the inputs of a block. "
            "They take scales for those of 128 outputs and inputs, and stop when the first tokens come.",
            where="srt/layers/quantization/fp8_utils.py:472",
            layer="linear",
            applies=lambda fmt: fmt.block not in (None, _USUAL_BLOCK),
            create=_create_in_blocks,
        ),
        Repair(
            name="one scale for activations of experts",
            why="With one scale for a weight, activations have one scale as well, for the largest value of all rows. "
            "Rows of experts on other ranks are uninitialized, and may set it. Here each token has one, and the scale "
            "of a weight is repeated for its outputs.",
            where="kernels/ops/moe/fused_moe_triton_kernels.py:765",
            layer="experts",
            applies=lambda fmt: fmt.granularity == "tensor" and fmt.activations == "dynamic",
            process=_process_experts,
            runner=_create_runner,
        ),
        WITHOUT_GATE,
        WITHOUT_GATE_TENSOR,
    )

    def sglang_config(self, fmt: Fp8) -> QuantizationConfig:
        if fmt.activations == "none" and fmt.block is None:
            return OneScheme.of(fmt, {"num_bits": 8, "type": "float", "strategy": fmt.granularity})
        if fmt.activations == "none":
            raise no_kernel(fmt)
        if fmt.granularity == "channel":
            return W8A8Fp8Config(is_checkpoint_fp8_serialized=True)
        made = Fp8Config(
            is_checkpoint_fp8_serialized=True,
            activation_scheme=fmt.activations,
            weight_block_size=list(fmt.block) if fmt.block else None,
        )
        made.scale_fmt = fmt.scale_fmt or None  # read from 0.5.21 on
        return made

    def runners(self, fmt: Fp8) -> tuple[str, ...]:
        usual = fmt.block == _USUAL_BLOCK and fmt.activations == "dynamic"
        return ("triton", "deep_gemm") if usual else ("triton",)

    def unmovable(self, fmt: Fp8) -> str:
        if fmt.granularity == "tensor" and fmt.activations == "static":
            return ONE_INPUT_SCALE
        return NEVER_MOVED if fmt.activations == "none" else ""

    def product_error(self, fmt: Fp8) -> float:
        # Activations are rounded to FP8.
        return super().product_error(fmt) if fmt.activations == "none" else 0.06

    def check_experts(self, layer: Any, fmt: Fp8, prefix: str) -> None:
        least = divmod(fmt.kinds[fmt.kind].experts_least, 10)
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < least:
            raise ValueError(
                f"{prefix} ({fmt.kind}): Triton multiplies experts in FP8 from compute capability "
                f"{least[0]}.{least[1]} on; build the checkpoint with another format for them"
            )

    def as_stored(
        self, fmt: Fp8, tensors: dict[str, torch.Tensor], widths: list[int] | None
    ) -> tuple[Format, dict[str, torch.Tensor]]:
        if fmt.granularity != "tensor":
            return super().as_stored(fmt, tensors, widths)
        # Joined modules have one scale each: repeat it for every output.
        scale = tensors["weight_scale"].reshape(-1)
        rows = torch.tensor(widths if widths and len(widths) == len(scale) else [len(tensors["weight"])])
        return Fp8("channel"), {**tensors, "weight_scale": scale.repeat_interleave(rows).reshape(-1, 1)}
