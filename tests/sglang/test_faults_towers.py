"""Multimodal models with their vision tower: strict loading accepts what the planner accepts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import formats
from support.sglang.harness import build, serve, tensors_of

pytestmark = pytest.mark.usefixtures("sglang")

TEXT = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
}  # fmt: skip
VISION = {
    "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 256, "patch_size": 14,
    "spatial_merge_size": 2, "fullatt_block_indexes": [0], "window_size": 112,
}  # fmt: skip


CHANNELS = {
    "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head", "re:.*visual.*"],
    "config_groups": {"group_0": {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True},
    }},
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def paths(folder: Path) -> dict[str, Path]:
    """Qwen2.5-VL as transformers writes it, and with its decoder in FP8 by channels."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    home = folder / "qwen2.5-vl"
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION)).bfloat16()
    model.save_pretrained(home / "bf16")
    quantized: Tensors = {}
    for name, tensor in tensors_of(home / "bf16").items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and name.startswith("model.layers.") and module.endswith("_proj"):
            made = formats.fp8_channel(tensor.float(), scale_dtype=torch.bfloat16)
            quantized |= {f"{module}.{part}": value for part, value in made.items()}
        else:
            quantized[name] = tensor
    config = json.loads((home / "bf16/config.json").read_text())
    (home / "fp8").mkdir()
    (home / "fp8/config.json").write_text(json.dumps({**config, "quantization_config": CHANNELS}))
    save_file(quantized, home / "fp8/model.safetensors", metadata={"format": "pt"})
    return {"bf16": home / "bf16", "fp8": home / "fp8"}


MIX = {"model.layers.0.*": "fp8", "model.layers.1.mlp.*": "fp8"}


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
def test_a_mix_of_a_multimodal_model_is_loaded_with_its_tower(
    paths: dict[str, Path], tmp_path: Path, load_format: str
) -> None:
    checkpoint = build(paths, MIX, tmp_path / "out")
    stored, parameters = tensors_of(checkpoint), dict(serve(checkpoint, load_format=load_format).named_parameters())
    dtypes = {
        name: parameters[f"model.layers.{name}.weight"].dtype
        for name in ("0.self_attn.qkv_proj", "0.mlp.down_proj", "1.self_attn.qkv_proj", "1.mlp.gate_up_proj")
    }
    assert dtypes == {
        "0.self_attn.qkv_proj": torch.float8_e4m3fn, "0.mlp.down_proj": torch.float8_e4m3fn,
        "1.self_attn.qkv_proj": torch.bfloat16, "1.mlp.gate_up_proj": torch.float8_e4m3fn,
    }  # fmt: skip
    for name in (
        "model.layers.0.mlp.down_proj.weight",
        "visual.merger.mlp.0.weight",
        "visual.blocks.1.attn.proj.weight",
    ):
        assert torch.equal(parameters[name].view(torch.uint8), stored[name].view(torch.uint8)), name


@pytest.mark.parametrize("lacking", ["visual.blocks.1.attn.proj.weight", "model.layers.1.self_attn.q_proj.bias"])
def test_what_a_multimodal_model_lacks_stops_the_server(paths: dict[str, Path], tmp_path: Path, lacking: str) -> None:
    source = shutil.copytree(paths["bf16"], tmp_path / "bf16")
    tensors = tensors_of(source)
    del tensors[lacking]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    checkpoint = build({"bf16": source}, {}, tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"(proj\.weight|qkv_proj\.bias): parameters that were not filled"):
        serve(checkpoint)
