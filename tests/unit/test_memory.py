"""``--gpus``: weights of a rank, the KV cache, SGLang's reserve, against numbers worked out by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import write as checkpoints
from support.hollow import hollow_config, write_hollow
from support.llama import write_recipe, write_sources
from support.run import call, invoke
from support.write import LLAMA

import mixprec_build as mp
from mixprec_build.families.cache import CacheFacts, UnknownCache
from mixprec_build.families.facts import ModelFacts
from mixprec_build.report.memory import CONTEXT_BYTES, Gpus, reserve_of

CONFIGS = Path(__file__).parents[1] / "data" / "configs"


def cache_of(config: dict[str, Any]) -> CacheFacts:
    cache = ModelFacts.of(config).cache
    assert isinstance(cache, CacheFacts), cache
    return cache


def released(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())["config"]
    return config


# layers x (heads / ranks) x (key + value) x bytes; MLA: layers x (512 + 64) x bytes on every rank
PER_TOKEN = [
    ("nvidia-qwen3-235b-nvfp4", 1, 94 * 4 * 256 * 2, 94 * 4 * 256),
    ("nvidia-qwen3-235b-nvfp4", 4, 94 * 256 * 2, 94 * 256),
    ("nvidia-qwen3-235b-nvfp4", 8, 94 * 256 * 2, 94 * 256),  # a head is on two ranks
    ("minimax-m2.5-fp8", 2, 62 * 4 * 256 * 2, 62 * 4 * 256),
    ("nvidia-deepseek-v3.1-nvfp4", 1, 70_272, 35_136),
    ("nvidia-deepseek-v3.1-nvfp4", 8, 70_272, 35_136),
    ("kimi-k2.5-int4", 8, 61 * 576 * 2, 61 * 576),
    # The indexer's key in FP8 with a scale; in an FP8 cache the latent has four scales and a rotary part in 16 bits.
    ("nvidia-deepseek-v3.2-nvfp4", 8, 61 * (576 * 2 + 132), 61 * (512 + 16 + 128 + 132)),
    ("zai-glm-5-fp8", 8, 78 * (576 * 2 + 132), 78 * (512 + 16 + 128 + 132)),
    # Half of the layers, or three of four, have a pool of 0.8 times the tokens.
    ("gpt-oss-120b-mxfp4", 1, int(18 * 1.8 * 8 * 128 * 2), int(18 * 1.8 * 8 * 128)),
    ("llama4-maverick-bf16", 8, int((12 + 36 * 0.8) * 256 * 2), int((12 + 36 * 0.8) * 256)),
]


@pytest.mark.parametrize(("name", "tp", "plain", "fp8"), PER_TOKEN)
def test_a_token_of_released_models(name: str, tp: int, plain: int, fp8: int) -> None:
    cache = cache_of(released(name))
    assert (cache.bytes_per_token(tp, 2), cache.bytes_per_token(tp, 1)) == (plain, fp8)
    assert cache.bytes_per_sequence(tp) == 0


@pytest.mark.parametrize(
    ("model", "tp", "token", "sequence"),
    [
        ("GLM-4.5-Air", 1, 46 * 8 * 256 * 2, 0),
        ("GLM-4.5-Air", 8, 46 * 256 * 2, 0),
        ("Llama-3.3-70B-Instruct", 4, 80 * 2 * 256 * 2, 0),
        ("DeepSeek-V3", 4, 70_272, 0),
        # Ten layers of 40 have attention; the others (4,096 + 2 x 2,048) x 3 inputs and 32 x 128 x 128 float32.
        ("Qwen3.6-35B-A3B", 1, 10 * 2 * 512 * 2, 30 * (8192 * 3 * 2 + 32 * 128 * 128 * 4)),
        ("Qwen3.6-35B-A3B", 4, 10 * 512 * 2, 30 * (2048 * 3 * 2 + 8 * 128 * 128 * 4)),
        ("Qwen3-Next-80B-A3B-Instruct", 2, 12 * 512 * 2, 36 * (4096 * 3 * 2 + 16 * 128 * 128 * 4)),
    ],
)
def test_a_token_and_a_sequence_of_the_models_of_recipes(model: str, tp: int, token: int, sequence: int) -> None:
    cache = cache_of(hollow_config(model, "bf16"))
    assert (cache.bytes_per_token(tp, 2), cache.bytes_per_sequence(tp)) == (token, sequence)


def test_windows_without_a_pool_are_kept_in_full() -> None:
    config = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_hidden_layers": 6}
    config |= {"layer_types": ["sliding_attention"] * 5 + ["full_attention"], "sliding_window": 512}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "hidden_size": 1152}
    cache = cache_of(config)
    assert cache.bytes_per_token(1, 2) == 6 * 512 * 2
    assert "5 layers with sliding windows are kept" in cache.kind


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deepseek-v4-flash", "DeepseekV4ForCausalLM"),
        ("kimi-k3-mxfp4", "KimiK3ForConditionalGeneration"),
        ("nvidia-nemotron-3-nano-nvfp4", "NemotronHForCausalLM"),
        ("minimax-m3-bf16", "MiniMaxM3ForCausalLM"),
        ("step-3.7-flash-fp8", "Step3p7FlashForCausalLM"),
    ],
)
def test_other_caches_are_not_guessed(name: str, reason: str) -> None:
    cache = ModelFacts.of(released(name)).cache
    assert isinstance(cache, UnknownCache) and reason in cache.reason


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_hidden_layers": 2},
        {"num_hidden_layers": 2, "num_attention_heads": 4},
        {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64, "linear_num_value_heads": 4},
        {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64, "layer_types": ["linear_attention"]},
        {"num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 64, "architectures": ["GptOssForCausalLM"]},
        {"num_hidden_layers": True, "num_attention_heads": "4", "layer_types": 3},
    ],
)
def test_a_configuration_that_lacks_numbers(config: dict[str, Any]) -> None:
    assert isinstance(ModelFacts.of(config).cache, UnknownCache)


# server_args.py: (MiB - 512 - 1.5 a token - ranks / 8 x 1024 - 2 a sequence - 8 for each of 58 graphs) / MiB
@pytest.mark.parametrize(
    ("mib", "tp", "latent", "fraction"),
    [
        (81559, 1, False, (81559 - 512 - 8192 * 1.5 - 128 - 512 - 58 * 8) / 81559),
        (81559, 8, False, (81559 - 512 - 8192 * 1.5 - 1024 - 1024 - 58 * 8) / 81559),
        (143771, 8, True, (143771 - 512 - 8192 * 1.5 - 1024 - 1024 - 1536) / 143771),
        (24564, 1, False, (24564 - 512 - 2048 * 1.5 - 128 - 48 - 42 * 8) / 24564),
        (46068, 4, False, (46068 - 512 - 4096 * 1.5 - 512 - 320 - 50 * 8) / 46068),
        (183359, 8, False, (183359 - 512 - 16384 * 1.5 - 1024 - 1024 - 74 * 8) / 183359),
    ],
)
def test_the_reserve(mib: int, tp: int, latent: bool, fraction: float) -> None:
    assert reserve_of(mib * 2**20, tp, latent).mem_fraction_static == round(fraction, 3)


def test_an_encoder_of_images_needs_more() -> None:
    plain = reserve_of(80 * 2**30, 1, False).mem_fraction_static
    # Qwen3.6's encoder says `depth`, so that SGLang takes 24 layers, of width 1152
    assert reserve_of(80 * 2**30, 1, False, (24, 1152)).mem_fraction_static == pytest.approx(
        plain * 0.95 * (1 - 0.1 * (1152**2 / 1024**2 - 1))
    )
    assert ModelFacts.of(hollow_config("Qwen3.6-35B-A3B", "bf16")).encoder == (24, 1152)


@pytest.mark.parametrize(
    ("text", "gpus"),
    [
        ("4x80GB", Gpus(4, 80 * 10**9)),
        (" 8 × 141GB ", Gpus(8, 141 * 10**9)),
        ("24GB", Gpus(1, 24 * 10**9)),
        ("2x81559MiB", Gpus(2, 81559 * 2**20)),
    ],
)
def test_gpus_as_they_are_written(text: str, gpus: Gpus) -> None:
    assert Gpus.parse(text) == gpus


@pytest.mark.parametrize("text", ["", "4x", "x80GB", "0x80GB", "4x80", "four", "4x80GBx2", "99999x80GB", "4x-80GB"])
def test_what_are_no_gpus(text: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no number and size of GPUs; write 4x80GB"):
        Gpus.parse(text)
    assert call("plan", tmp_path / "none.yaml", "--gpus", text) == 2
    assert "--gpus" in capsys.readouterr().err


@pytest.fixture(scope="module")
def air(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GLM-4.5-Air's shapes, 4 layers of them with 8 experts, and its layer for drafts."""
    folder = tmp_path_factory.mktemp("air")
    return write_hollow(folder / "model", "GLM-4.5-Air", "bf16", layers=4, experts=8)


