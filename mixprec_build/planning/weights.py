"""Compares weights of the sources of a mix, to see whether they are one model's and mean what their formats say.

Differences are measured in steps between the values that a quantized format can store: rounding to the nearest leaves
at most half a step, methods that shift errors between weights (GPTQ, AutoRound) about one. A larger difference means
other weights. A weight that is another's times one factor, or has no numbers, was stored otherwise than its format
says: scales as their reciprocals, bytes for a GPU that counts exponents otherwise, scales that were lost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..patterns.compress import compress
from ..text import some
from .probe import ROUNDING, WeightProbe, factors
from .problems import Problems, Replacement

if TYPE_CHECKING:
    import numpy.typing as npt

    from ..checkpoint.typed import Source
    from ..recipe.sources import Sources
    from .folding import Folding
    from .types import PlannedModule

__all__ = ["check_weights"]


_SAMPLES = 3
"""Number of layers in which modules of one kind are compared."""
_FITS = 12
"""Most rounds in which scales of rows and columns are fitted in turn."""
_BEYOND = 1 / 64
"""Fraction of weights that may be further from the reference than rounding to the nearest leaves: clipped ones."""
_LARGEST_FACTOR = 64.0
"""Scales that a quantizer folds into inputs or outputs are around 1; those of activations stay below this."""
_ONE_FACTOR = 1.25
"""Ratio of two factors, or of a factor and 1, that rounding may leave."""
_UNRELATED = 7 / 8
"""Fraction of a row's norm from which on a difference leaves nothing in common. A fine-tune leaves most."""
_LOST = 1 / 1024
"""Fraction of weights that are zero for want of a scale, from which on a module counts as damaged."""


def check_weights(
    modules: Mapping[str, PlannedModule], sources: Sources, folding: Folding, problems: Problems, *, full: bool = False
) -> list[str]:
    """Returns notes on quantized modules that were not made from the weights that another source has of them.

    Adds to ``problems`` those that are no numbers, zero for want of scales, or another source's times a factor, and
    warns of those that have nothing in common. Compares a sample of the modules; with ``full`` all rows of each.
    """
    notes, probe = [], WeightProbe(sources)
    used = Counter(module.source for module in modules.values())
    for name in sources.by_name:
        quantized = [m for m in modules.values() if m.source == name and m.format.quantized]
        different: dict[str, list[str]] = {}
        meaningless: dict[tuple[str, str], list[str]] = {}
        unrelated: dict[str, list[str]] = {}
        for module in quantized if full else _sample(quantized):
            reference = _reference(module, used, sources)
            compared = None if reference is None else _Compared.read(module, reference.name, probe, full)
            if reference is None or compared is None:
                continue
            why = compared.no_weight(folded=folding.is_explained(module, reference.name, modules))
            if why is not None:
                meaningless.setdefault((reference.name, why), []).append(module.name)
            elif compared.is_unrelated:
                unrelated.setdefault(reference.name, []).append(module.name)
            elif compared.differs():
                different.setdefault(reference.name, []).append(module.name)
        unseen = "" if full else " (not all modules were looked at: --check full measures each)"
        for (reference_name, why), damaged in meaningless.items():
            problems.soft(
                damaged,
                f"{why.format(ours=f'`{name}`', theirs=f'`{reference_name}`')}: its scales are damaged, or mean "
                f"something else than SGLang takes them for. Fetch `{name}` again, or take what the mix has from it "
                f"from another source{unseen}",
                code="different_weights",
            )
        for reference_name, names in unrelated.items():
            problems.warn(
                f"`{name}` has nothing of the weights that `{reference_name}` has here: its experts, rows or packed "
                f"values are in another order, or it is another model{unseen}",
                Replacement(None),
                code="different_weights",
                modules=names,
            )
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


