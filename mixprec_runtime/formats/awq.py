"""AWQ on Marlin: ``AWQMarlinConfig``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from sglang.srt.layers.quantization.awq import AWQMarlinConfig
from sglang.srt.layers.quantization.base_config import QuantizationConfig

from mixprec_build.formats.awq import Awq
from mixprec_build.formats.base import Format

from .marlin import (
    ROUTER_WEIGHTS,
    ServedGrouped,
    ids_of_other_ranks,
    permute_by_groups,
    require_shapes,
    require_whole_words,
    zero_points_by_tiles,
)
from .repair import Repair
from .ungated import WITHOUT_GATE

__all__ = ["ServedAwq"]


class ServedAwq(ServedGrouped[Awq]):
    format: ClassVar[type[Format]] = Awq
    repairs: ClassVar[tuple[Repair, ...]] = (
        require_shapes(lambda fmt: True, lambda fmt: int(fmt.group_size)),
        require_whole_words(lambda fmt: True),
        permute_by_groups("srt/hardware_backend/gpu/quantization/awq_kernels.py:206", "w13_scales", "w2_scales"),
        zero_points_by_tiles("linear", ("scales", "qzeros"), applies=lambda fmt: True),
        zero_points_by_tiles(
            "experts", ("w13_scales", "w13_qzeros"), ("w2_scales", "w2_qzeros"), applies=lambda fmt: True
        ),
        ids_of_other_ranks,
        ROUTER_WEIGHTS,
        WITHOUT_GATE,
    )
    # In a prefill CUDA graph, AWQ linears read this from the model's config (marlin_utils.py:921).
    model_attributes: ClassVar[Mapping[str, object]] = {"quant_type": AWQMarlinConfig.TYPE_MAP[4]}

    def sglang_config(self, fmt: Awq) -> QuantizationConfig:
        return AWQMarlinConfig(
            weight_bits=fmt.bits,
            group_size=fmt.group_size,
            zero_point=True,
            lm_head_quantized=False,
            modules_to_not_convert=[],
            full_config={"bits": fmt.bits, "group_size": fmt.group_size, "zero_point": True, "quant_method": "awq"},
        )
