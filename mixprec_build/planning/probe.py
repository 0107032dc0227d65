"""Reads rows of weights of several sources, and compares them, to see whether scales were folded in.

Reads only files on this machine, and about a hundred rows of a weight unless all are asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm, prod
from typing import TYPE_CHECKING, Any

from ..formats.registry import bits_of
from ..storage.reader import FileReader

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..formats.base import Format
    from ..recipe.sources import Sources

__all__ = ["ROUNDING", "WeightProbe", "factors"]


_ROWS = 128
_MOST_BYTES = 512 << 20
"""Most bytes that are read of one tensor."""
ROUNDING = 2.0**-7
"""Relative difference that a rounding to BF16 may make between two unquantized releases of one weight."""


class WeightProbe:
    """Reads rows of modules, dequantized, from files on this machine. Holes of sparse files count as absent."""

    def __init__(self, sources: Sources):
        self._sources = sources

    def format_of(self, source: str, name: str) -> Format:
        return self._sources.by_name[source].format_of(name)

    def rows(self, source: str, name: str, *, all_rows: bool = False) -> npt.NDArray[np.float32] | None:
        """The first rows of a weight, or all: ``[rows, K]``; None where they cannot be read."""
        read = self._read(source, name, all_rows)
        return None if read is None else self._dequantize(source, name, read)

    def steps(self, source: str, name: str, *, all_rows: bool = False) -> npt.NDArray[np.float32] | None:
        """The distance from each value of :meth:`rows` to the next one that the format can store, ``[rows, K]``.

        None where it cannot be read, or where values lie across bytes.
        """
        import numpy as np

        read = self._read(source, name, all_rows)
        if read is None:
            return None
        fmt = self._sources.by_name[source].format_of(name)
        leaf, bits = fmt.values_leaf, bits_of(fmt.kind)
        if 8 % bits:
            return None
        low = np.uint8(sum(1 << at for at in range(0, 8, bits)))
        words = np.ascontiguousarray(read[leaf])
        beside = (words.view(np.uint8) ^ low).view(words.dtype).reshape(words.shape)
        with np.errstate(invalid="ignore", over="ignore"):
            values = [self._dequantize(source, name, tensors) for tensors in ({**read, leaf: beside}, read)]
            if values[0] is None or values[1] is None:
                return None
            steps = abs(values[0] - values[1])
        filled: npt.NDArray[np.float32] = np.nan_to_num(steps, nan=float(np.nanmax(steps, initial=0)))
        return filled

    def _dequantize(
        self, source: str, name: str, tensors: Mapping[str, npt.NDArray[Any]]
    ) -> npt.NDArray[np.float32] | None:
        import numpy as np

        try:
            with np.errstate(invalid="ignore", over="ignore"):  # scales that are no numbers
                return self._sources.by_name[source].format_of(name).dequantize(tensors)
        except (IndexError, ValueError):  # a damaged g_idx, which other checks report
            return None

    def _read(self, source: str, name: str, all_rows: bool) -> dict[str, npt.NDArray[Any]] | None:
        module, fmt = self._sources.by_name[source].module(name), self._sources.by_name[source].known_format(name)
        if module is None or fmt is None or len(fmt.shape(module)) != 2:
            return None
        axes = {leaf: fmt.axes(leaf).n for leaf in module.tensors}
        unit = lcm(*(axis.per for axis in axes.values() if axis is not None))
        rows = fmt.shape(module)[0]
        if not all_rows:
            rows = min(rows, -(-_ROWS // unit) * unit)
        found = {}
        with FileReader(self._sources.by_name[source].checkpoint.storage.cached) as reader:
            for leaf, info in module.tensors.items():
                if leaf == "bias":
                    continue
                axis, shape = axes[leaf], [*info.shape]
                if axis is not None and shape:
                    shape[axis.dim] = min(shape[axis.dim], -(-rows // axis.per))
                first = (*shape[:1], *info.shape[1:])  # rows on the disk, one after the other
                nbytes = info.nbytes // max(1, prod(info.shape)) * prod(first)
                values = reader.first_values(info, nbytes) if 0 < nbytes <= _MOST_BYTES else None
                if values is None:
                    return None
                found[leaf] = values.reshape(first)[tuple(map(slice, shape))] if shape else values.reshape(())
        return found

    def is_scaled(self, name: str, a: str, b: str, *, all_rows: bool = False, columns: bool = False) -> bool | None:
        """Whether at least a quarter of one source's rows, or ``columns``, are the other's times a factor.

        Scales were then folded into one of them. None where they cannot be compared.
        """
        import numpy as np

        ours, theirs = self.rows(a, name, all_rows=all_rows), self.rows(b, name, all_rows=all_rows)
        if ours is None or theirs is None:
            return None
        count = min(len(ours), len(theirs))
        ours, theirs = ours[:count], theirs[:count]
        if columns:
            ours, theirs = ours.T, theirs.T
        power = (theirs * theirs).sum(1)
        factor = (ours * theirs).sum(1) / np.maximum(power, np.finfo(np.float32).tiny)
        rest = np.sqrt(((ours - factor[:, None] * theirs) ** 2).sum(1) / np.maximum(power, np.finfo(np.float32).tiny))
        # Signs of rounding errors are random, so that a factor's error is smaller than theirs by the square root of
        # how many there are.
        noise = 6 * rest / np.sqrt(ours.shape[1])
        return bool(np.quantile(abs(factor - 1) - noise, 0.75) > 4 * ROUNDING)

    def columns_follow(self, name: str, a: str, b: str, ratio: npt.NDArray[Any]) -> bool:
        """Whether the columns of a weight in ``a`` are those in ``b`` times ``ratio`` ``[K]``, folded in then.

        False where they are equal, or cannot be compared.
        """
        import numpy as np

        ours, theirs = self.rows(a, name), self.rows(b, name)
        if ours is None or theirs is None or not ours.shape[1:] == theirs.shape[1:] == ratio.shape:
            return False
        count = min(len(ours), len(theirs))
        found = factors(ours[:count], theirs[:count], 0)[0]
        sound = (found > 0) & (ratio > 0)
        if sound.mean() < 0.9:
            return False
        expected = np.log(ratio[sound])
        return bool(np.median(abs(np.log(found[sound]) - expected)) < np.median(abs(expected)) / 4)


def factors(ours: npt.NDArray[Any], theirs: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
    """Least-squares factors of the rows (``axis`` 1) or columns (0) of ``theirs``, never negative."""
    import numpy as np

    power = np.maximum((theirs * theirs).sum(axis, keepdims=True), np.finfo(np.float32).tiny)
    found: npt.NDArray[Any] = np.maximum((ours * theirs).sum(axis, keepdims=True) / power, 0)
    return found
