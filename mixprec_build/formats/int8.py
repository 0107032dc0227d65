"""Int8, W8A8: ``weight [N, K]`` in I8, symmetric, with scales by block or by output channel.

Activations are quantized to 8 bits token by token (channel) or block by block, when they arrive. Declared by
``quantization_config`` of the methods compressed-tensors (``int-quantized``), w8a8_int8 and, for blocks,
blockwise_int8 (``weight_block_size``). Run by SGLang's ``W8A8Int8Config`` and ``BlockInt8Config``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .base import Kind, shape_text
from .config_groups import METHODS
from .scaled import Scaled

if TYPE_CHECKING:
    from ..storage.module import StoredModule
    from .quantization import Quantization

__all__ = ["Int8"]


@dataclass(frozen=True, slots=True)
class Int8(Scaled):
    """The kinds ``int8_channel``, ``int8_block`` and ``int8_tensor``, which SGLang has no method for."""

    name: ClassVar[str] = "Int8"
    kinds: ClassVar[Mapping[str, Kind]] = {
        "int8_channel": Kind(
            8,
            words=("int8",),
            kernels="Int8 GEMM with token and channel scales, Triton for experts",
            least=75,
            most=90,
        ),
        "int8_block": Kind(8, words=("int8",), kernels="block Int8 on Triton", least=80),
        "int8_tensor": Kind(8, words=("int8",)),
    }
    methods: ClassVar[Mapping[str, Set[str] | None]] = {"w8a8_int8": None, "blockwise_int8": None, **METHODS}
    dtype: ClassVar[str] = "I8"
    word: ClassVar[str] = "int8"

    @classmethod
    def _reads(cls, module: StoredModule, leaf: str, quantization: Quantization) -> bool:
        # W4AFP8 has two 4-bit values in each byte, and scales for each output.
        rows, scales = module.tensors["weight"].shape[0], module.tensors[leaf].shape
        of_rows = leaf != "weight_scale" and len(scales) == 2 and scales[0] == rows > 1
        declared = quantization.get("weight_block_size") is not None
        return super(Int8, cls)._reads(module, leaf, quantization) and (declared or not of_rows)

    @property
    def folds_activation_scales(self) -> bool:
        return self.granularity == "channel"  # SmoothQuant

    def linear_limits(self, parts: Sequence[StoredModule]) -> list[str]:
        limits = super(Int8, self).linear_limits(parts)
        if self.granularity == "channel":
            # sgl-kernel, csrc/gemm/int8_gemm_kernel.cu, int8_scaled_mm
            n = sum(self.shape(part)[0] for part in parts)
            k = self.shape(parts[0])[1]
            if k % 16:
                limits.append(f"its {k} inputs are no multiple of 16, which SGLang's Int8 kernel needs")
            if n % 8:
                limits.append(f"its {n} outputs are no multiple of 8, which SGLang's Int8 kernel needs")
        return limits

    def _scale_limits(self, part: StoredModule) -> list[str]:
        if self.granularity == "tensor":
            return [f"{shape_text('weight_scale', part)}: Int8 with one scale a tensor has no SGLang method"]
        return super(Int8, self)._scale_limits(part)
