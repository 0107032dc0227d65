"""FP8 E4M3: ``weight [N, K]`` in F8_E4M3, with scales by block, by output channel or one for the tensor.

Declared by ``quantization_config`` of the methods fp8 (with ``weight_block_size`` for blocks), modelopt and
compressed-tensors (``float-quantized``; its groups without ``input_activations`` leave activations unquantized).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING, ClassVar

from .base import Format, Kind, Reader
from .config_groups import METHODS
from .e8m0 import E8M0_DTYPES
from .marlin import linear_shape_limits
from .scaled import Scaled

if TYPE_CHECKING:
    from ..storage.module import StoredModule
    from .quantization import Quantization

__all__ = ["Fp8"]


_KEYS = {
    "activation_scheme", "weight_block_size", "fmt", "scale_fmt", "modules_to_convert", "is_checkpoint_fp8_serialized",
    "use_per_token_if_dynamic", "activation_scale_ub", "moe_quant_algo", "moe_quant_format", "format",
}  # fmt: skip
_MODELOPT_KEYS = {"quant_algo", "config_groups", "group_size", "quantized_layers", "quantization", "quant_mode"}


_MXFP8_INPUTS = 32


def _kind(kernels: str, least: int) -> Kind:
    # SGLang has no other kernel for experts than Triton's, where its linears have Marlin (quantization/fp8.py:2281).
    return Kind(8, words=("fp8",), kernels=f"{kernels}, Triton for experts", least=least, experts_least=89)


@dataclass(frozen=True, slots=True)
class Fp8(Scaled):
    """The kinds ``fp8_block``, ``fp8_channel`` and ``fp8_tensor``."""

    name: ClassVar[str] = "FP8"
    kinds: ClassVar[Mapping[str, Kind]] = {
        "fp8_block": _kind("block FP8 (DeepGEMM, CUTLASS or Triton)", 80),
        "fp8_channel": _kind("FP8 GEMM with token and channel scales", 89),
        "fp8_tensor": _kind("FP8 GEMM", 80),
    }
    methods: ClassVar[Mapping[str, Set[str] | None]] = {
        "fp8": _KEYS, "modelopt": _MODELOPT_KEYS, "fbgemm_fp8": None, "w8a8_fp8": None, **METHODS,
    }  # fmt: skip
    rounded: ClassVar[bool] = True
    dtype: ClassVar[str] = "F8_E4M3"
    word: ClassVar[str] = "fp8"
    block_scales: ClassVar[tuple[str, ...]] = (*Scaled.block_scales, *E8M0_DTYPES)

    @classmethod
    def _reads(cls, module: StoredModule, leaf: str, quantization: Quantization) -> bool:
        n, k = module.tensors["weight"].shape
        scales = module.tensors[leaf]
        # MXFP8 has a scale for each output and 32 inputs. A weight of one output has such scales in blocks, too.
        of_rows = scales.shape == (n, -(-k // _MXFP8_INPUTS)) and (
            n > 1 or quantization.get("weight_block_size") is None
        )
        return scales.dtype in cls.block_scales and not (scales.dtype in E8M0_DTYPES and of_rows)

    def tile(self, *, experts: bool) -> tuple[int, int]:
        n, k = super(Fp8, self).tile(experts=experts)
        return (lcm(n, 64), lcm(k, 128)) if self.activations == "none" else (n, k)

    def linear_limits(self, parts: Sequence[StoredModule]) -> list[str]:
        limits = super(Fp8, self).linear_limits(parts)
        if self.activations == "none":  # on Marlin
            n = sum(self.shape(part)[0] for part in parts)
            limits += linear_shape_limits(n, self.shape(parts[0])[1], -1)
        return limits

    def expert_limits(self, parts: Sequence[StoredModule], hidden: int, intermediate: int) -> list[str]:
        limits = super(Fp8, self).expert_limits(parts, hidden, intermediate)
        if self.activations == "none":
            limits.append("experts in FP8 with unquantized activations have no SGLang method")
        return limits

    def _weight_only_limits(self, part: StoredModule) -> list[str]:
        return [] if self.block is None else super(Fp8, self)._weight_only_limits(part)

    def value_limits(self, parts: Sequence[StoredModule], read: Reader, *, experts: bool) -> list[str]:
        limits = [] if self.activations != "static" else self._input_scale_limits(parts, read, experts=experts)
        if not experts or self.granularity != "tensor":
            return limits

        # fp8.py, Fp8MoEMethod.process_weights_after_loading: w13 has one scale for each expert
        def differ(leaf: str) -> bool:
            scales = [read(part.tensors[leaf]) for part in parts if leaf in part.tensors]
            return len({float(s.reshape(-1)[0]) for s in scales if s is not None}) > 1

        if differ(self.scale_leaf):
            limits.append("gate and up have different per-tensor scales, and SGLang would requantize them at load")
        if differ(self.input_leaf):
            limits.append("gate and up have different input scales, and SGLang would take one of them for both")
        return limits

    def _input_scale_limits(self, parts: Sequence[StoredModule], read: Reader, *, experts: bool) -> list[str]:
        """Scales that a calibration left without a value. Of experts SGLang takes the largest of all on a rank."""
        limits = []
        for part in parts:
            values = read(part.tensors[self.input_leaf]) if self.input_leaf in part.tensors else None
            scale = 1.0 if values is None else float(values.reshape(-1)[0])
            if not 0 <= scale < math.inf or (scale == 0 and not experts):
                limits.append(f"its {self.input_leaf} is {scale:g}, by which activations cannot be divided")
        return list(dict.fromkeys(limits))

    @property
    def row_join_limit(self) -> str | None:
        return "and would keep one of their two per-tensor scales" if self.granularity == "tensor" else None

    @property
    def fp8_blocks(self) -> tuple[str, int, int] | None:
        return None if self.block is None else (self.scale_leaf, *self.block)

    @property
    def states_block(self) -> bool:
        # Fp8Config's and compressed-tensors' do, W8A8Fp8Config does not.
        return self.granularity != "channel" or self.activations == "none"

    def shared_experts_limit(self, down: Format) -> str | None:
        if not self.states_block:
            return "SGLang asks shared experts for a config that its method for FP8 by channels has not"
        block = down.block if isinstance(down, Scaled) else None
        if not down.states_block or self.block != block:
            return f"SGLang compares blocks of shared experts' gate and up with those of down, which is {down.kind}"
        return None