HIDDEN, VOCABULARY = 4096, 151552
ATTENTION = 2 * 96 * 128 * HIDDEN + 2 * 8 * 128 * HIDDEN
EXPERT = 3 * 1408 * HIDDEN


def test_weights_of_a_rank(air: Path) -> None:
    """In BF16 every linear is cut evenly; norms, routers and biases of all layers are the small rest."""
    one, four = (mp.memory(air, f"{n}x80GB", 4096) for n in (1, 4))
    linears = 4 * ATTENTION + 3 * 10944 * HIDDEN + 3 * 9 * EXPERT + 2 * VOCABULARY * HIDDEN
    for needs, ranks in ((one, 1), (four, 4)):
        assert 0 < needs["weight_bytes"] - 2 * linears // ranks < 2 * 10**6
        assert needs["options"] == f"--tp {ranks}"
    drafts = 2 * (ATTENTION + 9 * EXPERT + 2 * VOCABULARY * HIDDEN + 2 * HIDDEN * HIDDEN)
    assert 0 < one["draft_bytes_left_out"] - drafts < 10**6


def test_what_is_left_for_the_cache(air: Path) -> None:
    needs = mp.memory(air, "1x80GB", context=4096)
    fraction = needs["reserve"]["mem_fraction_static"]
    static = int((80 * 10**9 - CONTEXT_BYTES) * fraction)
    assert needs["cache_bytes"] == static - needs["weight_bytes"]
    assert needs["cuda_bytes"] + needs["reserved_bytes"] + needs["weight_bytes"] + needs["cache_bytes"] == 80 * 10**9
    token = 4 * 8 * 256 * 2
    assert needs["tokens"] == needs["cache_bytes"] // token
    assert needs["sequences"] == needs["tokens"] // 4096 > 0 and needs["fits"] is True and "would_fit" not in needs
    assert mp.memory(air, "1x80GB", 4096, cache_dtype="fp8_e4m3")["tokens"] == needs["cache_bytes"] * 2 // token


