"""Both loaders load scales under other producers' names, and in other dtypes, into SGLang's parameters."""

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


# Powers of two, in E8M0 or in bytes
EXPONENTS: dict[str, tuple[Shape, dict[str, str]]] = {
    "llama": (
        LLAMA.of(layers=3),
        {"model.layers.0.*": "fp8_bytes", "model.layers.1.*": "fp8_e8m0_32", "model.layers.2.*": "fp8_e8m0"},
    ),
    "qwen3_moe": (
        QWEN3_MOE.of(layers=2),
        {"model.layers.*.self_attn.*": "fp8_e8m0", "model.layers.*.mlp.experts.*": "fp8_bytes",
         "model.layers.1.mlp.experts.{1..3}.*": "fp8_e8m0_32", "model.layers.1.mlp.experts.4.*": "fp8_e8m0"},
    ),
    "deepseek": (
        DEEPSEEK.of(layers=2),
        {"model.layers.*.self_attn.{q_a,q_b,o}_proj": "fp8_bytes", "model.layers.1.mlp.experts.*": "fp8_e8m0_32",
         "model.layers.*.self_attn.kv_a_proj_with_mqa": "fp8_bytes", "model.layers.1.mlp.shared_experts.*": "fp8_e8m0"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPONENTS)
def test_exponents_are_loaded_as_the_scales_that_they_are(folder: Path, tmp_path: Path, name: str) -> None:
    shape, lines = EXPONENTS[name]
    variants = ["bf16", "fp8_bytes", "fp8_e8m0", "fp8_e8m0_32"]
    out = build(sources(folder, shape, variants), lines, tmp_path / "out")
    stored = tensors_of(out)
    assert {t.dtype for n, t in stored.items() if "scale" in n} == {torch.uint8, torch.float8_e8m0fnu}
    own, stock = (filled(serve(out, **options)) for options in ({}, {"load_format": "safetensors"}))
    assert own.keys() == stock.keys()
    assert [n for n in own if not torch.equal(bits(own[n]), bits(stock[n]))] == []
    scales = {n: tensor for n, tensor in stock.items() if n.endswith("weight_scale_inv")}
    assert scales and {tensor.dtype for tensor in scales.values()} == {torch.float32}
    if name == "llama":
        for module in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"):
            leaf = next(n for n in stored if n.startswith(f"{module}.") and "scale" in n)
            due = torch.exp2(stored[leaf].view(torch.uint8).float() - 127)
            assert torch.equal(scales[f"{module}.weight_scale_inv"], due)


def filled(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.data for name, p in model.named_parameters() if p.numel()}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
