"""Packed words and rules for shapes, of formats that SGLang runs on its Marlin kernels.

The shape rules are those of SGLang's ``marlin_utils.py``.
"""

from __future__ import annotations

from math import lcm
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .arrays import Arrays

__all__ = ["FLOATS", "expert_shape_limits", "half_range", "linear_shape_limits", "tile", "unpack"]


FLOATS = ("F16", "BF16", "F32")
"""The dtypes that scales and biases of packed weights come in."""


def linear_shape_limits(n: int, k: int, group_size: int) -> list[str]:
    """Reasons by ``verify_marlin_supports_shape``, for ``n`` outputs of a fused linear; ``group_size`` may be -1."""
    limits = []
    if n % 64:
        limits.append(f"its {n} outputs are no multiple of 64, which Marlin needs")
    if k % 128:
        limits.append(f"its {k} inputs are no multiple of 128, which Marlin needs")
    if group_size > 0 and k % group_size:
        limits.append(f"its {k} inputs are no multiple of the group size {group_size}")
    return limits


def expert_shape_limits(hidden: int, intermediate: int, group_size: int) -> list[str]:
    """Reasons by ``check_moe_marlin_supports_layer``."""
    limits = []
    if hidden % 128:
        limits.append(f"its hidden size {hidden} is no multiple of 128, which Marlin needs")
    need = max(64, group_size)
    if intermediate % need:
        limits.append(f"its intermediate size {intermediate} is no multiple of {need}, which Marlin needs")
    if group_size > 0 and hidden % group_size:
        limits.append(f"its hidden size {hidden} is no multiple of the group size {group_size}")
    return limits


def tile(group_size: int, *, experts: bool) -> tuple[int, int]:
    """Numbers that outputs and inputs must be multiples of, by the two rules above."""
    return 64, lcm(64 if experts else 128, max(1, group_size))


def half_range(bits: int) -> int:
    """A 32-bit word, signed, whose values are all half of their range: the zero of symmetric weights."""
    return sum(1 << (bits - 1) << at for at in range(0, 32, bits)) - (1 << 32)


def unpack(words: npt.NDArray[Any], bits: int, on: Arrays) -> npt.NDArray[np.uint8]:
    """``[R, C]`` integers of ``bits``, 4 or 8, several to each -> ``[R, C * pack]`` values, lowest bits first."""
    octets = on.octets(words)
    if bits == 8:
        return octets
    # Each byte becomes two: its upper four bits are moved up by four more.
    spread = on.int16(octets)
    spread |= spread << 4
    spread &= 0x0F0F
    return on.octets(spread)
