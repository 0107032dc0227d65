"""Base class of the runtime's part of a storage format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig

from mixprec_build.formats.base import Format

from .repair import Repair

__all__ = ["NEVER_MOVED", "ONE_INPUT_SCALE", "Served", "may_have_biases", "no_kernel"]

NEVER_MOVED = "were never moved in a test"
ONE_INPUT_SCALE = "share one scale of inputs, the largest of those that a rank loads"
F = TypeVar("F", bound=Format)


class Served(ABC, Generic[F]):
    """How SGLang serves one storage format. Stateless; the registry has one instance of each subclass."""

    format: ClassVar[type[Format]]
    """The format's class in the compiler."""
    repairs: ClassVar[tuple[Repair, ...]] = ()
    """Repairs of SGLang's methods for the format."""
    biased_experts: ClassVar[bool] = False
    """Whether experts may have biases."""
    model_attributes: ClassVar[Mapping[str, object]] = {}
    """Attributes that layers of this format read from the config of the model, not from their own."""

    @abstractmethod
    def sglang_config(self, fmt: F) -> QuantizationConfig | None:
        """SGLang's own config for ``fmt``; None for an unquantized format.

        Raises:
            ValueError: SGLang has no config for it.
        """

    def check_experts(self, layer: Any, fmt: F, prefix: str) -> None:
        """Raises ``ValueError`` for a FusedMoE layer that the kernels cannot run, before SGLang chooses a method."""

    def runners(self, fmt: F) -> tuple[str, ...]:
        """The runners of experts, as ``--moe-runner-backend`` names them.

        The first one is what SGLang takes by itself; a layer whose experts are all in ``fmt`` can be given the others.
        """
        return ("triton",)

    def values_in(self, name: str, parameter: torch.Tensor, fmt: F) -> int:
        """The number of weights in a parameter: 0 for scales, zero points and input orders."""
        if name.endswith("weight"):
            # FP8 on Marlin has four weights in an int32.
            return parameter.numel() * (4 if parameter.dtype == torch.int32 else 1)
        return 0

    def may_be_empty(self, name: str, fmt: F) -> bool:
        """Whether a parameter needs no tensor in the files, which may omit it, or it is made after loading."""
        return False

    def unmovable(self, fmt: F) -> str:
        """Why EPLB cannot move experts in ``fmt`` to another rank; empty if it can."""
        return NEVER_MOVED

    def product_error(self, fmt: F) -> float:
        """How far a linear may be off float64 arithmetic, as a share of the norm: sums are rounded to BF16."""
        return 0.012

    def as_loaded(self, fmt: F, leaf: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the checkpoint as SGLang's loaders take it: with the same values, perhaps in another dtype."""
        return tensor

    def as_stored(
        self, fmt: F, tensors: dict[str, torch.Tensor], widths: list[int] | None
    ) -> tuple[Format, dict[str, torch.Tensor]]:
        """A format and tensors that the compiler's ``Format.dequantize`` takes, for SGLang's parameters of a linear.

        Args:
            fmt: the layer's format.
            tensors: the parameters by leaf, before kernels repack them; modules are joined along their outputs.
            widths: the number of outputs of each module, where known.
        """
        return fmt, tensors


def may_have_biases(layer: Any) -> bool:
    """Whether experts of a FusedMoE, whose weights are not made yet, have biases."""
    # 0.5.15 tells only who makes the weights. Of its classes, that of gpt-oss alone asks for them, and for an alpha.
    return bool(getattr(layer, "with_bias", layer.moe_runner_config.gemm1_alpha is not None))


def no_kernel(fmt: Format) -> ValueError:
    return ValueError(f"SGLang has no kernel for {fmt.kind} {fmt.to_json()}")
