"""Int8 against compressed-tensors' own quantizer and torch; every comparison is exact."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from support.oracles import stated_of

from mixprec_build.formats.int8 import Int8
from mixprec_build.formats.registry import format_from_json, recognise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize


def test_channels_are_compressed_tensors() -> None:
    dense = torch.from_numpy(np.random.default_rng(0).standard_normal((48, 80)).astype(np.float32))
    args = QuantizationArgs(num_bits=8, type="int", strategy="channel", symmetric=True)
    scale = dense.abs().amax(dim=1, keepdim=True) / 127
    weight = quantize(dense, scale, None, args, dtype=torch.int8)
    arrays = {"weight": weight.numpy(), "weight_scale": scale.numpy()}
    found = recognise(stated_of(arrays), {"quant_method": "compressed-tensors", "format": "int-quantized"})
    assert found == Int8("channel")
    theirs = dequantize(weight, scale, args=args)
    np.testing.assert_array_equal(found.dequantize(arrays), theirs.numpy())
    assert (theirs - dense).abs().max() <= scale.max()  # and it is the weight that was quantized


@pytest.mark.parametrize("shape", [(256, 128), (200, 300)])
def test_blocks_are_scaled_one_by_one(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    weight = rng.integers(-128, 128, shape, dtype=np.int8)
    scale = rng.uniform(0.001, 1, tuple(-(-size // 128) for size in shape)).astype(np.float32)
    arrays = {"weight": weight, "weight_scale_inv": scale}
    found = recognise(stated_of(arrays), {"quant_method": "blockwise_int8", "weight_block_size": [128, 128]})
    assert found == Int8("block", "dynamic", (128, 128))
    due = torch.from_numpy(weight).float()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            due[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= float(scale[i, j])
    np.testing.assert_array_equal(found.dequantize(arrays), due.numpy())


def test_what_it_says_of_itself_is_read_back() -> None:
    for fmt in (Int8("channel"), Int8("block", "dynamic", (128, 128))):
        assert format_from_json(fmt.to_json()) == fmt


@pytest.mark.parametrize(
    ("shape", "scale", "limit"),
    [
        ((256, 120), (256, 1), "its 120 inputs are no multiple of 16"),
        ((252, 128), (252, 1), "its 252 outputs are no multiple of 8"),
        ((256, 128), (256,), "has one dimension, SGLang loads [N, 1]"),
        ((256, 128), (1,), "Int8 with one scale a tensor has no SGLang method"),
    ],
)
def test_what_sglangs_kernel_does_not_take_is_a_limit(
    shape: tuple[int, int], scale: tuple[int, ...], limit: str
) -> None:
    module = stated_of({"weight": np.zeros(shape, np.int8), "weight_scale": np.ones(scale, np.float32)})
    found = recognise(module, {})
    assert any(limit in said for said in found.linear_limits([module]))
    assert not recognise(
        sound := stated_of({"weight": np.zeros((256, 128), np.int8), "weight_scale": np.ones((256, 1), np.float32)}), {}
    ).linear_limits([sound])
