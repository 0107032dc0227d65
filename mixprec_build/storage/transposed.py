"""Tensors that lie on the disk as columns, or every other row, of a larger one, as in releases with stacked experts.

Their bytes are read in rows of that tensor and put into their own order. No value is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .dtypes import DTYPE_BITS

if TYPE_CHECKING:
    import numpy.typing as npt

    from .header import TensorInfo

__all__ = ["PANEL", "read_scattered"]

PANEL = 8 << 20
"""Bytes of such a tensor that are best read at a time: fewer mean more reads of fewer bytes each."""

_SHORT = 16 << 10
_BLOCK = 1 << 20
_WORDS = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}


def read_scattered(
    tensor: TensorInfo, read_into: Callable[[memoryview, int], None], window: memoryview, at: int
) -> None:
    """Fills ``window`` with the bytes of a tensor that is not contiguous, from its byte ``at`` on.

    Args:
        read_into: fills its first argument with bytes of the file, from the offset that is its second one on.
    """
    (_read_rows if tensor.columns is None else _read_columns)(tensor, read_into, window, at)


def _read_rows(tensor: TensorInfo, read_into: Callable[[memoryview, int], None], window: memoryview, at: int) -> None:
    import numpy as np

    row, step = tensor.nbytes // tensor.shape[0], tensor.step
    begin, end = at // row, -(-(at + len(window)) // row)
    rows = np.empty((end - begin, row), np.uint8)
    most = max(1, _BLOCK // (row * step))
    block = np.empty(most * step * row, np.uint8)
    for first in range(begin, end, most):
        count = min(most, end - first)
        part = block[: ((count - 1) * step + 1) * row]
        read_into(part.data, tensor.start + first * step * row)
        rows[first - begin : first - begin + count] = block[: count * step * row].reshape(count, step, row)[:, 0]
    window[:] = rows.reshape(-1).data[at - begin * row : at - begin * row + len(window)]


def _read_columns(
    tensor: TensorInfo, read_into: Callable[[memoryview, int], None], window: memoryview, at: int
) -> None:
    import numpy as np

    assert tensor.columns is not None
    first, width = tensor.columns
    size, inputs, step = DTYPE_BITS[tensor.dtype] // 8, tensor.shape[1], tensor.step
    row = inputs * size
    begin, end = at // row, -(-(at + len(window)) // row)
    out = np.empty((end - begin, inputs), _WORDS[size])
    # Many rows of the matrix at once, where what is wanted of each is short.
    most = max(1, _BLOCK // (width * size)) if out.shape[0] * size < _SHORT else 1
    block = np.empty(most * width, _WORDS[size])
    for k in range(0, inputs, most):
        count = min(most, inputs - k)
        # From the first wanted column of the first row to the last one of the last row.
        part = block[: (count - 1) * width + (out.shape[0] - 1) * step + 1]
        read_into(part.view(np.uint8).data, tensor.start + (k * width + first + begin * step) * size)
        out[:, k : k + count] = _rows(part, count, width, out.shape[0], step)
    rows = out.reshape(-1).view(np.uint8).data
    window[:] = rows[at - begin * row : at - begin * row + len(window)]


def _rows(part: npt.NDArray[Any], count: int, width: int, wanted: int, step: int) -> npt.NDArray[Any]:
    """The first ``wanted`` of every ``step``-th of each ``width`` values, ``count`` times, as columns."""
    from numpy.lib.stride_tricks import as_strided

    size = part.strides[0]
    return as_strided(part, (wanted, count), (step * size, width * size), writeable=False)
