"""Arrays of numpy, or of a library that computes on a GPU, for the same code.

``Format.dequantize`` uses what numpy's arrays and torch's tensors have in common: arithmetic, slices, ``reshape``,
``T``. For all else it uses an :class:`Arrays`. Every array here may be one of that library, and is typed as numpy's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .floats import to_float32

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["NUMPY", "Arrays"]


class Arrays:
    """What libraries of arrays do in different ways; here numpy's. A subclass has another library's."""

    def float32(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """The values in float32, of the same shape; the array itself where it is float32 already."""
        return to_float32(stored)

    def empty(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        import numpy as np

        return np.empty(shape, np.float32)

    def contiguous(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The same array, or a copy that lies in memory in its order."""
        import numpy as np

        return np.ascontiguousarray(values)

    def octets(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """The bytes of values ``[..., C]`` in the order of memory: ``[..., C * itemsize]``."""
        import numpy as np

        return self.contiguous(stored).view(np.uint8)

    def int16(self, octets: npt.NDArray[np.uint8]) -> npt.NDArray[np.int16]:
        """The same numbers in two bytes each, the lower byte first."""
        return octets.astype("<i2")

    def lookup(self, table: npt.NDArray[np.float32], codes: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """The values of each byte, side by side: codes ``[..., C]``, of any dtype of one byte -> ``[..., C * V]``.

        ``table`` is numpy's in any case, ``[256, V]`` with V of 1 or 2.
        """
        import numpy as np

        at_once = table.view(f"u{4 * table.shape[1]}").reshape(-1)  # several values as the bits of one number
        return at_once.take(codes.view(np.uint8)).view(np.float32)

    def repeat(self, values: npt.NDArray[np.float32], count: int, axis: int) -> npt.NDArray[np.float32]:
        """Each value ``count`` times, one after the other along ``axis``."""
        return values.repeat(count, axis=axis)

    def columns(self, values: npt.NDArray[np.float32], at: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Columns of a matrix; ``at``, their numbers, is numpy's in any case. Raises ``IndexError``."""
        return values.take(at, axis=1)


NUMPY = Arrays()
