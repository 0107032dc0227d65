"""Compares rows of weights between sources: whether they are one model's, and whether scales were folded into them.

Only what is on this machine is read, a few hundred rows of a few modules unless all are asked for. Differences are
measured in steps of the quantized format, which its own tensors tell: rounding to the nearest leaves at most half a
step, methods that shift errors between weights (GPTQ, AutoRound) about one. What differs by more was not made by
rounding these weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from math import lcm
from typing import TYPE_CHECKING, Any

from ..formats.registry import bits_of
from ..patterns.compress import compress
from ..storage.disk import open_regular, pread_all
from ..storage.header import TensorInfo
from ..text import some

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..checkpoint.typed import Source
    from ..formats.base import Format
    from ..recipe.sources import Sources
    from .types import PlannedModule

__all__ = ["WeightProbe", "check_weights"]


_ROWS = 128
_MOST_BYTES = 512 << 20
"""Of one tensor that has to be read as a whole."""
_SAMPLES = 3
"""Layers in which modules of one kind are looked at."""
_FITS = 12
"""Most rounds in which scales of rows and columns are fitted in turn."""
_ROUNDING = 2.0**-7
"""What may lie between two unquantized releases of one weight: a rounding to BF16."""


class WeightProbe:
    """Reads rows of modules, dequantized, where their files are here and hold more than a hole."""

    def __init__(self, sources: Sources):
        self._sources = sources

    def format_of(self, source: str, name: str) -> Format:
        return self._sources.by_name[source].format_of(name)

    def rows(self, source: str, name: str, *, all_rows: bool = False) -> npt.NDArray[np.float32] | None:
        """The first rows of a weight, ``[rows, K]``; None where they are not at hand."""
        read = self._read(source, name, all_rows)
        return None if read is None else self._dequantize(source, name, read)

    def steps(self, source: str, name: str, *, all_rows: bool = False) -> npt.NDArray[np.float32] | None:
        """How far the next value that the format can hold is from each of :meth:`rows`, ``[rows, K]``."""
        import numpy as np

        read = self._read(source, name, all_rows)
        if read is None:
            return None
        fmt = self._sources.by_name[source].format_of(name)
        leaf, bits = fmt.values_leaf, bits_of(fmt.kind)
        if 8 % bits:  # values that lie across bytes
            return None
        low = np.uint8(sum(1 << at for at in range(0, 8, bits)))
        words = np.ascontiguousarray(read[leaf])
        beside = (words.view(np.uint8) ^ low).view(words.dtype).reshape(words.shape)
        with np.errstate(invalid="ignore"):
            values = [self._dequantize(source, name, tensors) for tensors in ({**read, leaf: beside}, read)]
        if values[0] is None or values[1] is None:
            return None
        steps = abs(values[0] - values[1])
        filled: npt.NDArray[np.float32] = np.nan_to_num(steps, nan=float(np.nanmax(steps, initial=0)))
        return filled

    def _dequantize(
        self, source: str, name: str, tensors: Mapping[str, npt.NDArray[Any]]
    ) -> npt.NDArray[np.float32] | None:
        try:
            return self._sources.by_name[source].format_of(name).dequantize(tensors)
        except (IndexError, ValueError):  # a damaged input order (g_idx), which other checks name
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
        for leaf, info in module.tensors.items():
            if leaf == "bias":
                continue
            axis = axes[leaf]
            count = None if axis is None or not info.shape else -(-rows // axis.per)
            dim = 0 if axis is None else axis.dim
            values = self._values(source, info, count if dim == 0 else None)
            if values is None:
                return None
            found[leaf] = values if count is None or dim == 0 else values[:, :count]
        return found

    def _values(self, source: str, info: TensorInfo, rows: int | None) -> npt.NDArray[Any] | None:
        """A tensor, or so many of its first rows."""
        import numpy as np

        from ..storage.dtypes import numpy_dtype

        nbytes, shape = info.nbytes, info.shape
        if rows is not None and shape and shape[0]:
            nbytes, shape = info.nbytes // shape[0] * min(rows, shape[0]), (min(rows, shape[0]), *shape[1:])
        path = self._sources.by_name[source].checkpoint.storage.cached(info.file)
        if path is None or not 0 < nbytes <= _MOST_BYTES:
            return None
        fd = open_regular(path)
        try:
            if os.lseek(fd, info.start, os.SEEK_DATA) >= info.start + nbytes:
                return None
            data = pread_all(fd, nbytes, info.start)
        except OSError:  # a hole to the end of the file, or a disk that fails: the build will say so
            return None
        finally:
            os.close(fd)
        return np.frombuffer(data, dtype=numpy_dtype(info.dtype)).reshape(shape) if len(data) == nbytes else None

    def is_scaled(self, name: str, a: str, b: str, *, all_rows: bool = False) -> bool | None:
        """Whether one source's rows are multiples of the other's: something was folded into a quarter of them at
        least. None where they cannot be compared."""
        import numpy as np

        ours, theirs = self.rows(a, name, all_rows=all_rows), self.rows(b, name, all_rows=all_rows)
        if ours is None or theirs is None:
            return None
        count = min(len(ours), len(theirs))
        ours, theirs = ours[:count], theirs[:count]
        power = (theirs * theirs).sum(1)
        factor = (ours * theirs).sum(1) / np.maximum(power, np.finfo(np.float32).tiny)
        rest = np.sqrt(((ours - factor[:, None] * theirs) ** 2).sum(1) / np.maximum(power, np.finfo(np.float32).tiny))
        # Rounding errors are as often with a row as against it: of K of them, the mean is smaller by the root of K.
        noise = 6 * rest / np.sqrt(ours.shape[1])
        return bool(np.quantile(abs(factor - 1) - noise, 0.75) > 4 * _ROUNDING)

    def columns_follow(self, name: str, a: str, b: str, ratio: npt.NDArray[Any]) -> bool:
        """Whether the columns of a weight in source ``a`` are those in ``b`` times ``ratio``, ``[K]``, and not as they
        are: then ``ratio`` was folded into them. False where they cannot be compared."""
        import numpy as np

        ours, theirs = self.rows(a, name), self.rows(b, name)
        if ours is None or theirs is None or not ours.shape[1:] == theirs.shape[1:] == ratio.shape:
            return False
        count = min(len(ours), len(theirs))
        factors = _factors(ours[:count], theirs[:count], 0)[0]
        sound = (factors > 0) & (ratio > 0)
        if sound.mean() < 0.9:
            return False
        expected = np.log(ratio[sound])
        return bool(np.median(abs(np.log(factors[sound]) - expected)) < np.median(abs(expected)) / 4)


def check_weights(
    modules: Mapping[str, PlannedModule], sources: Sources, probe: WeightProbe, *, full: bool = False
) -> list[str]:
    """Notes that name modules whose quantized weights were not made from the unquantized ones of this recipe."""
    notes = []
    for name in sources.by_name:
        quantized = [m for m in modules.values() if m.source == name and m.format.quantized]
        different: dict[str, list[str]] = {}
        for module in quantized if full else _sample(quantized):
            reference = _reference(module, modules, sources)
            if reference is not None and _differs(module, reference.name, probe, full):
                different.setdefault(reference.name, []).append(module.name)
        for reference_name, names in different.items():
            notes.append(
                f"{some(compress(names))}: `{name}` differs from `{reference_name}` by more than rounding, so it was "
                "made from other weights (another revision, or a model that was trained further); take these modules "
                "from a quantized form of the same weights"
                + ("" if full else ". Not all modules were looked at: --check full measures each")
            )
    return notes


def _sample(modules: Iterable[PlannedModule]) -> list[PlannedModule]:
    """Of each kind of module, one in the first, the middle and the last layer that have it."""
    kinds: dict[str, list[PlannedModule]] = {}
    for module in modules:
        kinds.setdefault(module.name.rpartition(".")[2], []).append(module)
    return [
        alike[at]
        for alike in kinds.values()
        for at in sorted({round(i * (len(alike) - 1) / (_SAMPLES - 1)) for i in range(_SAMPLES)})
    ]


def _reference(module: PlannedModule, modules: Mapping[str, PlannedModule], sources: Sources) -> Source | None:
    """The source whose form of a module is the one to compare with: an unquantized one before others, and of these one
    that the mix takes most from."""
    used: dict[str, int] = {}
    for other in modules.values():
        used[other.source] = used.get(other.source, 0) + 1
    found = []
    for source in sorted(sources.by_name.values(), key=lambda source: -used.get(source.name, 0)):
        fmt = source.known_format(module.name)
        if fmt is not None and fmt.shape(source.checkpoint.modules[module.name]) == module.shape:
            found.append((fmt.quantized, source))
    plain = (source for quantized, source in found if not quantized)
    others = (source for _, source in found if source.name != module.source and source.name in used)
    return next(plain, None) or next(others, None)


def _differs(module: PlannedModule, reference: str, probe: WeightProbe, full: bool) -> bool:
    import numpy as np

    ours = probe.rows(module.source, module.name, all_rows=full)
    theirs = probe.rows(reference, module.name, all_rows=full)
    steps = probe.steps(module.source, module.name, all_rows=full)
    if ours is None or theirs is None or steps is None:
        return False
    count = min(len(ours), len(theirs))
    ours, theirs, steps = ours[:count], theirs[:count], steps[:count]
    allowed = steps / 2 if module.format.rounded else steps
    reference_format = probe.format_of(reference, module.name)
    if reference_format.quantized:
        more = probe.steps(reference, module.name, all_rows=full)
        if more is None:
            return False
        allowed = allowed + (more[:count] / 2 if reference_format.rounded else more[:count])
    # Scales that were folded into a weight's rows and columns are no other weights.
    for _ in range(_FITS):
        if _alike(ours, theirs, allowed / 2):
            break
        theirs = theirs * _factors(ours, theirs, 1)
        theirs = theirs * _factors(ours, theirs, 0)
    error = np.sqrt(((ours - theirs) ** 2).mean(1))
    limit = np.sqrt(((allowed + _ROUNDING * abs(theirs)) ** 2).mean(1))
    return bool((error > limit).mean() > 1 / 16)


def _alike(ours: npt.NDArray[Any], theirs: npt.NDArray[Any], allowed: npt.NDArray[Any]) -> bool:
    return bool(((ours - theirs) ** 2).mean() <= (allowed**2).mean())


def _factors(ours: npt.NDArray[Any], theirs: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
    """What each row (``axis`` 1) or column (0) of ``theirs`` is best multiplied by; scales are not negative."""
    import numpy as np

    power = np.maximum((theirs * theirs).sum(axis, keepdims=True), np.finfo(np.float32).tiny)
    factors: npt.NDArray[Any] = np.maximum((ours * theirs).sum(axis, keepdims=True) / power, 0)
    return factors
