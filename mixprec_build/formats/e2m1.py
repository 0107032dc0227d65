"""E2M1, a float of 4 bits: a sign and one of 0, 0.5, 1, 1.5, 2, 3, 4, 6. A byte has two, the lower four bits first."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .arrays import Arrays

__all__ = ["unpack_pairs"]


_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def unpack_pairs(codes: npt.NDArray[Any], on: Arrays) -> npt.NDArray[np.float32]:
    """The values in bytes ``[..., C]``, of whatever dtype, as ``[..., 2 * C]``."""
    return on.lookup(_pairs(), codes)


@lru_cache
def _pairs() -> npt.NDArray[np.float32]:
    """The two values in each byte: ``[256, 2]``."""
    import numpy as np

    values = np.array([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], np.float32)
    codes = np.arange(256)
    return np.stack([values[codes & 15], values[codes >> 4]], axis=-1)
