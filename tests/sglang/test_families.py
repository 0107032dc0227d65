"""Model families: a mix of each tiny model, planned, built, verified, and loaded by SGLang's own class.

Every parameter must equal the one that the class loads from the dequantized weights of the same mix. Kernels are not
tested here; ``test_cpu_engine.py`` serves the classes that run on a CPU.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import TINY
from support.sglang.families import (
    dense_parameters,
    dequantized,
    family_mix,
    heads_asked_for,
    skip_unless_made,
    write_family,
    write_recipe,
)
from support.sglang.harness import rank_of, serve, tensors_of

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.errors import RefusedError
from mixprec_build.families.expected import ties_head
from mixprec_build.families.facts import ModelFacts
from mixprec_build.output.build import plan_recipe
from mixprec_build.output.split import split
from mixprec_build.output.verify import verify

pytestmark = pytest.mark.usefixtures("sglang", "streams")

ASKED_IN_VAIN = ("deepseek_v4",)
"""Classes that ask how their heads are stored, and whose own loaders find none of the tensors of quantized ones."""
NOT_LOADED = "g_idx_sort_indices"
"""Parameters of GPTQ that are made after loading."""


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_is_that_of_a_native_load(folder: Path, tmp_path: Path, name: str) -> None:
    """The class asks how its head is stored where the family says so, and nowhere else."""
    skip_unless_made(name)
    model = TINY[name]
    mix = family_mix(folder, name)
    with heads_asked_for() as heads:
        ours = dict(dense_parameters(serve(mix, **model.options)))
    facts = ModelFacts.of(model.config)
    if not ties_head(facts):
        asked = {stored for layer in heads for stored in facts.family.stored_names(layer)}
        assert (facts.family.head in asked) == (facts.family.quantized_head or name in ASKED_IN_VAIN)
    theirs = dict(dense_parameters(serve(dequantized(mix, tmp_path / "dense"), **model.options)))
    ours = {key: value for key, value in ours.items() if not key.endswith(NOT_LOADED)}
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert ours[key].shape == value.shape, key
        # Scales of GPTQ are rounded to BF16 as SGLang loads them.
        assert (ours[key] - value).abs().max() <= 0.01 * value.abs().max(), key


@pytest.mark.parametrize("name", ["bailing_moe", "internlm2", "mimo_v2", "minimax_m3"])
def test_a_config_without_a_class_in_transformers_goes_to_other_processes(name: str) -> None:
    """As an engine sends it to its scheduler."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**TINY[name].config)
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()


STEPS = ("step3p5", "step3p7")


@pytest.mark.parametrize(
    ("name", "ep", "dp"),
    [
        ("qwen3_5_moe_auto_round", 1, 1), ("step3p5", 1, 1), ("step3p5", 2, 1), ("step3p7", 2, 1), ("step3p5", 1, 2),
        ("step3p5", 2, 2), ("kimi_k3", 1, 2), ("kimi_k3", 2, 2),
    ],
)  # fmt: skip
def test_a_rank_is_that_of_a_native_load(folder: Path, tmp_path: Path, name: str, ep: int, dp: int) -> None:
    """The second of two: AutoRound beside FP8; Step, whose class cannot load single experts, with an FP8 head; and
    Kimi-K3, which is not cut for ranks, with replicas of attention."""
    skip_unless_made(name)
    mix, options = family_mix(folder, name, head=name in STEPS), dict(TINY[name].options)
    if dp > 1:
        options |= {"tp_size": 2, "dp_size": dp, "enable_dp_attention": True}
    with rank_of(1, 2, ep, dp):
        ours = dict(dense_parameters(serve(mix, **options)))
        theirs = dict(dense_parameters(serve(dequantized(mix, tmp_path / "dense"), **options)))
    ours = {key: value for key, value in ours.items() if not key.endswith(NOT_LOADED)}
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert (ours[key] - value).abs().max() <= 0.01 * value.abs().max(), key


HEADS = [
    "qwen2_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "kimi_k2",
    "kimi_k25",
    "kimi_k3",
    "deepseek_v32",
    "glm_moe_dsa",
    "glm4_moe",
    "nemotron_h",
    "mimo_v2",
    "bailing_moe",
    "phimoe",
    "apertus",
    "longcat",
    "ernie4_5",
    "ernie4_5_moe",
    "olmoe",
    "granite",
    "granitemoe",
    "phi3",
    "qwen3_vl",
    "qwen3_vl_moe",
    "llama4",
    "minimax_m3",
    "mistral3",
    "mistral_large_3",
    "mistral_large_3_images",
]


