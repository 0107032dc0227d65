"""How SGLang serves a storage format: what the runtime knows of it beside what the compiler does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Generic, TypeVar

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig

from mixprec_build.formats.base import Format

from .repair import Repair

__all__ = ["Served", "no_kernel"]

F = TypeVar("F", bound=Format)


class Served(ABC, Generic[F]):
    """One storage format, served. Stateless: there is one of each."""

    format: ClassVar[type[Format]]
    """The compiler's class, of the same file name."""
    repairs: ClassVar[tuple[Repair, ...]] = ()
    """What stock SGLang does wrong with it."""
    model_attributes: ClassVar[Mapping[str, object]] = {}
    """What SGLang reads off the whole model's config in this format's layers."""

    @abstractmethod
    def sglang_config(self, fmt: F) -> QuantizationConfig | None:
        """SGLang's own config for it; None for what is not quantized.

        Raises:
            ValueError: SGLang has none.
        """

    def check_experts(self, layer: Any, fmt: F, prefix: str) -> None:
        """Raises ``ValueError`` where a FusedMoE layer's kernels would not run, before SGLang chooses a method."""

    def values_in(self, name: str, parameter: torch.Tensor, fmt: F) -> int:
        """How many of the model's weights a parameter holds: none, if scales or orders."""
        if name.endswith("weight"):
            # FP8 on Marlin: four weights to a word
            return parameter.numel() * (4 if parameter.dtype == torch.int32 else 1)
        return 0

    def may_be_empty(self, name: str, fmt: F) -> bool:
        """Whether a parameter needs no tensor: it is made after loading, or files may leave it out."""
        return False

    def stored_alike(
        self, fmt: F, tensors: dict[str, torch.Tensor], widths: list[int] | None
    ) -> tuple[Format, dict[str, torch.Tensor]]:
        """A format, and tensors of it, that mean what SGLang's parameters of a linear do before kernels repack them.

        ``tensors`` are those parameters without the layer's prefix, joined along their outputs; ``widths`` are the
        outputs of each part, where they are known.
        """
        return fmt, tensors


def no_kernel(fmt: Format) -> ValueError:
    return ValueError(f"SGLang has no kernel for {fmt.kind} {fmt.to_json()}")
