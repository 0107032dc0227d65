"""Compares rows of weights between sources, to see whether they are one model's and whether scales were folded in.

Reads only files on this machine, and about a hundred rows of a few modules unless all are asked for. Differences are
measured in steps between the values that a quantized format can store: rounding to the nearest leaves at most half a
step, methods that shift errors between weights (GPTQ, AutoRound) about one. A larger difference means other weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from math import lcm, prod
from typing import TYPE_CHECKING, Any

from ..formats.registry import bits_of
from ..patterns.compress import compress
from ..storage.reader import FileReader
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
"""Most bytes that are read of one tensor."""
_SAMPLES = 3
"""Number of layers in which modules of one kind are compared."""
_FITS = 12
"""Most rounds in which scales of rows and columns are fitted in turn."""
_BEYOND = 1 / 64
"""Fraction of weights that may be further from the reference than rounding to the nearest leaves: clipped ones."""
_ROUNDING = 2.0**-7
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
        return bool(np.quantile(abs(factor - 1) - noise, 0.75) > 4 * _ROUNDING)

    def columns_follow(self, name: str, a: str, b: str, ratio: npt.NDArray[Any]) -> bool:
        """Whether the columns of a weight in ``a`` are those in ``b`` times ``ratio`` ``[K]``, folded in then.

        False where they are equal, or cannot be compared.
        """
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
    """Returns notes on quantized modules that were not made from the weights that another source has of them.

    Compares a sample of the modules; with ``full`` all rows of each.
    """
    notes = []
    used = Counter(module.source for module in modules.values())
    for name in sources.by_name:
        quantized = [m for m in modules.values() if m.source == name and m.format.quantized]
        different: dict[str, list[str]] = {}
        for module in quantized if full else _sample(quantized):
            reference = _reference(module, used, sources)
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
    """One module of each kind in the first, the middle and the last layer that have it."""
    kinds: dict[str, list[PlannedModule]] = {}
    for module in modules:
        kinds.setdefault(module.name.rpartition(".")[2], []).append(module)
    return [
        alike[at]
        for alike in kinds.values()
        for at in sorted({round(i * (len(alike) - 1) / (_SAMPLES - 1)) for i in range(_SAMPLES)})
    ]


def _reference(module: PlannedModule, used: Counter[str], sources: Sources) -> Source | None:
    """The source to compare a module with: an unquantized one if possible, and the one that most of the mix is from.

    ``used`` has the number of modules that come from each source.
    """
    found = []
    for source in sorted(sources.by_name.values(), key=lambda source: -used[source.name]):
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
    unscaled = theirs
    # Weights that differ only by scales folded into rows and columns are the same.
    for _ in range(_FITS):
        if _alike(ours, theirs, allowed / 2):
            break
        theirs = theirs * _factors(ours, theirs, 1)
        theirs = theirs * _factors(ours, theirs, 0)
    error = np.sqrt(((ours - theirs) ** 2).mean(1))
    limit = np.sqrt(((allowed + _ROUNDING * abs(theirs)) ** 2).mean(1))
    if (error > limit).mean() > 1 / 16:
        return True
    rounds = module.format.rounded and not reference_format.quantized
    is_scaled = ((ours - unscaled) ** 2).mean() > 1.25 * (error**2).mean()
    return rounds and not is_scaled and _is_beyond_rounding(ours, unscaled, steps)


def _is_beyond_rounding(ours: npt.NDArray[Any], theirs: npt.NDArray[Any], steps: npt.NDArray[Any]) -> bool:
    """Whether too many weights are further apart than half a step, which rounding to the nearest never leaves.

    A change much smaller than a step does not show in a single weight. But of thousands, those near the middle between
    two values are then rounded to the other one: a share of about ``d`` for a change of ``d`` steps.
    """
    # Scales, and the division by them, may have been in BF16.
    slack = _ROUNDING / 2 * abs(theirs)
    return bool((abs(ours - theirs) > steps / 2 + slack).mean() > _BEYOND)


def _alike(ours: npt.NDArray[Any], theirs: npt.NDArray[Any], allowed: npt.NDArray[Any]) -> bool:
    return bool(((ours - theirs) ** 2).mean() <= (allowed**2).mean())


def _factors(ours: npt.NDArray[Any], theirs: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
    """Least-squares factors of the rows (``axis`` 1) or columns (0) of ``theirs``, never negative."""
    import numpy as np

    power = np.maximum((theirs * theirs).sum(axis, keepdims=True), np.finfo(np.float32).tiny)
    factors: npt.NDArray[Any] = np.maximum((ours * theirs).sum(axis, keepdims=True) / power, 0)
    return factors
