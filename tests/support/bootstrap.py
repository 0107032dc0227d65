"""Bootstrap intervals of what benchmarks measure."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["interval"]


def interval(values: npt.NDArray[np.float64], seed: int = 0, samples: int = 1000) -> tuple[float, float, float]:
    """The mean, and the ends of its 95 % bootstrap interval."""
    draw = np.random.default_rng(seed)
    means = values[draw.integers(len(values), size=(samples, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)
