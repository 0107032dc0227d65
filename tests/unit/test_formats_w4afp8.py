"""W4AFP8 against ml_dtypes' 4-bit integers and ModelOpt's packer of them, exactly; and which mixes it may be in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import formats
from support.oracles import Stated, modelopt_int4, stated, stated_of
from support.serving import QWEN3_MOE, write_sources

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.checkpoint.typed import open_source
from mixprec_build.errors import RefusedError
from mixprec_build.formats.base import FormatError
from mixprec_build.formats.registry import format_from_json, recognise
from mixprec_build.formats.w4afp8 import W4afp8
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.split import split

Config = dict[str, Any]

CONFIG: Config = {"quant_method": "w4afp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
BARE: Config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}


def w4afp8(n: int, k: int, **changed: Stated | None) -> dict[str, Stated]:
    tensors: dict[str, Stated | None] = {
        "weight": ("I8", (n, k // 2)),
        "weight_scale_inv": ("F32", (n, k // 128)),
        "input_scale": ("F32", (1,)),
    }
    return {leaf: tensor for leaf, tensor in (tensors | changed).items() if tensor is not None}


def test_all_codes_are_those_of_ml_dtypes() -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(2, 128)
    fours = np.stack([codes & 15, codes >> 4], -1).reshape(2, 256).view(ml_dtypes.int4)
    stored = {"weight": codes.view(np.int8), "weight_scale_inv": np.ones((2, 2), np.float32)}
    np.testing.assert_array_equal(W4afp8().dequantize(stored), fours.astype(np.float32))


@pytest.mark.parametrize("seed", range(3))
def test_what_modelopt_packs(seed: int) -> None:
    """ModelOpt packs pairs of outputs, and TensorRT-LLM pairs of inputs, in the same order."""
    values = torch.randint(-8, 8, (64, 256), generator=torch.Generator().manual_seed(seed)).float()
    scale = torch.rand(64, 2, generator=torch.Generator().manual_seed(seed)).bfloat16()
    packed = modelopt_int4(values.t()).t().contiguous().view(torch.int8)
    arrays = {
        "weight": packed.numpy(),
        "weight_scale_inv": scale.float().numpy(),
        "input_scale": np.ones(1, np.float32),
    }
    found = recognise(stated_of(arrays), CONFIG)
    assert found == W4afp8() == format_from_json(json.loads(json.dumps(found.to_json())))
    due = values * scale.float().repeat_interleave(128, 1)
    np.testing.assert_array_equal(found.dequantize(arrays), due.numpy())
    # The tests' own packer writes the same bytes, of values whose largest is 7.
    values = values.clamp(min=-7).index_fill(1, torch.tensor([0, 128]), 7.0)
    made = formats.w4afp8(values)
    assert torch.equal(made["weight"], modelopt_int4(values.t()).t().view(torch.int8))


@pytest.mark.parametrize("config", [CONFIG, BARE, {"quant_method": "w4afp8"}], ids=["blocks", "modelopt", "alone"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_what_is_sound_is_recognised(config: Config, dtype: str) -> None:
    module = stated(w4afp8(256, 512, weight_scale_inv=(dtype, (256, 4)), input_scale=(dtype, ())))
    assert recognise(module, config) == W4afp8()
    assert W4afp8().shape(module) == (256, 512)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (w4afp8(256, 512, input_scale=None), "w4afp8 needs input_scale, the scale that its activations are quantized"),
        (w4afp8(256, 448, weight_scale_inv=("F32", (256, 4))), "448 inputs are no multiple of the group of 128"),
        (w4afp8(256, 512, weight_scale_inv=("F32", (256, 8))),
         "weight_scale_inv F32 [256, 8]: [256, 4] was expected for 256 outputs and 512 inputs in groups of 128"),
        (w4afp8(256, 512, input_scale=("F32", (2,))), "input_scale F32 [2]: [1] was expected"),
        (w4afp8(256, 512, pre_quant_scale=("BF16", (512,))), "pre_quant_scale BF16 [512]: inputs of this W4AFP8"),
        (w4afp8(256, 512, weight_zero_point=("I8", (256, 4))), "weight_zero_point I8 [256, 4] does not belong"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(tensors: dict[str, Stated], message: str) -> None:
    with pytest.raises(FormatError, match="^" + re.escape(message)):
        recognise(stated(tensors), {"quant_method": "w4afp8"})


def test_limits() -> None:
    fmt = W4afp8()
    expert = [stated(w4afp8(n, k)) for n, k in ((128, 256), (128, 256), (256, 128))]
    assert fmt.expert_limits(expert, 256, 128) == []
    assert fmt.expert_limits(expert, 192, 64) == [
        "its hidden size 192 is no multiple of 128, which SGLang's W4AFP8 kernel needs",
        "its intermediate size 64 is no multiple of 128, which SGLang's W4AFP8 kernel needs",
    ]
    assert fmt.linear_limits(expert[:1]) == ["SGLang has a kernel for experts in W4AFP8, and none for other linears"]
    names = ("e.gate_proj", "e.up_proj")
    values = {"e.gate_proj.input_scale": 0.5, "e.up_proj.input_scale": 0.25}
    parts = [stated(w4afp8(128, 256), name) for name in names]

    def reader(info: Any) -> np.ndarray[Any, Any]:
        return np.array([values[info.name]], np.float32)

    (limit,) = fmt.value_limits(parts, reader, experts=True)
    assert limit.startswith("input_scale differs between gate_proj and up_proj, which have one input, and SGLang would")
    assert fmt.value_limits(parts[:1], reader, experts=True) == []


# Checkpoints

SHAPE = QWEN3_MOE.of(layers=2, experts=4, hidden=256, expert_intermediate=256, vocab=64, head_dim=128)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_sources(tmp_path_factory.mktemp("w4afp8"), SHAPE, ["bf16", "fp8_block", "w4afp8"])


def plan(folder: Path, sources: dict[str, Path], *lines: str) -> Any:
    text = [f"model: {sources['bf16']}", "sources:", *(f"  s_{name}: {path}" for name, path in sources.items())]
    recipe = folder / "recipe.yaml"
    recipe.write_text("\n".join([*text, "default: s_bf16", "weights:", *(f"  '{line}" for line in lines)]))
    return plan_recipe(recipe)


def test_experts_beside_block_fp8_and_what_is_unquantized(sources: dict[str, Path], tmp_path: Path) -> None:
    """Each module is served as it is stored; SGLang's own config would take all linears for block FP8."""
    out = tmp_path / "out"
    lines = "*.self_attn.{q,k,v}_proj': s_w4afp8", "*.experts.*': s_w4afp8", "*.1.mlp.experts.3.*': s_fp8_block"
    made = plan(tmp_path, sources, *lines)
    run_plan(made, out)
    kinds = {name: module.format.kind for name, module in made.modules.items()}
    layer = "model.layers.1"
    assert kinds[f"{layer}.self_attn.q_proj"] == kinds[f"{layer}.mlp.experts.3.up_proj"] == "fp8_block"
    assert kinds[f"{layer}.self_attn.o_proj"] == "bf16"
    assert kinds[f"{layer}.mlp.experts.0.down_proj"] == "w4afp8"
    # Cut for ranks, and put together again
    before = {path.name: path.read_bytes() for path in out.glob("*.safetensors")}
    split(out, Degree(2), layout="presplit")
    assert not list(out.glob("*.safetensors"))
    split(out, Degree(2), layout="both")
    assert {path.name: path.read_bytes() for path in out.glob("*.safetensors")} == before


