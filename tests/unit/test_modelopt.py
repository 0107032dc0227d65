"""ModelOpt's checkpoints: block scales in four dimensions, and modules left out by patterns."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from support.write import LLAMA, QWEN3_MOE, Config, Tensors, Tiny, write_tiny

from mixprec_build.checkpoint.typed import open_source
from mixprec_build.formats.base import FormatError
from mixprec_build.formats.fp8 import Fp8
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.verify import verify

# FP8_PB_WO


def in_four_dimensions(tensors: Tensors, config: Config) -> None:
    """As ModelOpt's quantizer leaves its scales: with the dimensions that it reduced (SGLang 0.5.23,
    models/kimi_k3.py, takes ``[:, 0, :, 0]`` of them)."""
    for name in [name for name in tensors if name.endswith("weight_scale_inv")]:
        scale = tensors.pop(name)
        tensors[name.removesuffix("_inv")] = scale[:, None, :, None]
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "FP8_PB_WO",
        "exclude_modules": ["lm_head"],
    }


def recipe_of(folder: Path) -> Path:
    write_tiny(folder / "bf16", LLAMA, "bf16")
    write_tiny(folder / "opt", LLAMA, "fp8_block", edit=in_four_dimensions)
    recipe = folder / "recipe.yaml"
    recipe.write_text("model: bf16\nsources: {bf16: bf16, opt: opt}\ndefault: opt\n")
    return recipe


def scales_of(folder: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """The shape and the bytes of every scale."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            for name in [name for name in file.keys() if name.endswith("weight_scale")]:  # noqa: SIM118
                array = file.get_tensor(name)
                found[name] = array.shape, array.tobytes()
    return found


@pytest.mark.parametrize("link", [False, True])
def test_block_scales_in_four_dimensions_are_those_in_two(tmp_path: Path, link: bool) -> None:
    plan = plan_recipe(recipe_of(tmp_path), link=link)
    assert plan.modules["model.layers.0.mlp.up_proj"].format == Fp8("block", "dynamic", (128, 128), "weight_scale")
    assert all(shard.link is None for shard in plan.shards)  # a link would keep the other shape
    run_plan(plan, tmp_path / "out")
    source, out = (scales_of(tmp_path / name) for name in ("opt", "out"))
    assert source.keys() == out.keys() and source
    for name, (shape, data) in source.items():
        assert len(shape) == 4
        assert out[name] == (shape[::2], data)
    assert not verify(tmp_path / "out").differences


def test_they_mean_the_same_weight(tmp_path: Path) -> None:
    recipe_of(tmp_path)
    write_tiny(tmp_path / "plain", LLAMA, "fp8_block")
    opt, plain = (open_source(str(tmp_path / name)) for name in ("opt", "plain"))
    name = "model.layers.1.self_attn.k_proj"
    np.testing.assert_array_equal(opt.dequantize(name), plain.dequantize(name))


@pytest.mark.parametrize("shape", [(2, 2, 1, 1), (1, 2, 1, 1), (2, 1, 1, 2)])
def test_other_shapes_of_four_dimensions_are_refused_by_name(tmp_path: Path, shape: tuple[int, ...]) -> None:
    def edit(tensors: Tensors, config: Config) -> None:
        in_four_dimensions(tensors, config)
        tensors["model.layers.0.mlp.up_proj.weight_scale"] = np.ones(shape, np.float32)

    write_tiny(tmp_path / "opt", LLAMA, "fp8_block", edit=edit)
    found = open_source(str(tmp_path / "opt")).formats["model.layers.0.mlp.up_proj"]
    assert isinstance(found, FormatError)
    assert "FP8_PB_WO" in str(found) and "take this module from" in str(found)


# Modules left out


EXCLUDED: list[tuple[Tiny, list[str]]] = [
    (LLAMA, ["lm_head"]),
    (LLAMA, ["lm_head", "model.layers.1*"]),
    (LLAMA, ["*.self_attn*", "lm_head"]),
    (LLAMA, ["model.layers.0.mlp.[gu]*_proj"]),
    (QWEN3_MOE, ["lm_head", "*.mlp.gate", "model.layers.0.mlp.experts.3*"]),
    (QWEN3_MOE, ["lm_head", "*gate", "model.layers.?.self_attn*"]),
]


@pytest.mark.parametrize("alone", [False, True], ids=["in config.json", "in a file of its own"])
@pytest.mark.parametrize(("model", "patterns"), EXCLUDED)
def test_exclude_modules_by_its_own_rule(tmp_path: Path, model: Tiny, patterns: list[str], alone: bool) -> None:
    """ModelOpt matches names with ``fnmatch`` (``torch/export``): what is written by that rule is read so."""

    def edit(tensors: Tensors, config: Config) -> None:
        block = {"quant_algo": "FP8", "exclude_modules": patterns, "kv_cache_quant_algo": None}
        config["quantization_config"] = {"quant_method": "modelopt", **block}
        if alone:
            del config["quantization_config"]

    write_tiny(tmp_path / "opt", model, "fp8_tensor", edit=edit, skip=patterns, activations="static")
    if alone:
        block = {"quant_algo": "FP8", "exclude_modules": patterns, "kv_cache_quant_algo": None}
        content = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": block}
        (tmp_path / "opt" / "hf_quant_config.json").write_text(json.dumps(content))
    source = open_source(str(tmp_path / "opt"))
    linears = [name for name in source.checkpoint.modules if name.endswith("_proj") or ".experts." in name]
    excluded = {name for name in linears if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}
    kinds = {name: source.format_of(name).kind for name in linears}
    assert {name for name, kind in kinds.items() if kind == "bf16"} == excluded
    assert {kind for name, kind in kinds.items() if name not in excluded} == {"fp8_tensor"}


def test_layers_listed_one_by_one(tmp_path: Path) -> None:
    """``quantized_layers`` of a mixed checkpoint: each is what its tensors are, and what is listed agrees."""
    listed: dict[str, Any] = {}

    def edit(tensors: Tensors, config: Config) -> None:
        listed.update({n.rpartition(".")[0]: {"quant_algo": "FP8"} for n in tensors if n.endswith(".weight_scale")})
        config["quantization_config"] = {
            "quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": listed,
        }  # fmt: skip

    write_tiny(tmp_path / "opt", LLAMA, "fp8_tensor", edit=edit, skip=["model.layers.1*"], activations="static")
    source = open_source(str(tmp_path / "opt"))
    assert {name for name in source.checkpoint.modules if source.format_of(name).kind == "fp8_tensor"} == set(listed)
    assert all(name.startswith("model.layers.0.") for name in listed)
