"""SGLang's config of compressed-tensors with one config group, for whatever layer it is asked for."""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import ActivationOrdering
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A16Fp8

from mixprec_build.formats.base import Format

__all__ = ["OneScheme"]


class OneScheme(CompressedTensorsConfig):
    """compressed-tensors with one config group for whatever layer it is asked for, of weights alone.

    SGLang looks a MoE layer's scheme up by the names of its expert 0; here that is every expert's.
    """

    @classmethod
    def of(cls, fmt: Format, weights: dict[str, Any], *, actorder: bool = False) -> OneScheme:
        packed = weights["type"] == "int"
        made: OneScheme = cls.from_config(
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized" if packed else "float-quantized",
                # Not "Linear": SGLang looks for that in the names of its classes, and not all have it.
                "config_groups": {fmt.kind: {"targets": ["re:.*"], "weights": weights}},
                "ignore": [],
            }
        )
        if actorder:
            # Later versions of compressed-tensors read no such configuration any more; SGLang's scheme goes on.
            scheme = made.target_scheme_map["re:.*"]
            scheme["weights"] = scheme["weights"].model_copy(update={"actorder": ActivationOrdering.GROUP})
        return made

    def get_min_capability(self) -> int:  # of the instance, as Fp8Config's is
        return 80

    def _check_scheme_supported(self, min_capability: int, error: bool = True) -> bool:
        """SGLang asks a GPU; :meth:`get_min_capability` has answered by then."""
        return True

    def get_linear_scheme(self, layer: torch.nn.Module, layer_name: str | None = None) -> Any:
        weights = self.target_scheme_map["re:.*"]["weights"]
        if weights.type == "float":
            # 0.5.17 takes FP8 by channels for Int4 where activations are not quantized (compressed_tensors.py:553).
            return CompressedTensorsW8A16Fp8(strategy=weights.strategy, is_static_input_scheme=False)
        return super().get_linear_scheme(layer, layer_name)
