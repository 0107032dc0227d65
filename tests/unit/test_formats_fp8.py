"""FP8 against transformers, compressed-tensors and DeepSeek's published formula; every comparison is exact."""

from __future__ import annotations

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracles import stated_of

from mixprec_build.formats.fp8 import Fp8
from mixprec_build.formats.registry import recognise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

Array = npt.NDArray[Any]

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
SCALE_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))


def to_torch(array: Array) -> torch.Tensor:
    """E4M3 by its bytes; scales by their values in float32, which holds all that FP16 and BF16 hold."""
    if array.dtype == E4M3:
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array.astype(np.float32))


def test_all_256_codes_are_torchs() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16).view(E4M3)
    ours = Fp8("tensor").dequantize({"weight": codes, "weight_scale": np.float32([1])})
    theirs = to_torch(codes).float().numpy()
    np.testing.assert_array_equal(ours, theirs)  # NaN equals NaN here
    np.testing.assert_array_equal(np.signbit(ours), np.signbit(theirs))
    finite = np.abs(ours[~np.isnan(ours)])
    assert np.isnan(ours).sum() == 2
    assert finite.max() == 448
    assert finite[finite > 0].min() == 2**-9  # subnormal


@st.composite
def blocks(draw: st.DrawFn, *, partial: bool) -> tuple[tuple[int, int], Array, Array]:
    """A block size, any codes, and scales of any magnitude."""
    block = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    grid = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    shape = tuple(size * count for size, count in zip(block, grid, strict=True))
    if partial:
        shape = tuple(most - draw(st.integers(0, size - 1)) for most, size in zip(shape, block, strict=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weight = rng.integers(0, 256, shape, dtype=np.uint8).view(E4M3)
    scale = np.exp2(rng.uniform(-14, 6, grid)).astype(draw(st.sampled_from(SCALE_DTYPES)))
    return block, weight, scale


def read_block(block: tuple[int, int], weight: Array, scale: Array) -> Array:
    """Through recognition, as a checkpoint would be read."""
    arrays = {"weight": weight, "weight_scale_inv": scale}
    found = recognise(stated_of(arrays), {"quant_method": "fp8", "weight_block_size": list(block)})
    assert found == Fp8("block", "dynamic", block)
    ours = found.dequantize(arrays)
    assert ours.dtype == np.float32
    return ours


@pytest.mark.parametrize("leaf", ["weight_scale_inv", "scale"])
@pytest.mark.parametrize("block", [(128, 128), (32, 32), (1, 128)])
def test_scales_may_be_powers_of_two(block: tuple[int, int], leaf: str) -> None:
    """E8M0 against ml_dtypes: its bytes, its dtype and the same numbers in float32 are one weight."""
    rng = np.random.default_rng(7)
    weight = rng.integers(0, 127, (256, 320), dtype=np.uint8).view(E4M3)  # all but NaN
    grid = tuple(-(-size // per) for size, per in zip(weight.shape, block, strict=True))
    codes = rng.integers(0, 240, grid, dtype=np.uint8)
    exponents = codes.view(ml_dtypes.float8_e8m0fnu)
    due = weight.astype(np.float32)
    due *= exponents.astype(np.float32).repeat(block[0], 0)[:256].repeat(block[1], 1)[:, :320]
    for scale in (exponents, codes, exponents.astype(np.float32)):
        arrays = {"weight": weight, leaf: scale}
        config = {"quant_method": "fp8", "weight_block_size": list(block), "scale_fmt": "ue8m0"}
        found = recognise(stated_of(arrays), config)
        assert found == Fp8("block", "dynamic", block, "" if leaf != "scale" else leaf, "ue8m0")
        np.testing.assert_array_equal(found.dequantize(arrays), due)


@settings(max_examples=60, deadline=None)
@given(blocks(partial=False))
def test_whole_blocks_are_transformers(drawn: tuple[tuple[int, int], Array, Array]) -> None:
    _, weight, scale = drawn
    theirs = Fp8Dequantize(None).convert({"weight": to_torch(weight), "weight_scale_inv": to_torch(scale)})
    np.testing.assert_array_equal(read_block(*drawn), theirs["weight"].numpy())


@settings(max_examples=60, deadline=None)
@given(blocks(partial=True))
def test_partial_blocks_are_deepseeks(drawn: tuple[tuple[int, int], Array, Array]) -> None:
    """``weight_dequant`` of DeepSeek-V3's ``inference/kernel.py``: program (i, j) scales one block by ``s[i, j]``.

    transformers is no judge here: it derives the block size from the grid and so takes all blocks for whole.
    """
    (block_n, block_k), weight, scale = drawn
    x, s = to_torch(weight).float(), to_torch(scale)
    y = torch.full_like(x, -1)
    for i in range(s.shape[0]):
        for j in range(s.shape[1]):
            tile = slice(i * block_n, (i + 1) * block_n), slice(j * block_k, (j + 1) * block_k)
            y[tile] = x[tile] * s[i, j]
    ours = read_block(*drawn)
    np.testing.assert_array_equal(ours, y.numpy())
    args = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[block_n, block_k])
    np.testing.assert_array_equal(ours, dequantize(to_torch(weight), s, args=args).numpy())


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("strategy", "shape"),
    [("channel", (48, 1)), ("channel", (48,)), ("tensor", (1,)), ("tensor", ()), ("tensor", (1, 1))],
)
@pytest.mark.parametrize("dtype", SCALE_DTYPES, ids=str)
def test_channels_and_tensors_are_compressed_tensors(
    strategy: str, shape: tuple[int, ...], dtype: np.dtype[Any], activations: str
) -> None:
    args = QuantizationArgs(num_bits=8, type="float", strategy=strategy, symmetric=True)
    rng = np.random.default_rng(len(shape))
    dense = torch.from_numpy(rng.standard_normal((48, 80)).astype(np.float32))
    scale = (dense.abs().amax(dim=1, keepdim=True) if strategy == "channel" else dense.abs().max().reshape(1)) / 448
    scale = to_torch(scale.numpy().astype(dtype))
    # `dtype` casts what is rounded and clamped to E4M3's range to E4M3 itself, as their compressor does.
    weight = quantize(dense, scale, None, args, dtype=torch.float8_e4m3fn)
    arrays = {"weight": weight.view(torch.uint8).numpy().view(E4M3), "weight_scale": scale.numpy().astype(dtype)}
    arrays["weight_scale"] = arrays["weight_scale"].reshape(shape)
    if activations == "static":
        arrays["input_scale"] = np.ones(1, np.float32)

    found = recognise(stated_of(arrays), {"quant_method": "compressed-tensors", "format": "float-quantized"})
    assert found == Fp8(strategy, activations)
    theirs = dequantize(weight, scale, args=args)
    np.testing.assert_array_equal(found.dequantize(arrays), theirs.numpy())
    assert (theirs - dense).abs().max() <= dense.abs().max() / 16  # and it is the weight that was quantized
