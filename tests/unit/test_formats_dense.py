"""BF16, FP16 and FP32 by every bit pattern, as torch reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.oracles import stated_of

from mixprec_build.formats.dense import Dense
from mixprec_build.formats.registry import recognise
from mixprec_build.storage.dtypes import numpy_dtype

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@pytest.mark.parametrize(("dtype", "kind"), [("BF16", "bf16"), ("F16", "fp16"), ("F32", "fp32")])
def test_values_are_torchs(dtype: str, kind: str) -> None:
    if dtype == "F32":  # too many to try all: random words hold NaN, infinity and subnormal numbers too
        words = np.random.default_rng(0).integers(0, 2**32, (256, 256), dtype=np.uint32)
        words.flat[:4] = 0x7F800000, 0xFF800000, 0x7FC00000, 0x00000001
    else:
        words = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    weight = words.view(numpy_dtype(dtype))
    found = recognise(stated_of({"weight": weight}), {})
    assert found == Dense(dtype)
    assert found.kind == kind
    ours = found.dequantize({"weight": weight})
    theirs = torch.from_numpy(words.view(f"i{words.itemsize}")).view(TORCH[dtype]).float().numpy()
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs)  # NaN equals NaN here
    np.testing.assert_array_equal(np.signbit(ours), np.signbit(theirs))