@pytest.mark.parametrize("name", HEADS)
def test_a_quantized_head_is_that_of_a_native_load(folder: Path, tmp_path: Path, name: str) -> None:
    """By mixprec's loader and by SGLang's; cut for ranks where the family is."""
    skip_unless_made(name)
    model = TINY[name]
    mix = family_mix(folder, name, head=True)
    native = dict(dense_parameters(serve(dequantized(mix, tmp_path / "dense"), **model.options)))
    (head,) = [key for key in native if key.endswith("lm_head.weight")]
    for options in ({}, {"load_format": "safetensors"}):
        ours = dict(dense_parameters(serve(mix, **model.options, **options)))[head]
        assert (ours - native[head]).abs().max() <= 0.01 * native[head].abs().max()
    for tp, ep in model.degrees[:1]:
        with rank_of(1, tp, ep):
            second, stock = (
                dict(serve(mix, **model.options, **how).named_parameters())
                for how in ({}, {"load_format": "safetensors"})
            )
        names = [
            key for key, held in second.items() if "lm_head." in key and held.numel() and not key.endswith(".bias")
        ]
        assert len(names) == 2
        assert all(torch.equal(_bits(second[key].data), _bits(stock[key].data)) for key in names)


@pytest.mark.parametrize(
    ("name", "head", "asked"),
    [
        ("minimax_m2", "lm_head", []),
        ("internlm2", "output", []),
        ("hunyuan", "lm_head", [""]),
        ("hunyuan_dense", "lm_head", [""]),
    ],
)
def test_a_head_that_its_class_does_not_quantize_is_refused(
    folder: Path, tmp_path: Path, name: str, head: str, asked: list[str]
) -> None:
    """SGLang's minimax_m2.py and internlm2.py make it with no quantization config, hunyuan.py without its name."""
    tiny = TINY[name]
    with heads_asked_for() as found:
        serve(family_mix(folder, name), **tiny.options)
    assert found == asked
    lines = {**tiny.lines, head: "fp8"}
    model = replace(tiny, config={**tiny.config, "tie_word_embeddings": False}, lines=lines)
    sources = write_family(tmp_path, model, head=True)
    with pytest.raises(RefusedError, match="no quantized lm_head of this family"):
        plan_recipe(write_recipe(tmp_path / "recipe.yaml", sources, lines))


@pytest.mark.parametrize(
    ("name", "settings", "line", "message"),
    [
        (
            "step3p5",
            {"swiglu_limits": [0.0, 7.0, 0.0]},
            ("*.mlp.*", "fp8"),
            "layers.1.moe.experts.{3..7}.*Marlin ignores",
        ),
        (
            "step3p5",
            {"swiglu_limits": [0.0, 7.0, 0.0]},
            ("*.layers.1.moe.experts.*.down_proj", "bf16"),
            "format by format",
        ),
        (
            "gemma4_moe",
            {},
            ("*.layers.0.experts.*", "int4"),
            r"no Marlin kernel for experts with this activation \(gelu\)",
        ),
        ("llama4", {}, ("*.feed_forward.experts.*", "int4"), "which Marlin does not do"),
        ("minimax_m3", {}, ("*.layers.1.*.experts.*.w2", "bf16"), "format by format, and need one: w1 is"),
    ],
)
def test_experts_that_no_kernel_activates_are_refused(
    tmp_path: Path, name: str, settings: dict[str, Any], line: tuple[str, str], message: str
) -> None:
    """Before a build, and only where it is so: layers of Step without a limit take Int4."""
    tiny = TINY[name]
    lines = {**tiny.lines, line[0]: line[1]}
    model = replace(tiny, config={**tiny.config, **settings}, lines=lines)
    sources = write_family(tmp_path, model)
    with pytest.raises(RefusedError, match=message) as refused:
        plan_recipe(write_recipe(tmp_path / "recipe.yaml", sources, lines))
    assert "layers.2.moe.experts" not in str(refused.value)