def test_an_expert_is_in_it_with_all_its_projections(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as refused:
        plan(tmp_path, sources, "*.experts.*': s_w4afp8", "*.0.mlp.experts.1.down_proj': s_bf16")
    (problem,) = refused.value.problems
    assert problem.code == "fused_formats"
    assert "SGLang runs gate, up and down of an expert in w4afp8 as one, so they must share it, but" in str(problem)
    (line,) = problem.fix.add
    assert (line.pattern, line.source) == ("model.layers.0.mlp.experts.1.down_proj", "s_w4afp8")
    plan(tmp_path, sources, "*.experts.*': s_w4afp8", f"{line.pattern}': {line.source}")


def test_scales_of_inputs_by_other_names_are_those_of_the_weights(tmp_path: Path) -> None:
    """TensorRT-LLM's script names them after DeepSeek's own modules, in a file of their own."""
    block = "model.layers.0.mlp.experts.0"
    made = {part: formats.w4afp8(torch.randn(128, 128)) for part in ("gate_proj", "up_proj", "down_proj")}
    made["gate_proj"]["input_scale"] = torch.tensor([3.0])
    weights = {
        f"{block}.{part}.{leaf}": tensor
        for part, tensors in made.items()
        for leaf, tensor in tensors.items()
        if leaf != "input_scale"
    }
    words = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    scales = {f"{block}.{word}.input_scale": made[part]["input_scale"] for word, part in words.items()}
    save_file(weights, tmp_path / "model-1.safetensors")
    save_file(scales, tmp_path / "input_scales.safetensors")
    files = dict.fromkeys(weights, "model-1.safetensors") | dict.fromkeys(scales, "input_scales.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3", "architectures": []}))
    quantization = {"quantization": {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(quantization))
    source = open_source(str(tmp_path))
    assert {name: fmt.kind for name, fmt in source.formats.items()} == {f"{block}.{part}": "w4afp8" for part in made}
    gate = source.checkpoint.modules[f"{block}.gate_proj"].tensors["input_scale"]
    assert gate.name == f"{block}.gate_proj.input_scale"
    assert source.checkpoint.read(gate).tolist() == [3.0]
    assert source.checkpoint.taken_apart == {"input_scales.safetensors"}