@dataclass(frozen=True, eq=False)
class _Compared:
    """Rows of a quantized weight and of the same weight in another source, ``[rows, K]``."""

    ours: npt.NDArray[Any]
    theirs: npt.NDArray[Any]
    steps: npt.NDArray[Any]
    """The distance from each of ours to the next value that the format can store."""
    allowed: npt.NDArray[Any]
    """The difference that quantization may have made."""
    rounds: bool
    """Whether ours are theirs rounded to the nearest, for they are unquantized."""

    @classmethod
    def read(cls, module: PlannedModule, reference: str, probe: WeightProbe, full: bool) -> _Compared | None:
        """None where one of them cannot be read."""
        ours = probe.rows(module.source, module.name, all_rows=full)
        theirs = probe.rows(reference, module.name, all_rows=full)
        steps = probe.steps(module.source, module.name, all_rows=full)
        if ours is None or theirs is None or steps is None:
            return None
        count = min(len(ours), len(theirs))
        ours, theirs, steps = ours[:count], theirs[:count], steps[:count]
        allowed = steps / 2 if module.format.rounded else steps
        reference_format = probe.format_of(reference, module.name)
        if reference_format.quantized:
            more = probe.steps(reference, module.name, all_rows=full)
            if more is None:
                return None
            allowed = allowed + (more[:count] / 2 if reference_format.rounded else more[:count])
        return cls(ours, theirs, steps, allowed, module.format.rounded and not reference_format.quantized)

    def no_weight(self, *, folded: bool) -> str | None:
        """Why ours cannot be a form of theirs, with places for the names of both; None where they may be.

        ``folded``: whether scales were folded into the inputs of one of them.
        """
        import numpy as np

        ours, theirs = self.ours, self.theirs
        if not np.isfinite(theirs).all():
            return None
        if not np.isfinite(ours).all():
            return "{ours} has values that are no numbers (NaN or infinite)"
        size = np.sqrt((theirs * theirs).mean())
        lost = (self.steps == 0) & (ours == 0) & (abs(theirs) > size / 8)
        if lost.mean() > _LOST:
            return "{ours} has scales of zero, for weights that are not zero in {theirs}"
        ratios = [_ratios(ours, theirs, axis) for axis in (0, 1)]
        if folded or not all(map(len, ratios)):
            return None
        typical = float(np.median(ratios[0]))
        low, high = (np.concatenate([np.quantile(one, [q]) for one in ratios]) for q in (0.05, 0.95))
        is_one = bool((high < _ONE_FACTOR * np.maximum(low, np.finfo(np.float32).tiny)).all())
        if _is_near_one(typical, _LARGEST_FACTOR) and (not is_one or _is_near_one(typical, _ONE_FACTOR)):
            return None
        # One number for modules whose scales differ, so that they are one problem.
        shown = typical if _is_near_one(typical, _LARGEST_FACTOR) else 10.0 ** round(math.log10(max(typical, 1e-30)))
        return f"{{ours}} has the weights of {{theirs}} times about {shown:.2g}"

    def differs(self) -> bool:
        """Whether ours were made from other weights than theirs."""
        import numpy as np

        error = self._error
        limit = np.sqrt(((self.allowed + ROUNDING * abs(self._scaled)) ** 2).mean(1))
        if (error > limit).mean() > 1 / 16:
            return True
        is_scaled = ((self.ours - self.theirs) ** 2).mean() > 1.25 * (error**2).mean()
        return self.rounds and not is_scaled and _is_beyond_rounding(self.ours, self.theirs, self.steps)

    @property
    def is_unrelated(self) -> bool:
        """Whether ours have next to nothing of theirs, whatever scales were folded in."""
        import numpy as np

        size = np.sqrt((self.ours * self.ours).mean(1))
        return bool((self._error > _UNRELATED * size).mean() > 1 / 2)

    @cached_property
    def _scaled(self) -> npt.NDArray[Any]:
        """Theirs with the scales that fit ours: weights that differ only by scales of rows and columns are the same."""
        theirs = self.theirs
        for _ in range(_FITS):
            if _alike(self.ours, theirs, self.allowed / 2):
                break
            theirs = theirs * factors(self.ours, theirs, 1)
            theirs = theirs * factors(self.ours, theirs, 0)
        return theirs

    @cached_property
    def _error(self) -> npt.NDArray[Any]:
        """The root of the mean square of the differences in each row."""
        import numpy as np

        found: npt.NDArray[Any] = np.sqrt(((self.ours - self._scaled) ** 2).mean(1))
        return found


def _ratios(ours: npt.NDArray[Any], theirs: npt.NDArray[Any], axis: int) -> npt.NDArray[Any]:
    """Our norm of each column (``axis`` 0) or row (1) by theirs, where that is not nearly zero."""
    import numpy as np

    mine, other = (np.sqrt((values.astype(np.float64) ** 2).sum(axis)) for values in (ours, theirs))
    sound = other > other.max(initial=0) / 64
    found: npt.NDArray[Any] = mine[sound] / other[sound]
    return found


def _is_near_one(factor: float, most: float) -> bool:
    return 1 / most <= factor <= most


def _is_beyond_rounding(ours: npt.NDArray[Any], theirs: npt.NDArray[Any], steps: npt.NDArray[Any]) -> bool:
    """Whether too many weights are further apart than half a step, which rounding to the nearest never leaves.

    A change much smaller than a step does not show in a single weight. But of thousands, those near the middle between
    two values are then rounded to the other one: a share of about ``d`` for a change of ``d`` steps.
    """
    # Scales, and the division by them, may have been in BF16.
    slack = ROUNDING / 2 * abs(theirs)
    return bool((abs(ours - theirs) > steps / 2 + slack).mean() > _BEYOND)


def _alike(ours: npt.NDArray[Any], theirs: npt.NDArray[Any], allowed: npt.NDArray[Any]) -> bool:
    return bool(((ours - theirs) ** 2).mean() <= (allowed**2).mean())
