"""Measures how far quantized weights are from unquantized ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..checkpoint.typed import Source
from ..errors import VerifyError
from ..formats.base import Format

__all__ = ["WeightError", "comparable", "weight_errors"]


@dataclass(frozen=True, slots=True)
class WeightError:
    """``relative`` is ‖W−Ŵ‖/‖W‖ (Frobenius) of a module's dequantized weight."""

    module: str
    kind: str
    relative: float


def comparable(checkpoint: Source, reference: Source) -> dict[str, Format]:
    """The quantized modules of a checkpoint and their formats, if ``reference`` has all of them unquantized.

    Raises:
        VerifyError: the reference lacks a module, or has it quantized or in another shape.
    """
    quantized = {name: fmt for name, fmt in checkpoint.formats.items() if isinstance(fmt, Format) and fmt.quantized}
    for name, fmt in quantized.items():
        other = reference.formats.get(name)
        if not isinstance(other, Format) or other.quantized:
            raise VerifyError(
                f"{reference.checkpoint.location}: holds no unquantized {name} to compare with; name a checkpoint in "
                "BF16 or FP16"
            )
        ours, theirs = fmt.shape(checkpoint.checkpoint.modules[name]), other.shape(reference.checkpoint.modules[name])
        if ours != theirs:
            raise VerifyError(f"{name}: {list(ours)}, but {list(theirs)} in {reference.checkpoint.location}")
    return quantized


def weight_errors(
    checkpoint: Source, reference: Source, progress: Callable[[str], None] | None = None
) -> Iterator[WeightError]:
    """Yields the relative error of each quantized module against the same module of an unquantized checkpoint.

    Raises:
        VerifyError: the two are not :func:`comparable`.
    """
    for name, fmt in comparable(checkpoint, reference).items():
        if progress is not None:
            progress(name)
        exact, ours = _dequantized(reference, name), _dequantized(checkpoint, name)
        with np.errstate(all="ignore"):  # weights may be infinite or NaN: then so is the result
            norm = float(np.linalg.norm(exact))
            distance = float(np.linalg.norm(exact - ours))
        yield WeightError(name, fmt.kind, distance / norm if norm else distance)


def _dequantized(source: Source, name: str) -> npt.NDArray[np.float32]:
    try:
        with np.errstate(all="ignore"):
            return source.dequantize(name)
    except (IndexError, ValueError, MemoryError) as error:  # a damaged g_idx, for example
        where = source.checkpoint.location
        raise VerifyError(f"{where}: {name} cannot be dequantized: {error}") from error
