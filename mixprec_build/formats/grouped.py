"""Integers of 4 or 8 bits, several to a 32-bit word, with a scale for each group of inputs: GPTQ, AWQ and packed
compressed-tensors. SGLang runs them on its Marlin kernels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from reprlib import repr as brief
from typing import TYPE_CHECKING, Any, ClassVar

from .arrays import Arrays
from .base import Axis, Format, FormatError, Kind, Reader, check_tensor, last_word, shape_text
from .marlin import FLOATS, expert_shape_limits, half_range, linear_shape_limits, tile

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..storage.module import StoredModule

__all__ = ["Grouped", "marlin_kind", "usual_order"]


def marlin_kind(bits: int) -> Kind:
    """A kind of ``bits`` that SGLang runs on Marlin."""
    return Kind(bits, words=(f"int{bits}",), kernels="Marlin", least=80)


class Grouped(Format):
    """A format of packed integers. ``group_size`` is -1 where one group spans all inputs."""

    bits: int
    group_size: int

    experts_run_on: ClassVar[str] = "Marlin"
    portable: ClassVar[bool] = True
    order: ClassVar[str] = ""
    """The tensor with each input's group; empty for a format that has none."""
    group_sizes: ClassVar[tuple[int, ...]] = (-1, 32, 64, 128)
    """Group sizes that SGLang has CUDA kernels for (marlin_utils.py)."""
    kernels_for: ClassVar[str] = ""
    """Added to messages about :attr:`group_sizes` where other formats have more: ``" for AWQ"``."""

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
        """Reasons not to serve any shape: experts and most linears run on Marlin, which lacks kernels for them."""
        if self.group_size in self.group_sizes:
            return []
        *first, last = map(str, self.group_sizes)
        only = f"only {', '.join(first)} and {last}"
        return [f"mixprec does not serve group size {self.group_size}{self.kernels_for}, {only}"]

    def _marlin_limits(self, parts: Sequence[StoredModule]) -> list[str]:
        # SGLang computes this for GPTQ, too, but ignores the result.
        n = sum(self.shape(part)[0] for part in parts)
        return linear_shape_limits(n, self.shape(parts[0])[1], self.group_size)

    def _order_limits(self, parts: Sequence[StoredModule], read: Reader, *, experts: bool) -> list[str]:
        """Reasons for weights in act-order: gate and up of an expert, or all parts of a linear, run with one order."""
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

    def _groups_of(self, inputs: int) -> tuple[int, str]:
        """The number of groups of ``inputs``, and their description for messages."""
        if self.group_size == -1:
            return 1, "one group"
        return -(-inputs // self.group_size), f"groups of {self.group_size}"

    def _group_axis(self, dim: int) -> Axis | None:
        """The axis of scales along the inputs; None where a rank needs all scales, as in act-order."""
        return None if self.act_order or self.group_size == -1 else Axis(dim, self.group_size)

    def _by_input(
        self,
        groups: npt.NDArray[np.float32],
        inputs: int,
        on: Arrays,
        order: npt.NDArray[np.integer[Any]] | None = None,
    ) -> npt.NDArray[np.float32]:
        """A number for each input: ``[N, G]`` by groups -> ``[N, inputs]``, or ``[N, 1]`` where one is for all.

        ``order`` is the group of each input, where a checkpoint stores it. Raises ``IndexError`` for a group that is
        not there.
        """
        import numpy as np

        # A group may not be larger than the weight: its size comes from a configuration.
        size = inputs if self.group_size == -1 else min(self.group_size, inputs)
        # Most stored orders are the usual one, for which repeating takes a fourth of the time.
        if order is not None and not np.array_equal(order, usual_order(inputs, size)):
            return on.columns(groups, order)
        return groups if groups.shape[1] == 1 else on.repeat(groups, size, 1)[:, :inputs]

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
        """Checks a group size and returns it. ``what`` describes it in messages."""
        if type(value) is not int or (value != -1 and value < 1):
            raise error(f"{what.format(brief(value))} is neither -1 nor a positive number")
        return value


@lru_cache(maxsize=8)
def usual_order(inputs: int, size: int) -> npt.NDArray[np.int32]:
    """The group of each input where groups of ``size`` follow one another, ``[inputs]``; made once for many modules."""
    import numpy as np

    order = np.arange(inputs, dtype=np.int32) // size
    order.flags.writeable = False
    return order
