"""The stand-in checkpoints are what they claim: real names, shapes, dtypes and sizes, without the bytes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from support.hollow import MODELS, VARIANTS, Tensor, hollow_config, hollow_tensors, write_hollow

MOE = [model for model, config in MODELS.items() if "moe_intermediate_size" in config.get("text_config", config)]


def shrunk(model: str) -> dict[str, int]:
    return {"layers": 2, "experts": 4} if model in MOE else {"layers": 2}


def headers(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder as the safetensors library reads it."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
                view = file.get_slice(name)
                tensors[name] = Tensor(name, view.get_dtype(), tuple(view.get_shape()))
    return tensors


def load(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
def test_safetensors_reads_what_the_tables_say(tmp_path: Path, model: str, variant: str) -> None:
    folder = write_hollow(tmp_path / "out", model, variant, **shrunk(model), shard_bytes=500_000_000)
    expected = {tensor.name: tensor for tensor in hollow_tensors(model, variant, **shrunk(model))}
    assert headers(folder) == expected

    index = load(folder / "model.safetensors.index.json")
    assert index["weight_map"].keys() == expected.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert set(index["weight_map"].values()) == {path.name for path in folder.glob("*.safetensors")}
    assert load(folder / "config.json") == hollow_config(model, variant, **shrunk(model))
    assert {"generation_config.json", "tokenizer_config.json"} <= {path.name for path in folder.iterdir()}


def test_the_data_is_a_hole(tmp_path: Path) -> None:
    folder = write_hollow(tmp_path / "out", "Llama-3.3-70B-Instruct", "bf16", layers=4)
    stats = [path.stat() for path in folder.glob("*.safetensors")]
    assert sum(stat.st_size for stat in stats) > 10_000_000_000
    assert sum(stat.st_blocks * 512 for stat in stats) < 1_000_000


# Elements by dtype as the Hugging Face Hub counts them, and the number of tensors where it is known.
PUBLISHED = [
    ("Qwen3-235B-A22B", "bf16", {"BF16": 235_093_634_560}, None),
    ("Qwen3-30B-A3B", "bf16", {"BF16": 30_532_122_624}, 18_867),
    ("Qwen3-30B-A3B", "fp8_block", {"F8_E4M3": 29_896_998_912, "BF16": 636_948_480}, 37_491),
    ("Llama-3.3-70B-Instruct", "bf16", {"BF16": 70_553_706_496}, 723),
    ("Llama-3.3-70B-Instruct", "fp8_channel", {"F8_E4M3": 68_451_041_280, "BF16": 2_109_382_656}, None),
    ("Llama-3.2-1B", "bf16", {"BF16": 1_235_814_400}, 146),
    ("Qwen2.5-7B-Instruct", "bf16", {"BF16": 7_615_616_512}, 339),
    (
        "DeepSeek-V3",
        "fp8_block",
        {"F8_E4M3": 680_571_043_840, "BF16": 3_918_786_560, "F32": 41_555_600},
        91_991,
    ),
]


@pytest.mark.parametrize(("model", "variant", "elements", "count"), PUBLISHED)
def test_sizes_are_the_published_ones(model: str, variant: str, elements: dict[str, int], count: int | None) -> None:
    found: Counter[str] = Counter()
    tensors = 0
    for tensor in hollow_tensors(model, variant):
        found[tensor.dtype] += tensor.elements
        tensors += 1
    assert found == elements
    assert count in (None, tensors)


def test_deepseek_is_671b_and_a_prediction_module_of_14b() -> None:
    def billions(prefix: str) -> float:
        weights = (t for t in hollow_tensors("DeepSeek-V3", "bf16") if t.name.startswith(prefix))
        return round(sum(tensor.elements for tensor in weights) / 1e9, 1)

    assert billions("") == 684.5
    assert billions("model.layers.61.") == 13.5
    assert billions("model.layers.61.embed_tokens.") + billions("model.layers.61.shared_head.") == 1.8


def test_deepseek_v4_flash_is_284b() -> None:
    tensors = [tensor for tensor in hollow_tensors("DeepSeek-V4-Flash", "bf16") if not tensor.name.startswith("mtp.")]
    assert round(sum(tensor.elements for tensor in tensors) / 1e9) == 284


# One line for each kind of tensor that differs between releases.
SAMPLES = [
    ("Qwen3-235B-A22B", "fp8_block", "layers.0.self_attn.q_proj.weight_scale_inv", "BF16", (64, 32)),
    ("Qwen3-235B-A22B", "fp8_block", "layers.0.mlp.gate.weight", "BF16", (128, 4096)),
    ("Qwen3-235B-A22B", "fp8_channel", "layers.0.self_attn.k_proj.weight_scale", "BF16", (512, 1)),
    ("Qwen3-235B-A22B", "gptq_int4", "layers.0.mlp.experts.3.up_proj.qweight", "I32", (512, 1536)),
    ("Qwen3-235B-A22B", "gptq_int4", "layers.0.mlp.experts.3.down_proj.qzeros", "I32", (12, 512)),
    ("Qwen3-235B-A22B", "gptq_int4", "layers.0.mlp.experts.3.down_proj.scales", "F16", (12, 4096)),
    ("Qwen3-235B-A22B", "gptq_int4", "layers.0.mlp.experts.3.down_proj.g_idx", "I32", (1536,)),
    ("Qwen3-235B-A22B", "gptq_int4", "layers.0.mlp.gate.weight", "F16", (128, 4096)),
    ("Qwen2.5-7B-Instruct", "gptq_int4", "layers.0.self_attn.v_proj.bias", "F16", (512,)),
    ("DeepSeek-V3", "fp8_block", "layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv", "F32", (5, 56)),
    ("DeepSeek-V3", "fp8_block", "layers.3.mlp.gate.e_score_correction_bias", "F32", (256,)),
    ("DeepSeek-V3", "fp8_block", "layers.61.eh_proj.weight", "BF16", (7168, 14336)),
    ("DeepSeek-V3", "fp8_block", "layers.61.shared_head.head.weight", "BF16", (129280, 7168)),
    ("DeepSeek-V3", "bf16", "layers.61.self_attn.kv_b_proj.weight", "BF16", (32768, 512)),
]


@pytest.mark.parametrize(("model", "variant", "name", "dtype", "shape"), SAMPLES)
def test_a_tensor(model: str, variant: str, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    name = f"model.{name}"
    assert next(t for t in hollow_tensors(model, variant) if t.name == name) == (name, dtype, shape)


def test_quantizers_drop_the_prediction_module() -> None:
    for variant in ("fp8_channel", "gptq_int4"):
        assert not any("layers.61." in tensor.name for tensor in hollow_tensors("DeepSeek-V3", variant))


def test_a_tied_head_is_not_stored() -> None:
    assert not any("lm_head" in tensor.name for tensor in hollow_tensors("Llama-3.2-1B", "bf16"))


def test_the_published_235b_fp8_checkpoint(tmp_path: Path) -> None:
    """48 shards, and a config.json of 12,909 bytes that names 94 routers: as published."""
    folder = write_hollow(tmp_path / "out", "Qwen3-235B-A22B", "fp8_block")
    assert len(list(folder.glob("model-*-of-00048.safetensors"))) == 48
    assert (folder / "config.json").stat().st_size == 12_909
    skipped = load(folder / "config.json")["quantization_config"]["modules_to_not_convert"]
    assert sum(name.endswith(".mlp.gate") for name in skipped) == 94


@pytest.mark.parametrize("experts", [1, 2, 6, 8, 64])
def test_a_shrunk_deepseek_can_still_route(experts: int) -> None:
    config = hollow_config("DeepSeek-V3", "bf16", layers=1, experts=experts)
    assert config["n_routed_experts"] % config["n_group"] == 0
    assert config["topk_group"] <= config["n_group"]
    pickable = experts // config["n_group"] * config["topk_group"]
    assert 1 <= config["num_experts_per_tok"] <= pickable
    assert config["first_k_dense_replace"] == 0
    names = {tensor.name for tensor in hollow_tensors("DeepSeek-V3", "bf16", layers=1, experts=experts)}
    assert f"model.layers.1.mlp.experts.{experts - 1}.down_proj.weight" in names


@pytest.mark.parametrize(
    ("model", "variant", "size", "message"),
    [
        ("GPT-2", "bf16", {}, "unknown model 'GPT-2'"),
        ("Llama-3.2-1B", "int3", {}, "unknown variant 'int3'"),
        ("Llama-3.2-1B", "bf16", {"layers": 17}, "layers must be 1 to 16, not 17"),
        ("Llama-3.2-1B", "bf16", {"experts": 2}, "llama has no experts"),
        ("Qwen3-30B-A3B", "bf16", {"experts": 0}, "experts must be 1 to 128, not 0"),
    ],
)
def test_an_impossible_model_is_refused(
    tmp_path: Path, model: str, variant: str, size: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_hollow(tmp_path / "out", model, variant, **size)
    assert not (tmp_path / "out").exists()
