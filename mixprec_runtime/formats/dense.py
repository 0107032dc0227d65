"""BF16, FP16 and FP32: SGLang's layers make their own method, but for experts with biases."""

from __future__ import annotations

from typing import Any, ClassVar

from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod

from mixprec_build.formats.base import Format
from mixprec_build.formats.dense import Dense

from .base import Served
from .marlin import rename

__all__ = ["BiasedExperts", "ServedDense"]


class ServedDense(Served[Dense]):
    format: ClassVar[type[Format]] = Dense
    biased_experts: ClassVar[bool] = True

    def unmovable(self, fmt: Dense) -> str:
        return ""

    def sglang_config(self, fmt: Dense) -> None:
        return None


class BiasedExperts(UnquantizedFusedMoEMethod):
    """SGLang's method for unquantized experts with biases, gpt-oss's, which mixprec's loader fills.

    Gate and up are two halves of rows there, and biases have the checkpoint's name until they are loaded.
    """

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        super().create_weights(layer, *args, **kwargs)
        for weight in ("w13", "w2"):
            rename(layer, f"{weight}_weight_bias", f"{weight}_bias")
        if self.with_bias:
            layer.moe_runner_config.gate_up_interleaved = False

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.with_bias and layer.moe_tp_rank:  # the ranks' outputs are added up
            layer.w2_bias.data.zero_()
        for weight in ("w13", "w2"):
            rename(layer, f"{weight}_bias", f"{weight}_weight_bias")
        super().process_weights_after_loading(layer)
