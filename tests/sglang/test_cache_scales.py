"""Both loaders load scales of an FP8 KV cache into the attention of all models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support.serving import DEEPSEEK, LLAMA, MIXTRAL, QWEN3_MOE, Shape
from support.sglang.harness import build, change_tensors, serve, sources

pytestmark = pytest.mark.usefixtures("sglang")

SHAPES = {"llama": LLAMA, "mixtral": MIXTRAL, "qwen3_moe": QWEN3_MOE, "deepseek": DEEPSEEK}


def with_scales(source: Path, home: Path, names: tuple[str, ...], layers: int) -> Path:
    """A copy of a checkpoint with scales in each attention: 0.25 in the first layer, 0.5 in the second, and so on."""
    shutil.copytree(source, home)
    scales = {
        f"model.layers.{layer}.self_attn.{name}": torch.tensor(0.25 * (layer + 1))
        for layer in range(layers)
        for name in names
    }
    change_tensors(home, lambda tensors: tensors.update(scales))
    return home


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ("k_proj.k_scale", "v_proj.v_scale")),
        ("llama", ("kv_scale",)),
        ("mixtral", ("k_scale", "v_scale")),
        ("qwen3_moe", ("k_proj.output_scale", "v_proj.output_scale")),
        ("deepseek", ("k_proj.k_scale", "v_proj.v_scale")),
    ],
)
def test_scales_reach_attention(
    folder: Path, tmp_path: Path, family: str, names: tuple[str, ...], load_format: str
) -> None:
    shape: Shape = SHAPES[family]
    source = with_scales(sources(folder, shape)["bf16"], tmp_path / "bf16", names, shape.layers)
    model = serve(build({"bf16": source}, {}, tmp_path / "out"), load_format=load_format)
    modules = dict(model.named_modules())
    for layer in range(shape.layers):
        last = "attn_mqa" if family == "deepseek" else "attn"
        attention = modules[f"model.layers.{layer}.self_attn.{last}"]
        attention.quant_method.process_weights_after_loading(attention)
        assert (attention.k_scale_float, attention.v_scale_float) == (0.25 * (layer + 1),) * 2


def test_attention_of_a_source_without_scales_is_left_as_sglang_makes_it(folder: Path, tmp_path: Path) -> None:
    paths = sources(folder, LLAMA)
    source = with_scales(paths["bf16"], tmp_path / "bf16", ("k_scale", "v_scale"), LLAMA.layers)
    lines = {"model.layers.0.self_attn.*": "fp8_block"}
    model = serve(build({"bf16": source, "fp8_block": paths["fp8_block"]}, lines, tmp_path / "out"))
    modules = dict(model.named_modules())
    assert modules["model.layers.0.self_attn.attn"].k_scale is None
    assert modules["model.layers.1.self_attn.attn"].k_scale.item() == 0.5
