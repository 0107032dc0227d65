"""Tensors that lie on the disk as columns of a larger matrix, as some releases keep the experts of a layer.

Their bytes are read in rows of that matrix and put into the tensor's own order. No value is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .dtypes import DTYPE_BITS

if TYPE_CHECKING:
    import numpy.typing as npt

    from .header import TensorInfo

__all__ = ["PANEL", "read_columns"]

PANEL = 8 << 20
"""Bytes of such a tensor that are best read at a time: fewer mean more reads of fewer bytes each."""

_SHORT = 16 << 10
_BLOCK = 1 << 20
_WORDS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}


def read_columns(tensor: TensorInfo, read_into: Callable[[memoryview, int], None], window: memoryview, at: int) -> None:
    """Fills ``window`` with the bytes of ``tensor`` ``[N, K]`` from its byte ``at`` on.

    Args:
        read_into: fills its first argument with bytes of the file, from the offset that is its second one on.
    """
    import numpy as np

    assert tensor.columns is not None
    first, width = tensor.columns
    size, inputs = DTYPE_BITS[tensor.dtype] // 8, tensor.shape[1]
    row = inputs * size
    begin, end = at // row, -(-(at + len(window)) // row)
    out = np.empty((end - begin, inputs), _WORDS[size])
    # Many rows of the matrix at once, where what is wanted of each is short.
    most = max(1, _BLOCK // (width * size)) if out.shape[0] * size < _SHORT else 1
    block = np.empty(most * width, _WORDS[size])
    for k in range(0, inputs, most):
        count = min(most, inputs - k)
        # From the first wanted column of the first row to the last one of the last row.
        part = block[: (count - 1) * width + out.shape[0]]
        read_into(part.view(np.uint8).data, tensor.start + (k * width + first + begin) * size)
        out[:, k : k + count] = _rows(part, count, width, out.shape[0])
    rows = out.reshape(-1).view(np.uint8).data
    window[:] = rows[at - begin * row : at - begin * row + len(window)]


def _rows(part: npt.NDArray[Any], count: int, width: int, wanted: int) -> npt.NDArray[Any]:
    """The first ``wanted`` of each ``width`` values, ``count`` times, as columns."""
    from numpy.lib.stride_tricks import as_strided

    step = part.strides[0]
    return as_strided(part, (wanted, count), (step, width * step), writeable=False)
