"""Scales that are powers of two."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from mixprec_build.formats.arrays import NUMPY
from mixprec_build.formats.e8m0 import powers_of_two


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, ml_dtypes.float8_e8m0fnu])
def test_every_byte_is_its_power_of_two(dtype: npt.DTypeLike) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    values = powers_of_two(codes.view(dtype), NUMPY)
    assert values.dtype == np.float32 and values.shape == (16, 16)
    assert math.isnan(values[15, 15])
    assert values.reshape(-1)[:255].tolist() == [math.ldexp(1, code - 127) for code in range(255)]
