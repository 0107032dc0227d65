"""Integers of 4 or 8 bits, several to a 32-bit word, with a scale for each group of inputs: GPTQ, AWQ and packed
compressed-tensors. SGLang runs them on its Marlin kernels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from reprlib import repr as brief
from typing import TYPE_CHECKING, ClassVar

from .base import Axis, Format, FormatError, Kind, Reader, check_tensor, last_word, shape_text
from .marlin import FLOATS, expert_shape_limits, half_range, linear_shape_limits, tile

if TYPE_CHECKING:
    from ..storage.module import StoredModule

__all__ = ["Grouped", "marlin_kind"]


def marlin_kind(bits: int) -> Kind:
    """What is known of a kind that SGLang runs on Marlin."""
    return Kind(bits, words=(f"int{bits}",), kernels="Marlin", least=80)


class Grouped(Format):
    """``group_size`` is -1 where one group spans all inputs."""

    bits: int
    group_size: int

    order: ClassVar[str] = ""
    """The tensor that holds each input's group, where there may be one."""
    group_sizes: ClassVar[tuple[int, ...]] = (-1, 32, 64, 128)
    """Those that SGLang has CUDA kernels for (marlin_utils.py)."""
    kernels_for: ClassVar[str] = ""
    """Whom :attr:`group_sizes` are for, where others have more: ``" for AWQ"``."""

    @property
    def pack(self) -> int:
        """Values in one 32-bit word."""
        return 32 // self.bits

    @property
    def has_weight(self) -> bool:
        return False

    def tile(self, *, experts: bool) -> tuple[int, int]:
        return tile(self.group_size, experts=experts)

    def linear_limits(self, parts: Sequence[StoredModule]) -> list[str]:
        return self._kernel_limits() + self._marlin_limits(parts)

    def expert_limits(self, parts: Sequence[StoredModule], hidden: int, intermediate: int) -> list[str]:
        return self._kernel_limits() + expert_shape_limits(hidden, intermediate, self.group_size)

    def _kernel_limits(self) -> list[str]:
        """What is not served, whatever the shape: experts and most linears run on Marlin, which lacks it."""
        if self.group_size in self.group_sizes:
            return []
        *first, last = map(str, self.group_sizes)
        only = f"only {', '.join(first)} and {last}"
        return [f"mixprec does not serve group size {self.group_size}{self.kernels_for}, {only}"]

    def _marlin_limits(self, parts: Sequence[StoredModule]) -> list[str]:
        # SGLang computes this for GPTQ, too, and does not look at the result.
        n = sum(self.shape(part)[0] for part in parts)
        return linear_shape_limits(n, self.shape(parts[0])[1], self.group_size)

    def _order_limits(self, parts: Sequence[StoredModule], read: Reader, *, experts: bool) -> list[str]:
        """For weights in act-order: gate and up of an expert, or all parts of a linear, run with one order."""
        import numpy as np

        fused = parts[:2] if experts else parts
        if len(fused) < 2:
            return []
        first, *others = [read(part.tensors[self.order]) for part in fused]
        return [
            f"{last_word(fused[0])} and {last_word(part)} run with one {self.order}, but theirs differ"
            for part, order in zip(fused[1:], others, strict=True)
            if first is not None and order is not None and not np.array_equal(first, order)
        ]

    # For checks and axes of the formats

    def _groups_of(self, inputs: int) -> tuple[int, str]:
        """How many groups ``inputs`` are in, and in which, for messages."""
        if self.group_size == -1:
            return 1, "one group"
        return -(-inputs // self.group_size), f"groups of {self.group_size}"

    def _group_axis(self, dim: int) -> Axis | None:
        """How scales lie along the inputs. In act-order an input's group is anywhere: whoever holds some inputs needs
        the scales of all groups."""
        return None if self.act_order or self.group_size == -1 else Axis(dim, self.group_size)

    def _half_where_packed(self, leaf: str) -> int:
        """The filler of symmetric weights, whose zero point is half of the range."""
        return half_range(self.bits) if leaf == self.values_leaf else 0

    def _check_matrices(self, module: StoredModule, leaves: Collection[str]) -> None:
        for leaf in leaves:
            if leaf not in module.tensors:
                raise FormatError(f"{self.kind} needs {leaf}")
            if len(module.tensors[leaf].shape) != 2:
                raise FormatError(f"{shape_text(leaf, module)}: two dimensions were expected")

    def _check_bias(self, module: StoredModule, outputs: int) -> None:
        if "bias" in module.tensors:
            check_tensor(module, "bias", FLOATS, (outputs,), f"for {outputs} outputs")

    @staticmethod
    def _group_size(value: object, what: str, error: type[Exception] = FormatError) -> int:
        """``value``, once it is a size of groups; ``what`` says in messages where it stands."""
        if type(value) is not int or (value != -1 and value < 1):
            raise error(f"{what.format(brief(value))} is neither -1 nor a positive number")
        return value
