"""Stored values as float32.

Each conversion is a few numpy operations that release Python's lock, as the casts of ml_dtypes do not, and small floats
are looked up: numpy's own cast of FP16 takes twice as long.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["to_float32"]


def to_float32(stored: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """The values of ``stored`` in float32, of the same shape; the array itself where it is float32 already.

    Integers and FP64 are rounded to the nearest value, all others are exact.
    """
    import numpy as np

    dtype = stored.dtype
    if dtype.name == "bfloat16":
        bits = stored.view(np.uint16).astype(np.uint32)
        bits <<= np.uint32(16)
        return bits.view(np.float32)
    if dtype.kind not in "?iu" and dtype.itemsize <= 2:
        return _table(dtype).take(stored.view(f"u{dtype.itemsize}"))
    return stored.astype(np.float32, copy=False)


@lru_cache
def _table(dtype: np.dtype[Any]) -> npt.NDArray[np.float32]:
    """All values of a float of one or two bytes, by its bits."""
    import numpy as np

    codes = np.arange(1 << (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}")
    with np.errstate(all="ignore"):  # some are no numbers
        values: npt.NDArray[np.float32] = codes.view(dtype).astype(np.float32)
    return values
