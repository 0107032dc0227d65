"""Compares a module's weight in several sources with a reference's, by numpy.

What is made of a few rows at a time stays in a core's cache, which is several times as fast as making all of a weight.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..checkpoint.typed import Source
from ..errors import SourceError
from ..formats.arrays import NUMPY, Arrays

if TYPE_CHECKING:
    from ..storage.header import TensorInfo
    from ..storage.reader import TensorReader

__all__ = ["Comparer"]


_ADDED = 64
"""Squares that are added in float32, before float64 adds their sums."""
_LEAST, _MOST = 1e-20, 1e30
"""Between them a sum of squares in float32 is as good as one in float64."""
_PANEL = 8
"""Rows that are transposed at a time."""


class Comparer:
    """Compares by numpy; a subclass by another library, whose arrays are typed as numpy's. Threads may share it."""

    arrays: Arrays = NUMPY
    chunk = 1 << 18
    """Values dequantized at a time: 1 MiB in float32."""
    jobs = os.cpu_count() or 1
    """Threads, by default."""

    def squares(
        self, name: str, reference: Source, others: Sequence[Source], readers: Mapping[str, TensorReader]
    ) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.float64]]]:
        """The sums of squares of a weight's columns, and of those of its differences: float64 ``[K]`` of each source.

        Args:
            readers: of each source, by its name.

        Raises:
            SourceError: naming module and file, where a weight cannot be read, or differs in shape.
        """
        exact = _Rows(self, reference, name, readers)
        rounded = [_Rows(self, other, name, readers) for other in others]
        for other in rounded:
            if other.shape != exact.shape:
                raise SourceError(
                    f"{name}: {list(other.shape)}, but {list(exact.shape)} in {exact.where}", path=other.where
                )
        outputs, inputs = exact.shape
        if not outputs or not inputs:
            return np.zeros(inputs), [np.zeros(inputs) for _ in rounded]
        step = _step(max(1, self.chunk // inputs), [exact, *rounded])
        delta = self.arrays.empty((min(step, outputs), inputs))
        power: Any = 0.0
        errors: list[Any] = [0.0] * len(rounded)
        for start in range(0, outputs, step):
            stop = min(outputs, start + step)
            weight = exact.read(start, stop)
            power += self.sums_of_squares(weight)
            for at, rows in enumerate(rounded):
                self.subtract(rows.read(start, stop), weight, delta[: stop - start])
                errors[at] += self.sums_of_squares(delta[: stop - start])
        return self.to_numpy(power), [self.to_numpy(error) for error in errors]

    def can_hold(self, tensor: TensorInfo) -> bool:
        """Whether :meth:`read` has a dtype for a tensor."""
        return True

    def read(self, tensor: TensorInfo, reader: TensorReader, dim: int) -> npt.NDArray[Any]:
        """A tensor whose axis ``dim`` is that of the outputs."""
        return _by_outputs(reader.array(tensor), dim)

    def subtract(self, a: npt.NDArray[Any], b: npt.NDArray[Any], out: npt.NDArray[Any]) -> None:
        with np.errstate(all="ignore"):
            np.subtract(a, b, out=out)

    def sums_of_squares(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """Σ_n v_nk², float64 ``[K]``, of values float32 ``[N, K]``."""
        sums = np.zeros(values.shape[1])
        for start in range(0, len(values), _ADDED):
            few = values[start : start + _ADDED]
            with np.errstate(all="ignore"):
                squares = np.einsum("nk,nk->k", few, few)
            # Others may be beyond what float32 has, or below.
            if not _LEAST < squares.sum(dtype=np.float64) < _MOST:
                squares = np.einsum("nk,nk->k", few, few, dtype=np.float64)
            sums += squares
        return sums

    def from_numpy(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values

    def to_numpy(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return values


class _Rows:
    """A module of one source, in memory as it is stored; :meth:`read` dequantizes some of its outputs.

    Attributes:
        word: the number of outputs that share words of packed values.
        blocks: the numbers of outputs that share a scale, of each tensor.
    """

    def __init__(self, comparer: Comparer, source: Source, name: str, readers: Mapping[str, TensorReader]):
        self._name, self._format = name, source.format_of(name)
        module, reader = source.checkpoint.modules[name], readers[source.name]
        axes = {leaf: self._format.axes(leaf).n for leaf in module.tensors if leaf != "bias"}
        held = [module.tensors[leaf] for leaf, axis in axes.items() if axis is not None]
        self._moved = not (self._format.portable and all(map(comparer.can_hold, held)))
        self._comparer = comparer
        self._computes = _BY_NUMPY if self._moved else comparer
        self.shape = self._format.shape(module)
        self.where = source.checkpoint.path_of(next(iter(module.tensors.values())).file)
        self._tensors: dict[str, npt.NDArray[Any]] = {}
        self._cuts: dict[str, tuple[int, int]] = {}
        self.word, self.blocks = 1, set[int]()
        for leaf, axis in axes.items():
            info = module.tensors[leaf]
            if axis is None:
                self._tensors[leaf] = reader.array(info)
                continue
            self._tensors[leaf] = self._computes.read(info, reader, axis.dim)
            self._cuts[leaf] = axis.dim, axis.per
            if info.dtype == "I32":
                self.word = math.lcm(self.word, axis.per)
            else:
                self.blocks.add(axis.per)

    def read(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Outputs ``start`` to ``stop`` in steps of :func:`_step`: float32 ``[stop - start, K]``, not to be changed."""
        parts = dict(self._tensors)
        for leaf, (dim, per) in self._cuts.items():
            parts[leaf] = parts[leaf][(slice(None),) * dim + (slice(start // per, -(-stop // per)),)]
        try:
            with np.errstate(all="ignore"):
                if self._moved:  # a format of another package may know numpy alone
                    return self._comparer.from_numpy(self._format.dequantize(parts))
                return self._format.dequantize(parts, self._computes.arrays)
        except (IndexError, ValueError) as error:  # a damaged g_idx, for example
            raise SourceError(f"{self._name} cannot be dequantized: {error}", path=self.where) from error


_BY_NUMPY = Comparer()


def _step(most: int, modules: Sequence[_Rows]) -> int:
    """The number of outputs to dequantize at a time: ``most``, or fewer, or more where words of packed values need it.

    Each time is of whole words, and of whole blocks of scales or within one.
    """
    words = math.lcm(*(rows.word for rows in modules))
    blocks = {block for rows in modules for block in rows.blocks}
    for step in range(most - most % words, 0, -words):
        if all(step % block == 0 or block % step == 0 for block in blocks):
            return step
    return math.lcm(words, *blocks)


def _by_outputs(tensor: npt.NDArray[Any], dim: int) -> npt.NDArray[Any]:
    """The same tensor, in memory with its axis ``dim`` first: a few outputs lie side by side."""
    if dim != 1 or tensor.ndim != 2:
        return tensor
    out = np.empty(tensor.shape[::-1], tensor.dtype)
    for start in range(0, len(tensor), _PANEL):  # at once it takes twice as long
        out[:, start : start + _PANEL] = tensor[start : start + _PANEL].T
    return out.T
