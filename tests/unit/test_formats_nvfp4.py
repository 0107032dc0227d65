"""NVFP4 against the 4-bit floats of ml_dtypes, and the packers of compressed-tensors and ModelOpt, exactly."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.formats import nvfp4, nvfp4_compressed_config, nvfp4_config
from support.oracles import modelopt_nvfp4, stated_of
from support.write import QWEN3_MOE, write_tiny

from mixprec_build.errors import RefusedError
from mixprec_build.formats.nvfp4 import Nvfp4
from mixprec_build.formats.registry import recognise
from mixprec_build.output.build import plan_recipe

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressed_tensors.compressors import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import NVFP4, NVFP4A16

Array = np.ndarray[Any, Any]
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, Array]:
    return {
        leaf: t.view(torch.uint8).numpy().view(E4M3) if t.dtype == torch.float8_e4m3fn else t.numpy()
        for leaf, t in tensors.items()
    }


def read(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> tuple[Nvfp4, Array]:
    stored = arrays(tensors)
    found = recognise(stated_of(stored), config)
    assert isinstance(found, Nvfp4)
    return found, found.dequantize(stored)


def test_all_codes_are_those_of_ml_dtypes() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(32, 8)
    fours = np.stack([codes & 15, codes >> 4], -1).reshape(32, 16).view(ml_dtypes.float4_e2m1fn)
    stored = {"weight": codes, "weight_scale": np.ones((32, 1), E4M3), "weight_scale_2": np.array(np.float32(1))}
    weight = Nvfp4("modelopt", "none").dequantize(stored)
    np.testing.assert_array_equal(weight, fours.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(weight), np.signbit(fours.astype(np.float32)))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 5), st.booleans())
def test_what_compressed_tensors_packs(seed: int, n: int, k: int, activations: bool) -> None:
    weight = torch.randn(8 * n, 16 * k, generator=torch.Generator().manual_seed(seed)).bfloat16()
    preset = NVFP4 if activations else NVFP4A16
    scheme = QuantizationScheme(targets=["Linear"], **preset)
    of_all = (6 * 448 / weight.abs().amax()).float().reshape(1)
    blocks = weight.float().reshape(8 * n, k, 16).abs().amax(2) / 6
    state = {
        "weight": weight,
        "weight_scale": (blocks * of_all).clamp(max=448).to(torch.float8_e4m3fn).float(),
        "weight_global_scale": of_all,
    } | ({"input_global_scale": torch.tensor([100.0])} if activations else {})
    packed = NVFP4PackedCompressor.compress(dict(state), scheme)
    found, ours = read(packed, nvfp4_compressed_config(activations))
    assert found == Nvfp4("compressed-tensors", "static" if activations else "none")
    theirs = NVFP4PackedCompressor.decompress(dict(packed), scheme)["weight"]
    np.testing.assert_array_equal(torch.from_numpy(ours).to(theirs.dtype).float(), theirs.float())


@pytest.mark.parametrize("seed", range(4))
def test_what_modelopt_packs(seed: int) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed))
    packed, theirs = modelopt_nvfp4(weight)
    found, ours = read(packed, nvfp4_config())
    assert found == Nvfp4("modelopt", "none")
    np.testing.assert_array_equal(ours, theirs)
    # The tests' own packer writes the same bytes.
    made = nvfp4(weight, activations=None)
    assert all(torch.equal(made[leaf].float(), packed[leaf].float()) for leaf in made)


@pytest.mark.parametrize("variant", ["nvfp4", "ct_nvfp4"])
def test_different_scales_of_one_gemm_are_refused_with_lines_that_help(variant: str, tmp_path: Path) -> None:
    """Each weight has its own scale of all here. Alone in its GEMM it is served."""
    write_tiny(tmp_path / "base", QWEN3_MOE, "bf16")
    write_tiny(tmp_path / "four", QWEN3_MOE, variant, scale=None)
    recipe = tmp_path / "recipe.yaml"
    text = (
        f"model: {tmp_path}/base\nsources: {{four: {tmp_path}/four, base: {tmp_path}/base}}\ndefault: base\nweights:\n"
    )
    recipe.write_text(text + "  '*.experts.*': four\n  '*.o_proj': four\n")
    with pytest.raises(RefusedError) as refused:
        plan_recipe(recipe)
    (problem,) = refused.value.problems
    assert problem.code == "kernel_limit" and "gate_proj, up_proj, which run as one GEMM" in str(problem)
    lines = [f"  '{line.pattern}': {line.source}" for line in problem.fix.add]
    recipe.write_text(text + "\n".join(["  '*.experts.*': four", "  '*.o_proj': four", *lines]))
    kinds = {name: module.format.kind for name, module in plan_recipe(recipe).modules.items()}
    assert kinds["model.layers.0.self_attn.o_proj"] == kinds["model.layers.0.mlp.experts.0.down_proj"] == variant
    assert kinds["model.layers.0.mlp.experts.0.gate_proj"] == "bf16"


def test_what_runs_as_one_gemm_shares_one_scale() -> None:
    fmt = Nvfp4("modelopt", "none")
    parts = [stated_of(arrays(nvfp4(torch.randn(64, 128), activations=None)), f"mlp.{p}_proj") for p in ("gate", "up")]
    values = {"mlp.gate_proj.weight_scale_2": 0.5, "mlp.up_proj.weight_scale_2": 0.25}

    def reader(info: Any) -> Array:
        return np.array([values[info.name]], np.float32)

    (limit,) = fmt.value_limits(parts, reader, experts=False)
    assert limit == (
        "weight_scale_2 differs between gate_proj, up_proj, which run as one GEMM, and SGLang would take one of them "
        "for all"
    )
    values["mlp.up_proj.weight_scale_2"] = 0.5
    assert not fmt.value_limits(parts, reader, experts=False)
