"""SGLang's config of compressed-tensors with one config group for all layers."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import ActivationOrdering
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A16Fp8

from mixprec_build.formats.base import Format

__all__ = ["OneScheme"]


class OneScheme(CompressedTensorsConfig):
    """A compressed-tensors config whose only config group, for weights, applies to every layer.

    SGLang chooses a MoE layer's scheme by the name of its expert 0; here all experts have that scheme.
    """

    @classmethod
    def of(cls, fmt: Format, weights: dict[str, Any], *, actorder: bool = False) -> OneScheme:
        packed = weights["type"] == "int"
        made: OneScheme = cls.from_config(
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized" if packed else "float-quantized",
                # Not "Linear": SGLang looks for that in the names of its classes, where some lack it.
                "config_groups": {fmt.kind: {"targets": ["re:.*"], "weights": weights}},
                "ignore": [],
            }
        )
        if actorder:
            # SGLang's scheme supports it, but later versions of compressed-tensors refuse it in a config.
            scheme = made.target_scheme_map["re:.*"]
            scheme["weights"] = scheme["weights"].model_copy(update={"actorder": ActivationOrdering.GROUP})
        return made

    def get_min_capability(self) -> int:  # an instance method, as in Fp8Config
        return 80

    def _check_scheme_supported(self, min_capability: int, error: bool = True) -> bool:
        """SGLang would ask the GPU again; it has checked :meth:`get_min_capability` by then."""
        return True

    def get_linear_scheme(self, layer: torch.nn.Module, layer_name: str | None = None) -> Any:
        weights = self.target_scheme_map["re:.*"]["weights"]
        if weights.type == "float":
            # 0.5.17 mistakes FP8 by channels without quantized activations for Int4 (compressed_tensors.py:553).
            return CompressedTensorsW8A16Fp8(strategy=weights.strategy, is_static_input_scheme=False)
        return super().get_linear_scheme(layer, layer_name)
