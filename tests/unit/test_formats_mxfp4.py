"""MXFP4 against the 4-bit floats of ml_dtypes, compressed-tensors' packer and transformers' dequantization, exactly."""

from __future__ import annotations

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.formats import mxfp4, mxfp4_config
from support.oracles import compressed, config_group, stated, stated_of
from support.oracles import mxfp4 as tensors_of

from mixprec_build.formats.base import Axes, Axis, FormatError
from mixprec_build.formats.mxfp4 import Mxfp4
from mixprec_build.formats.registry import format_from_json, recognise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressed_tensors.compressors import MXFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import MXFP4, MXFP4A16
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

Array = np.ndarray[Any, Any]
E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
LAYOUTS = {
    "quark": Mxfp4(),
    "compressed-tensors": Mxfp4("weight_packed"),
    "deepseek": Mxfp4("weight", "I8", "scale", "F8_E8M0"),
}


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, Array]:
    return {
        leaf: t.view(torch.uint8).numpy().view(E8M0) if t.dtype == torch.float8_e8m0fnu else t.numpy()
        for leaf, t in tensors.items()
    }


def read(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> tuple[Mxfp4, Array]:
    stored = arrays(tensors)
    found = recognise(stated_of(stored), config)
    assert isinstance(found, Mxfp4)
    return found, found.dequantize(stored)


def test_all_codes_and_scales_are_those_of_ml_dtypes() -> None:
    codes = np.arange(256, dtype=np.uint8).repeat(16).reshape(256, 16)
    fours = np.stack([codes & 15, codes >> 4], -1).reshape(256, 32).view(ml_dtypes.float4_e2m1fn)
    powers = np.arange(256, dtype=np.uint8)[::-1].reshape(256, 1)
    weight = Mxfp4().dequantize({"weight": codes, "weight_scale": powers})
    with np.errstate(over="ignore"):
        due = fours.astype(np.float32) * np.ascontiguousarray(powers).view(E8M0).astype(np.float32)
    np.testing.assert_array_equal(weight, due)
    np.testing.assert_array_equal(np.signbit(weight), np.signbit(due))
    assert np.isnan(weight[0]).all() and np.isfinite(weight[2:]).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_what_compressed_tensors_packs(seed: int, n: int, k: int, activations: bool) -> None:
    weight = torch.randn(8 * n, 32 * k, generator=torch.Generator().manual_seed(seed)).bfloat16()
    scheme = QuantizationScheme(targets=["Linear"], **(MXFP4 if activations else MXFP4A16))
    largest = weight.float().reshape(8 * n, k, 32).abs().amax(2)
    scales = (largest.log2().floor() - 2).exp2()
    packed = MXFP4PackedCompressor.compress({"weight": weight, "weight_scale": scales}, scheme)
    config = mxfp4_config("compressed-tensors")
    if activations:
        (group,) = config["config_groups"].values()
        group["input_activations"] = {**group["weights"], "dynamic": True}
    found, ours = read(packed, config)
    assert found == LAYOUTS["compressed-tensors"]
    theirs = MXFP4PackedCompressor.decompress(dict(packed), scheme)["weight"]
    np.testing.assert_array_equal(torch.from_numpy(ours).to(theirs.dtype).float(), theirs.float())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_what_transformers_reads_of_gpt_oss(layout: str) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(3))
    found, ours = read(mxfp4(weight, layout=layout), mxfp4_config(layout))
    assert found == LAYOUTS[layout] and format_from_json(found.to_json()) == found
    plain = mxfp4(weight)
    blocks, scales = plain["weight"].reshape(1, 64, 8, 16), plain["weight_scale"].reshape(1, 64, 8)
    theirs = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)[0].t()
    np.testing.assert_array_equal(ours, theirs)
    # Rounded to the nearest value, but for those beyond the largest.
    error = np.abs(ours - weight.numpy()).reshape(64, 8, 32).max(2)
    assert (error <= 2 * 2.0 ** (scales[0].numpy().astype(int) - 127)).all()


@pytest.mark.parametrize("fmt", LAYOUTS.values(), ids=LAYOUTS)
def test_it_is_cut_by_blocks(fmt: Mxfp4) -> None:
    assert fmt.axes(fmt.values) == Axes(n=Axis(0), k=Axis(1, 2))
    assert fmt.axes(fmt.scales) == Axes(n=Axis(0), k=Axis(1, 32))
    assert fmt.axes("bias") == Axes(n=Axis(0))
    assert fmt.tile(experts=True) == (64, 64)
    zero = np.full((1, 32), fmt.filler(fmt.values), np.uint8)[:, :16], np.full((1, 1), fmt.filler(fmt.scales), np.uint8)
    assert not fmt.dequantize({fmt.values: zero[0], fmt.scales: zero[1]}).any()


def test_kernels_run_experts_only() -> None:
    fmt, parts = Mxfp4(), [stated(tensors_of(256, 512), f"mlp.experts.0.{p}_proj") for p in ("gate", "up")]
    assert not fmt.expert_limits(parts, 512, 256)
    assert fmt.expert_limits(parts, 576, 256) == ["its hidden size 576 is no multiple of 128, which Marlin needs"]
    assert fmt.expert_limits(parts, 512, 96) == ["its intermediate size 96 is no multiple of 64, which Marlin needs"]
    (limit,) = fmt.linear_limits(parts)
    assert limit.startswith("SGLang has no kernel for linears in MXFP4")
    biased = [stated({**tensors_of(2880, 2880), "bias": ("BF16", (2880,))})]  # gpt-oss's, which SGLang pads
    assert not fmt.expert_limits(biased, 2880, 2880)
    assert fmt.expert_limits(biased, 2896, 2880)


QUARK = mxfp4_config()
NVFP4_GROUP = compressed("nvfp4-pack-quantized", config_group(kind="float", strategy="tensor_group", group_size=16))


@pytest.mark.parametrize(
    ("stored", "config", "error"),
    [
        (tensors_of(256, 512, weight_scale=("U8", (256, 32))), QUARK,
         r"weight_scale U8 \[256, 32\]: \[256, 16\] was expected for 256 outputs and 512 inputs"),
        (tensors_of(256, 528, weight_scale=("U8", (256, 16))), QUARK, "528 inputs are no multiple of the block of 32"),
        (tensors_of(256, 512, weight=("U8", (256, 2, 256))), QUARK, r"weight U8 \[256, 2, 256\]: two dimensions"),
        (tensors_of(256, 512, input_scale=("F32", ())), QUARK, r"input_scale F32 \[\] does not belong to mxfp4"),
        (tensors_of(256, 512), QUARK | {"algo_config": [{"name": "awq"}, {"name": "rotation"}]},
         "algo_config of quantization_config has 'rotation', which mixprec does not know"),
        (tensors_of(256, 512), QUARK | {"block_rotation": True}, "quantization_config has `block_rotation`"),
        (tensors_of(256, 512, weight=None, weight_packed=("U8", (256, 256))), NVFP4_GROUP,
         "stored as mxfp4, but declared by config group 'group_0' "),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(stored: Any, config: Any, error: str) -> None:
    with pytest.raises(FormatError, match=f"^{error}"):
        recognise(stated(stored), config)


@pytest.mark.parametrize(
    "data",
    [{"values": "qweight"}, {"values_dtype": "I32"}, {"scales": "scales"}, {"scales_dtype": "F32"}, {"scales": 1}],
)
def test_a_declaration_of_something_else_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="is none of"):
        format_from_json({"kind": "mxfp4", **data})
