"""Formats that are not read do not pass for buffers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.write import LLAMA, Config, Tensors, write_tiny

from mixprec_build.checkpoint.typed import open_source
from mixprec_build.errors import SourceError
from mixprec_build.formats.base import FormatError
from mixprec_build.output.build import plan_recipe


@pytest.mark.parametrize(
    ("declared", "leaves", "said"),
    [
        ({"quant_method": "exl3", "bits": 4}, {"trellis": "i2", "suh": "f2", "svh": "f2"}, "quant_method 'exl3'"),
        ({"quant_method": "hqq"}, {"W_q": "u1", "scale": "f2"}, "quant_method 'hqq'"),
        ({"quant_method": "torchao"}, {"weight_qdata": "i1", "scale": "f4"}, "quant_method 'torchao'"),
        ({"quant_method": "spqr"}, {"dense_weights": "i4"}, "quant_method 'spqr'"),
        (
            {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-24-bitmask"}},
            {"bitmask": "u1", "compressed": "f2"},
            "sparse-24-bitmask",
        ),
        (None, {"Qidxs": "i2", "SU": "f2"}, "part of a linear in a format that mixprec does not know"),
    ],
)
def test_integers_of_another_format_are_no_buffers(
    tmp_path: Path, declared: Config | None, leaves: dict[str, str], said: str
) -> None:
    def edit(tensors: Tensors, config: Config) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            n, k = tensors.pop(name).shape
            for leaf, dtype in leaves.items():
                tensors[name.replace("weight", leaf)] = np.ones((n, k // 4), dtype)
        if declared is not None:
            config["quantization_config"] = declared

    write_tiny(tmp_path / "other", LLAMA, "bf16", edit=edit)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: other\nsources: {q: other}\n")
    with pytest.raises(SourceError, match=said):
        plan_recipe(recipe)


def test_buffers_of_models_are_still_buffers(tmp_path: Path) -> None:
    def edit(tensors: Tensors, config: Config) -> None:
        tensors["model.position_ids"] = np.arange(8).reshape(1, 8)
        tensors["model.layers.0.mlp.gate.tid2eid"] = np.zeros((4, 2), np.int64)
        config["quantization_config"] = {"quant_method": "bitnet"}

    write_tiny(tmp_path / "a", LLAMA, "bf16", edit=edit)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: a\nsources: {q: a}\n")
    assert "model.position_ids" in plan_recipe(recipe).modules


def test_a_buffer_of_the_same_shape_does_not_speak_for_a_weight(tmp_path: Path) -> None:
    def edit(tensors: Tensors, config: Config) -> None:
        tensors["model.position_ids"] = np.zeros((4, 2), np.int64)
        tensors["model.layers.0.mlp.up_proj.W_q"] = np.zeros((4, 2), np.int64)

    write_tiny(tmp_path / "a", LLAMA, "bf16", edit=edit)
    source = open_source(str(tmp_path / "a"))
    assert source.known_format("model.position_ids") is not None
    assert isinstance(source.formats["model.layers.0.mlp.up_proj.W_q"], FormatError)


@pytest.mark.parametrize(
    ("declared", "leaves", "said"),
    [
        ({"quant_method": "bitsandbytes"}, {"weight": "u1"}, "stored as bitsandbytes (weight U8"),
        ({"quant_method": "bitnet"}, {"weight": "u1", "weight_scale": "f4"}, "stored as BitNet (weight U8"),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}, {"weight": "u1"}, "stored as ModelOpt's 'W4A16_AWQ'"),
        ({"quant_method": "bitsandbytes"}, {"weight": "i1", "SCB": "f4"}, "stored as bitsandbytes (SCB F32"),
        ({"quant_method": "another"}, {"weight": "u1"}, "stored as the method 'another' (weight U8"),
    ],
)
def test_the_declared_method_names_a_format(
    tmp_path: Path, declared: Config, leaves: dict[str, str], said: str
) -> None:
    def edit(tensors: Tensors, config: Config) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            n, k = tensors.pop(name).shape
            for leaf, dtype in leaves.items():
                shape = (n, k // 2) if leaf == "weight" else (n,)
                tensors[name.replace("weight", leaf)] = np.ones(shape, dtype)
        config["quantization_config"] = declared

    write_tiny(tmp_path / "other", LLAMA, "bf16", edit=edit)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: other\nsources: {q: other}\n")
    with pytest.raises(SourceError) as caught:
        plan_recipe(recipe)
    assert said in str(caught.value)


def test_scales_of_mistrals_own_layout_are_named(tmp_path: Path) -> None:
    """Whatever ``config.json`` says beside them: SGLang's classes rename them from other names of modules alone."""

    def edit(tensors: Tensors, config: Config) -> None:
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            tensors[name.replace("weight_scale", "qscale_weight")] = tensors.pop(name)
            tensors[name.replace("weight_scale", "qscale_act")] = np.ones((), np.float32)
        config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}

    write_tiny(tmp_path / "a", LLAMA, "fp8_tensor", edit=edit)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: a\nsources: {q: a}\n")
    with pytest.raises(
        SourceError, match=r"stored as Mistral's static FP8 .*take the release in Hugging Face's layout"
    ):
        plan_recipe(recipe)
