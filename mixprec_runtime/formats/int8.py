"""Int8 (W8A8): ``W8A8Int8Config`` and ``BlockInt8Config``."""

from __future__ import annotations

from typing import ClassVar

from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.blockwise_int8 import BlockInt8Config
from sglang.srt.layers.quantization.w8a8_int8 import W8A8Int8Config

from mixprec_build.formats.base import Format
from mixprec_build.formats.int8 import Int8

from .base import no_kernel
from .repair import Repair
from .scaled import BLOCK_REPAIRS, ServedScaled
from .ungated import WITHOUT_GATE

__all__ = ["ServedInt8"]


class ServedInt8(ServedScaled[Int8]):
    format: ClassVar[type[Format]] = Int8
    repairs: ClassVar[tuple[Repair, ...]] = (*BLOCK_REPAIRS, WITHOUT_GATE)

    def sglang_config(self, fmt: Int8) -> QuantizationConfig:
        if fmt.granularity == "channel" and fmt.activations != "none":
            return W8A8Int8Config({"is_dynamic": True})
        if fmt.block and fmt.activations != "none":
            return BlockInt8Config(
                is_checkpoint_int8_serialized=True, activation_scheme="dynamic", weight_block_size=list(fmt.block)
            )
        raise no_kernel(fmt)

    def product_error(self, fmt: Int8) -> float:
        # Activations are rounded to Int8; for blocks, SGLang cuts off what they have behind the point.
        return 0.05
