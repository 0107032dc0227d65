"""Each storage format as SGLang's own quantization config runs it.

One small config of SGLang's for each distinct format; the methods that it hands out are SGLang's objects, of
SGLang's classes (its linear layers choose a weight loader by the class's name). Where stock SGLang is wrong, the
instance is mended: see :mod:`mixprec_runtime.formats.repairs`.
"""

from __future__ import annotations

from typing import Any

import torch
from compressed_tensors.quantization import ActivationOrdering
from sglang.srt.layers.quantization.awq import AWQMarlinConfig
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase, LinearMethodBase, QuantizationConfig
from sglang.srt.layers.quantization.blockwise_int8 import BlockInt8Config
from sglang.srt.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from sglang.srt.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A16Fp8
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.gptq import GPTQMarlinConfig
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.quantization.w8a8_fp8 import W8A8Fp8Config
from sglang.srt.layers.quantization.w8a8_int8 import W8A8Int8Config
from sglang.srt.utils import is_cpu

from mixprec_build.formats.awq import Awq
from mixprec_build.formats.base import Format
from mixprec_build.formats.fp8 import Fp8
from mixprec_build.formats.gptq import Gptq
from mixprec_build.formats.int8 import Int8
from mixprec_build.formats.packed import Packed

from .cpu import reference
from .formats import repairs as fixes

__all__ = ["NativeFormat", "format_of", "sglang_config"]


def format_of(layer: torch.nn.Module) -> Format | None:
    """The format that :class:`NativeFormat` gave a layer's method; None for a layer without such a method."""
    fmt: Format | None = getattr(getattr(layer, "quant_method", None), "mixprec_format", None)
    return fmt


def sglang_config(fmt: Format) -> QuantizationConfig | None:
    """SGLang's own config for a format; None for what is not quantized.

    Raises:
        ValueError: SGLang has none.
    """
    if not fmt.quantized:
        return None
    if isinstance(fmt, Fp8) and fmt.activations == "none" and fmt.block is None:
        return _OneScheme.of(fmt.to_json(), {"num_bits": 8, "type": "float", "strategy": fmt.granularity})
    if isinstance(fmt, Packed):
        size: dict[str, Any] = {"strategy": "channel"}
        if fmt.group_size != -1:
            size = {"strategy": "group", "group_size": fmt.group_size}
        weights = {"num_bits": fmt.bits, "type": "int", "symmetric": fmt.sym, **size}
        return _OneScheme.of(fmt.to_json(), weights, actorder=fmt.actorder)
    if isinstance(fmt, Fp8) and fmt.activations != "none" and fmt.granularity == "channel":
        return W8A8Fp8Config(is_checkpoint_fp8_serialized=True)
    if isinstance(fmt, Fp8) and fmt.activations != "none":
        made = Fp8Config(
            is_checkpoint_fp8_serialized=True,
            activation_scheme=fmt.activations,
            weight_block_size=list(fmt.block) if fmt.block else None,
        )
        made.scale_fmt = fmt.scale_fmt or None  # read since some version before 0.5.23
        return made
    if isinstance(fmt, Int8) and fmt.granularity == "channel" and fmt.activations != "none":
        return W8A8Int8Config({"is_dynamic": True})
    if isinstance(fmt, Int8) and fmt.block and fmt.activations != "none":
        return BlockInt8Config(
            is_checkpoint_int8_serialized=True, activation_scheme="dynamic", weight_block_size=list(fmt.block)
        )
    if isinstance(fmt, Gptq) and fmt.sym:
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
    if isinstance(fmt, Awq):
        return AWQMarlinConfig(
            weight_bits=fmt.bits,
            group_size=fmt.group_size,
            zero_point=True,
            lm_head_quantized=False,
            modules_to_not_convert=[],
            full_config={"bits": fmt.bits, "group_size": fmt.group_size, "zero_point": True, "quant_method": "awq"},
        )
    raise ValueError(f"SGLang has no kernel for {fmt.kind} {fmt.to_json()}")


class _OneScheme(CompressedTensorsConfig):
    """compressed-tensors with one config group for whatever layer it is asked for, of weights alone.

    SGLang looks a MoE layer's scheme up by the names of its expert 0; here that is every expert's.
    """

    @classmethod
    def of(cls, fmt: dict[str, object], weights: dict[str, Any], *, actorder: bool = False) -> _OneScheme:
        packed = weights["type"] == "int"
        made: _OneScheme = cls.from_config(
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized" if packed else "float-quantized",
                # Not "Linear": SGLang looks for that in the names of its classes, and not all have it.
                "config_groups": {str(fmt["kind"]): {"targets": ["re:.*"], "weights": weights}},
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


class NativeFormat(QuantizationConfig):
    """One format of a checkpoint: hands layers SGLang's method for it, mended where SGLang is wrong.

    It is the ``quant_config`` of a group of experts, so it answers as SGLang's own config of the format would.
    """

    def __init__(self, fmt: Format):
        super().__init__()
        self.format = fmt
        with reference.pretend_hopper():
            self._config = sglang_config(fmt)

    def get_name(self) -> str:
        return "unquant" if self._config is None else self._config.get_name()

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        if self._config is None or is_cpu():
            return [torch.bfloat16, torch.half, torch.float32]
        return list(self._config.get_supported_act_dtypes())

    def get_min_capability(self) -> int:  # of the instance, as Fp8Config's is
        return 75 if self._config is None else self._config.get_min_capability()

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> NativeFormat:
        raise NotImplementedError("made by MixPrecConfig")

    def get_scaled_act_names(self) -> list[str]:
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LinearMethodBase | FusedMoEMethodBase | None:
        """SGLang's method for a linear or a FusedMoE layer; None where a FusedMoE makes its own, for dense experts."""
        from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

        experts = isinstance(layer, FusedMoE)
        if self._config is None:
            if is_cpu() and experts:
                return reference.unquantized_experts()
            return None if experts else UnquantizedLinearMethod()
        if experts:
            fixes.check_experts(layer, self.format, prefix)
        with reference.pretend_hopper():
            method = self._config.get_quant_method(layer, prefix)
        if method is None:
            raise ValueError(f"{prefix}: SGLang has no {self.format.kind} method for {type(layer).__name__}")
        method.mixprec_format = self.format
        mend = fixes.mend_experts if experts else fixes.mend_linear
        mend(method, self.format, prefix)
        if is_cpu():
            reference.stand_in(method, self.format, experts=experts)
        return method
