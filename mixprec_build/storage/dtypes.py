"""The dtypes of safetensors, with their bits and numpy dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from ..errors import SourceError

if TYPE_CHECKING:
    import numpy as np

__all__ = ["DTYPE_BITS", "numpy_dtype"]


@cache
def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype for a safetensors dtype, from ml_dtypes for BF16 and FP8. Raises :class:`SourceError` if none."""
    import numpy as np

    if dtype in _NATIVE:
        return np.dtype(_NATIVE[dtype])
    if dtype not in _ML_DTYPES:
        raise SourceError(f"values of dtype {dtype} are not read")
    import ml_dtypes

    scalar: type = getattr(ml_dtypes, _ML_DTYPES[dtype])
    return np.dtype(scalar)


_NATIVE = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8",
}  # fmt: skip
_ML_DTYPES = {
    "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