def test_what_would_fit(air: Path) -> None:
    needs = mp.memory(air, "1x10GB", context=131072)
    assert needs["fits"] is False
    for change in needs["would_fit"]:
        gpus = f"{change.get('gpus', 1)}x{change.get('gpu_bytes', 10 * 10**9)}"
        context = change.get("context", 131072)
        dtype = change.get("kv_cache_dtype", "auto")
        assert mp.memory(air, gpus, context, cache_dtype=dtype)["fits"] is True, change
    changes = {change["change"]: change for change in needs["would_fit"]}
    assert {"gpus", "gpu_bytes"} <= changes.keys()
    fewer = changes["gpus"]["gpus"] // 2
    assert fewer == 1 or mp.memory(air, f"{fewer}x10GB", 131072)["fits"] is False, "the smallest is named"
    shorter = mp.memory(air, "1x12GB", context=10**6)
    assert [c["context"] for c in shorter["would_fit"] if c["change"] == "context"] == [
        shorter["tokens"] // 1024 * 1024
    ]


def test_states_share_the_rest_with_keys_and_values(tmp_path: Path) -> None:
    folder = write_hollow(tmp_path / "model", "Qwen3-Next-80B-A3B-Instruct", "bf16", layers=4, experts=8)
    needs = mp.memory(folder, "1x80GB", context=262144)
    state = 3 * (8192 * 3 * 2 + 32 * 128 * 128 * 4)
    slots = int((needs["cache_bytes"] * 0.9 / 1.9 - state) // state)
    token = 2 * 512 * 2
    assert (needs["bytes_per_sequence"], needs["bytes_per_token"]) == (state, token)
    assert needs["tokens"] == (needs["cache_bytes"] - (slots + 1) * state) // token
    assert needs["sequences"] == min(needs["tokens"] // 262144, slots // 5)
    assert mp.memory(folder, "1x80GB", context=16)["sequences"] == slots // 5, "states are what there is least of"


def test_latent_attention_has_copies(tmp_path: Path) -> None:
    """``w_kc`` and ``w_vc`` are made of kv_b_proj [128 heads x (128 + 128), 512], shared by ranks."""
    folder = write_hollow(tmp_path / "model", "DeepSeek-V3", "bf16", layers=4, experts=8)
    for ranks in (1, 4):
        copies = mp.memory(folder, f"{ranks}x141GB")["unquantized_copy_bytes"]
        assert copies == 4 * 128 * 256 * 512 * 2 // ranks


def test_zeros_that_fill_a_rank_up_count(tmp_path: Path) -> None:
    """Of a GPTQ expert's 1,408 columns, 8 ranks have 176 each, and 256 with zeros."""
    folder = write_hollow(tmp_path / "model", "GLM-4.5-Air", "gptq_int4", layers=2, experts=8)
    plain, filled = (mp.memory(folder, f"{n}x80GB") for n in (1, 8))
    assert any("176 columns" in note and "256" in note for note in filled["notes"]) and plain["notes"] == []
    assert filled["weight_bytes"] > plain["weight_bytes"] / 8
    expert = mp.memory(folder, "8x80GB", ep=8)
    assert expert["weight_bytes"] < filled["weight_bytes"] and expert["options"] == "--tp 8 --ep-size 8"


def test_the_command_prints_it(tmp_path: Path) -> None:
    write_sources(tmp_path)
    recipe = write_recipe(tmp_path / "mix.yaml")
    mp.build(recipe, tmp_path / "out")
    for command in (("plan", recipe), ("inspect", tmp_path / "out")):
        ended = invoke(*command, "--gpus", "1x24GB", "--context", "4096")
        assert ended.exit_code == 0, ended.output
        assert "On 1 GPU of 24.0 GB (--tp 1), a rank" in ended.output
        assert re.search(r"[\d,]+ tokens fit, [\d,]+ bytes each: [\d,]+ sequences of 4,096", ended.output)
        facts = json.loads(invoke(*command, "--gpus", "1x24GB", "--context", "4096", "--json").output)
        assert facts["memory"]["fits"] is True
        assert "memory" not in json.loads(invoke(*command, "--json").output)
    assert facts["memory"] == mp.memory(tmp_path / "out", "1x24GB", 4096) == mp.memory(mp.plan(recipe), "1x24GB", 4096)


def test_ranks_that_a_model_cannot_be_cut_for(tmp_path: Path) -> None:
    checkpoints.write_tiny(tmp_path / "a", replace(LLAMA, intermediate=256), "bf16")
    with pytest.raises(mp.SplitError, match=r"on 7 x 80\.0 GB: .*cannot be shared by 7 ranks"):
        mp.memory(tmp_path / "a", "7x80GB")


def test_a_cache_that_is_not_known_is_said(tmp_path: Path) -> None:
    checkpoints.write_tiny(tmp_path / "a", LLAMA, "bf16")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "compress_ratios": [1]}))
    needs = mp.memory(tmp_path / "a", "1x80GB")
    assert needs["tokens"] is needs["sequences"] is needs["fits"] is None and needs["cache_bytes"] > 0
    assert "compress_ratios" in invoke("inspect", tmp_path / "a", "--gpus", "1x80GB").output
