"""E8M0: scales that are powers of two. A byte stores the exponent plus 127; 255 is not a number."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from .floats import to_float32

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .arrays import Arrays

__all__ = ["E8M0_DTYPES", "powers_of_two"]


E8M0_DTYPES = ("F8_E8M0", "U8")
"""The dtypes that producers store such scales in; the bytes are the same."""


def powers_of_two(scales: npt.NDArray[Any], on: Arrays) -> npt.NDArray[np.float32]:
    """The values of E8M0 scales, in float32 and of the same shape.

    ``scales`` are of one byte each, of whatever dtype. 0 is 2**-127, which is subnormal in float32 and 0 in BF16.
    """
    return on.lookup(_powers(), scales)


@lru_cache
def _powers() -> npt.NDArray[np.float32]:
    """The value of each byte: ``[256, 1]``."""
    import ml_dtypes
    import numpy as np

    return to_float32(np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu)).reshape(-1, 1)