def test_packed_formats_have_no_place_where_a_class_chooses_a_gemm_by_the_weight(tmp_path: Path) -> None:
    """Nemotron-3 Super's: only on a GPU, when it first runs, does SGLang look for it; fc2 takes any format."""
    tiny = TINY["nemotron_h_latent"]
    recipe = tmp_path / "recipe.yaml"
    lines = {**tiny.lines, "*.fc2_latent_proj": "int4"}
    sources = write_family(tmp_path / "fc2", replace(tiny, lines=lines))
    assert plan_recipe(write_recipe(recipe, sources, lines))
    lines = {**tiny.lines, "*_latent_proj": "int4"}
    sources = write_family(tmp_path / "both", replace(tiny, lines=lines))
    with pytest.raises(RefusedError, match=r"fc1_latent_proj: .*packed formats have none of that name") as refused:
        plan_recipe(write_recipe(recipe, sources, lines))
    assert "fc2_latent_proj" not in str(refused.value)


RANKS = [(name, ep) for name, model in TINY.items() for _, ep in model.degrees if name not in STEPS]


@pytest.mark.parametrize(("name", "ep"), RANKS)
def test_a_rank_holds_what_sglangs_own_loader_gives_it(
    folder: Path, name: str, ep: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The second of two ranks: mixprec's loader fills the same parameters as SGLang's."""
    skip_unless_made(name)
    mix, options = family_mix(folder, name), TINY[name].options
    with rank_of(1, 2, ep), caplog.at_level("DEBUG", "mixprec_runtime"):
        ours = serve(mix, **options)
        assert "mixprec: read the weights in" in caplog.text, "they were left to SGLang's loader"
        theirs = dict(serve(mix, load_format="safetensors", **options).named_parameters())
    # AutoRound stores none, and without act-order no kernel reads SGLang's parameter for it.
    ordered = any(name.endswith(".g_idx") for name in tensors_of(mix))
    left = NOT_LOADED if ordered else (NOT_LOADED, "_g_idx")
    for key, parameter in ours.named_parameters():
        if not key.endswith(left):
            assert torch.equal(_bits(parameter.data), _bits(theirs[key].data)), key


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() and tensor.numel() else tensor


@pytest.mark.parametrize("name", ["qwen3_5_moe", "kimi_k25", "minimax_m3_images", "mistral_large_3_images", *STEPS])
def test_ranks_read_their_own_files_beside_an_encoder_of_images(
    folder: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Files cut for two ranks, the merged ones gone: the encoder's tensors are in them as they are stored."""
    skip_unless_made(name)
    own = _read_of_own_files(family_mix(folder, name), tmp_path / "out", TINY[name].options, 2, caplog)
    assert any("vis" in key for key in own) == (name != "step3p5")


def test_ranks_read_their_own_files_of_a_decoder_of_another_name(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Mistral-Small-3 as transformers 5 writes it: all below ``model.``, but for ``lm_head``, here in FP8."""
    skip_unless_made("mistral3")
    names = (("language_model.model.", "model.language_model."), ("language_model.lm_head", "lm_head"), ("", "model."))
    monkeypatch.setitem(TINY, "mistral3_renamed", replace(TINY["mistral3"], renamed=names))
    mix = family_mix(folder, "mistral3_renamed", head=True)
    assert "lm_head.weight_scale_inv" in tensors_of(mix)
    own = _read_of_own_files(mix, tmp_path / "out", {}, 1, caplog)
    assert "language_model.lm_head.weight" in own and any(key.startswith("vision_tower.") for key in own)


def _read_of_own_files(
    mix: Path, out: Path, options: Mapping[str, Any], ep: int, caplog: pytest.LogCaptureFixture
) -> dict[str, torch.nn.Parameter]:
    """The parameters of the first of two ranks from its own files, equal to those from the merged ones.

    ``ep``: in how many groups the ranks share experts.
    """
    shutil.copytree(mix, out)
    with rank_of(0, 2, ep):
        merged = dict(serve(out, **options).named_parameters())
    split(out, Degree(2, ep), layout="presplit")
    assert not verify(out).differences
    with rank_of(0, 2, ep), caplog.at_level("DEBUG", "mixprec_runtime"):
        own = dict(serve(out, **options).named_parameters())
        assert "mixprec: read the files in" in caplog.text
    for key, parameter in own.items():
        if not key.endswith(NOT_LOADED):
            assert torch.equal(_bits(parameter.data), _bits(merged[key].data)), key
    return own
