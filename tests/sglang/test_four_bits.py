"""4-bit floats, and W4AFP8, in SGLang's own models: linears, fused ones, shared and routed experts, on all ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.formats import dequantize
from support.serving import DEEPSEEK, LLAMA, QWEN2_MOE, Shape
from support.sglang.harness import build, rank_of, serve, sources, tensors_of

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.output.split import split

EXPERTS = 8
# Large enough for two ranks
SIZES = {"layers": 2, "intermediate": 512, "expert_intermediate": 256, "experts": EXPERTS, "head_dim": 128}
VARIANTS = ["bf16", "fp8_block", "nvfp4", "nvfp4_weights", "ct_nvfp4", "w4afp8"]
MIXES: dict[str, tuple[Shape, dict[str, str]]] = {
    "llama": (
        LLAMA.of(**{**SIZES, "experts": 0}),
        {"model.layers.0.self_attn.*": "ct_nvfp4", "model.layers.0.mlp.*": "nvfp4",
         "model.layers.1.self_attn.*": "nvfp4_weights", "model.layers.1.mlp.down_proj": "ct_nvfp4"},
    ),
    "qwen2_moe": (
        QWEN2_MOE.of(**{**SIZES, "head_dim": 64}),
        {"model.layers.*.self_attn.*": "nvfp4", "model.layers.*.mlp.shared_expert.*": "ct_nvfp4",
         "model.layers.0.mlp.experts.*": "w4afp8", "model.layers.1.mlp.experts.*": "nvfp4",
         "model.layers.1.mlp.experts.{0..1}.*": "fp8_block", "model.layers.1.mlp.experts.{2,6}.*": "w4afp8",
         "model.layers.1.mlp.experts.{3,7}.*": "ct_nvfp4", "model.layers.1.mlp.experts.4.down_proj": "bf16"},
    ),
    "deepseek": (
        DEEPSEEK.of(**SIZES),
        {"model.layers.*.self_attn.o_proj": "nvfp4", "model.layers.0.mlp.*": "ct_nvfp4",
         "model.layers.1.mlp.shared_experts.*": "fp8_block", "model.layers.1.mlp.experts.*": "w4afp8"},
    ),
}  # fmt: skip
METHODS = {
    "bf16": ("UnquantizedLinearMethod", "UnquantizedFusedMoEMethod"),
    "fp8_block": ("Fp8LinearMethod", "Fp8MoEMethod"),
    "nvfp4": ("ModelOptNvFp4A16LinearMethod", "ModelOptNvFp4FusedMoEMethod"),
    "ct_nvfp4": ("ModelOptNvFp4A16LinearMethod", "ModelOptNvFp4FusedMoEMethod"),
    "w4afp8": ("", "W4AFp8MoEMethod"),
}
VALUES = {"weight", "weight_packed"}
JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@pytest.fixture(autouse=True)
def hopper(sglang: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's classes for NVFP4 ask for the GPU when they are made."""
    from sglang.srt.layers.quantization import modelopt_quant

    monkeypatch.setattr(modelopt_quant, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(modelopt_quant, "is_cuda", lambda: True)
    monkeypatch.setattr(modelopt_quant, "swizzle_blockscale", lambda scale: scale.new_empty(0))  # on a GPU


@pytest.fixture(scope="module")
def built(folder: Path) -> Any:
    def build_once(name: str) -> Path:
        out = folder / f"four-{name}"
        if not out.exists():
            shape, lines = MIXES[name]
            variants = VARIANTS if shape.experts else VARIANTS[:-1]
            build(sources(folder, shape, variants), lines, out)
        return out

    return build_once


def filled(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that tensors of the checkpoint fill."""
    from mixprec_runtime.loading.strict import may_be_empty

    empty = may_be_empty(model)
    return {name: p.data for name, p in model.named_parameters() if p.numel() and not empty(name)}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", MIXES)
def test_all_loaders_fill_the_same_parameters(built: Any, tmp_path: Path, name: str, tp: int) -> None:
    """SGLang's, mixprec's from merged files, and from a rank's own."""
    out = built(name)
    own = Path(shutil.copytree(out, tmp_path / "own"))
    split(own, Degree(tp), layout="presplit")
    for rank in range(tp):
        with rank_of(rank, tp):
            stock = filled(serve(out, load_format="safetensors"))
            others = [filled(serve(files)) for files in (out, own)]
        for other in others:
            assert other.keys() == stock.keys()
            assert [n for n in stock if not torch.equal(bits(other[n]), bits(stock[n]))] == []


@pytest.mark.parametrize("name", MIXES)
def test_each_layer_has_sglangs_method_and_the_stored_values(built: Any, name: str) -> None:
    from sglang.srt.layers.linear import LinearBase

    from mixprec_runtime import memory
    from mixprec_runtime.cpu import reference
    from mixprec_runtime.formats.registry import served
    from mixprec_runtime.native import format_of

    out = built(name)
    stored: dict[str, dict[str, torch.Tensor]] = {}
    for tensor_name, tensor in tensors_of(out).items():
        module, _, leaf = tensor_name.rpartition(".")
        stored.setdefault(module, {})[leaf] = tensor
    meant = {module: dequantize(tensors) for module, tensors in stored.items() if tensors.keys() & VALUES}
    model, seen = serve(out), set()
    # In 16 bits every value takes two bytes, as the biases of these models do.
    in_16_bits = memory.measure(model)["bf16_mb"] * 2**20
    values = sum(weight.numel() for weight in meant.values())
    values += sum(t.numel() for tensors in stored.values() for leaf, t in tensors.items() if leaf.endswith("bias"))
    assert in_16_bits == pytest.approx(2 * values, rel=1e-3)
    for path, layer in list(model.named_modules()):
        fmt, method = format_of(layer), type(getattr(layer, "quant_method", None)).__name__
        if fmt is None or not fmt.quantized:
            continue
        seen.add(fmt.kind)
        if isinstance(layer, LinearBase):
            assert method == METHODS[fmt.kind][0], path
            parent, _, last = path.rpartition(".")
            due = torch.cat([meant[f"{parent}.{part}"] for part in JOINED.get(last, (last,))])
            reference._dequantize_linear(layer, fmt, served(fmt).as_stored)
            torch.testing.assert_close(layer.weight.data, due.to(layer.weight.dtype), rtol=0, atol=0)
        else:
            assert method == METHODS[fmt.kind][1], path
    assert seen == {variant.removesuffix("_weights") for variant in MIXES[name][1].values()} - {"bf16"}
    for path, layer in list(model.named_modules()):
        if path.endswith(".experts"):
            compare_experts(path, layer, meant)


def compare_experts(path: str, layer: Any, meant: dict[str, torch.Tensor]) -> None:
    """The dequantized weights of a layer's experts, in their groups; those of one projection are left out."""
    from mixprec_runtime.cpu import reference
    from mixprec_runtime.formats.registry import served
    from mixprec_runtime.native import format_of

    groups = list(getattr(layer, "groups", None) or [layer])
    for group in groups:
        fmt = format_of(group)
        if fmt is not None and fmt.quantized and not getattr(group, "projection", ""):
            group.params_dtype = torch.bfloat16  # 0.5.15's FusedMoE has none
            reference._dequantize_experts(group, fmt, served(fmt).as_stored)
    for weight, parts in (("w13", ("gate_proj", "up_proj")), ("w2", ("down_proj",))):
        numbers = getattr(layer, "up_numbers" if weight == "w13" else "down_numbers", None)
        rows = [[*range(EXPERTS)]] if numbers is None else numbers.tolist()
        having = [group for group in groups if getattr(group, "projection", "") in ("", weight)]
        for expert in range(EXPERTS):
            group, number = next((one, row[expert]) for one, row in zip(having, rows, strict=True) if row[expert] >= 0)
            if not getattr(group, "projection", ""):
                found = getattr(group, f"{weight}_weight")[number]
                due = torch.cat([meant[f"{path}.{expert}.{part}"] for part in parts])
                torch.testing.assert_close(found, due.to(found.dtype), rtol=0, atol=0)
