"""Both loaders load scales under other producers' names into SGLang's parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.serving import DEEPSEEK, LLAMA, QWEN3_MOE, Shape
from support.sglang.harness import build, serve, sources, tensors_of

pytestmark = pytest.mark.usefixtures("sglang")

MIXES: dict[str, tuple[Shape, dict[str, str]]] = {
    "llama": (
        LLAMA.of(layers=2),
        {"model.layers.0.*": "fp8_block_scale", "model.layers.1.*": "fp8_static"},
    ),
    "qwen3_moe": (
        QWEN3_MOE.of(layers=2),
        {"model.layers.*.self_attn.*": "fp8_static", "model.layers.*.mlp.experts.*": "fp8_block_scale",
         "model.layers.1.mlp.experts.{1..3}.*": "fp8_static"},
    ),
    "deepseek": (
        DEEPSEEK.of(layers=2),
        {"model.layers.*.self_attn.{q_b,o}_proj": "fp8_block_scale", "model.layers.1.mlp.experts.*": "fp8_static",
         "model.layers.1.mlp.shared_experts.*": "fp8_block_scale"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXES)
def test_both_loaders_fill_the_same_parameters(folder: Path, tmp_path: Path, name: str) -> None:
    shape, lines = MIXES[name]
    out = build(sources(folder, shape, ["bf16", "fp8_block_scale", "fp8_static"]), lines, tmp_path / "out")
    leaves = {tensor.rpartition(".")[2] for tensor in tensors_of(out)}
    assert {"scale", "weight_scale_inv", "activation_scale"} <= leaves  # kept as their producers wrote them
    own, stock = (filled(serve(out, **options)) for options in ({}, {"load_format": "safetensors"}))
    assert own.keys() == stock.keys()
    assert [n for n in own if not torch.equal(bits(own[n]), bits(stock[n]))] == []
    scales = [tensor for n, tensor in stock.items() if "input_scale" in n]
    assert scales and all((scale == 0.25).all() for scale in scales)


def filled(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.data for name, p in model.named_parameters() if p.numel()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
