"""Scales that AWQ folded into norms and other linears: what comes along, and that the model stays the same function.

The models here are run by transformers, from weights that are dequantized after compiling.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.formats import dequantize
from support.write import LLAMA, QWEN3_MOE, Config, Tensors, Tiny, folded_factors, write_tiny

from mixprec_build.checkpoint.typed import open_source
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.planning.types import Plan

MHA = Tiny("llama", kv_heads=4, hidden=256, gain=1 / 16)  # v_proj and o_proj have one shape: scales go through them
MOE = replace(QWEN3_MOE, gain=1 / 16)
SPREAD = 0.7


def plan_of(folder: Path, lines: Mapping[str, str], *, allow_unservable: bool = False) -> Plan:
    names = [path.name for path in sorted(folder.glob("*/")) if (path / "config.json").exists()]
    text = ["model: base", "default: base", "sources:", *(f"  {name}: {name}" for name in names), "weights:"]
    recipe = folder / "recipe.yaml"
    recipe.write_text("\n".join([*text, *(f"  '{pattern}': {source}" for pattern, source in lines.items())]))
    return plan_recipe(recipe, allow_unservable=allow_unservable)


def sources_of(plan: Plan, *endings: str) -> dict[str, str]:
    return {name: m.source for name, m in plan.modules.items() if name.endswith(endings)}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "base", LLAMA, "bf16")
    write_tiny(tmp_path / "awq", LLAMA, "awq_int4", fold=SPREAD)
    write_tiny(tmp_path / "plain", LLAMA, "awq_int4")
    write_tiny(tmp_path / "fp8", LLAMA, "fp8_block")
    return tmp_path


# What comes along


def test_a_norm_comes_along_with_what_it_feeds(llama: Path) -> None:
    plan = plan_of(llama, {"*.0.self_attn.*": "awq", "*.1.mlp.*": "awq", "*.0.mlp.*": "fp8"})
    assert sources_of(plan, "norm") == {
        "model.layers.0.input_layernorm": "awq",
        "model.layers.0.post_attention_layernorm": "base",
        "model.layers.1.input_layernorm": "base",
        "model.layers.1.post_attention_layernorm": "awq",
        "model.norm": "base",
    }
    assert plan.modules["model.layers.0.input_layernorm"].format.kind == "fp16"
    assert list(plan.notes) == [
        "model.layers.0.input_layernorm, model.layers.1.post_attention_layernorm: from `awq` like the modules that "
        "these norms feed, because it has scales of activations folded into the norms"
    ]


def test_without_scales_all_mixes_and_norms_stay(llama: Path) -> None:
    plan = plan_of(llama, {"*.self_attn.{q,k,v}_proj": "plain", "*.0.mlp.down_proj": "plain", "*.1.mlp.*": "plain"})
    assert set(sources_of(plan, "norm").values()) == {"base"} and plan.notes == ()


def test_grouped_query_attention_keeps_values_and_outputs_apart(llama: Path) -> None:
    """AutoAWQ folds no scales of o_proj where v_proj has fewer outputs than it has inputs."""
    plan = plan_of(llama, {"*.self_attn.{q,k,v}_proj": "awq"})
    assert set(sources_of(plan, "o_proj").values()) == {"base"}


def test_two_sources_with_the_same_scales_are_one(llama: Path) -> None:
    write_tiny(llama / "again", LLAMA, "awq_int4", fold=SPREAD)
    plan = plan_of(llama, {"*.mlp.{gate,up}_proj": "awq", "*.mlp.down_proj": "again"})
    assert set(sources_of(plan, "post_attention_layernorm").values()) == {"awq"}


def test_a_router_comes_along_with_its_norm(tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", QWEN3_MOE, "bf16")
    write_tiny(tmp_path / "awq", QWEN3_MOE, "awq_int4", fold=SPREAD)
    plan = plan_of(tmp_path, {"*.1.mlp.experts.*": "awq"})
    expected = {"model.layers.0.mlp.gate": "base", "model.layers.1.mlp.gate": "awq"}
    assert sources_of(plan, "mlp.gate") == expected
    # What is named is where its line says; that its values fit is checked all the same.
    named = plan_of(tmp_path, {"*.1.mlp.experts.*": "awq", "*.1.mlp.gate": "awq", "*.1.post_attention*": "awq"})
    assert sources_of(named, "mlp.gate") == expected and named.modules.keys() == plan.modules.keys()


def test_the_default_may_be_the_one_with_the_scales(tmp_path: Path) -> None:
    """Norms come back from another source where what they feed does."""
    write_tiny(tmp_path / "base", LLAMA, "awq_int4", fold=SPREAD)  # by its name the model and the default
    (tmp_path / "base").rename(tmp_path / "awq")
    write_tiny(tmp_path / "dense", LLAMA, "bf16")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: awq\nsources: {awq: awq, dense: dense}\nweights: {'*.1.mlp.*': dense}\n")
    norms = sources_of(plan_recipe(recipe), "layernorm")
    assert {name for name, source in norms.items() if source == "dense"} == {"model.layers.1.post_attention_layernorm"}


def test_a_compiled_mix_is_a_source_like_any_other(llama: Path) -> None:
    run_plan(plan_of(llama, {"*.0.*": "awq"}), llama / "mixed")
    plan = plan_of(llama, {"*.0.mlp.*": "mixed", "*.1.mlp.up_proj": "mixed", "*.0.self_attn.*": "awq"})
    norms = sources_of(plan, "layernorm")
    assert norms.pop("model.layers.0.post_attention_layernorm") == "mixed"
    assert norms.pop("model.layers.0.input_layernorm") == "awq"
    assert set(norms.values()) == {"base"}
    # In layer 1 the mix is the base itself, and its up_proj goes with any down_proj.
    assert plan.modules["model.layers.1.mlp.up_proj"].source == "mixed"


# The function that a mix computes


@torch.no_grad()
def logits(folder: Path, scratch: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    source = open_source(str(folder))
    weights = {f"{name}.weight": torch.from_numpy(source.dequantize(name).copy()) for name in source.checkpoint.modules}
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    scratch.mkdir()
    (scratch / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    save_file(weights, scratch / "model.safetensors", metadata={"format": "pt"})
    runs = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32)
    tokens = torch.arange(3 * 32).reshape(3, 32) * 7 % runs.config.vocab_size
    out: torch.Tensor = runs(tokens).logits
    return out


@pytest.mark.parametrize(
    ("model", "sound", "broken"),
    [
        (
            MHA,
            {"*.0.*": "awq", "*.1.self_attn.*": "awq"},
            [
                {"*.mlp.*": "awq", "*.post_attention_layernorm": "base"},
                {"*.mlp.{gate,up}_proj": "awq"},
                {"*.mlp.down_proj": "awq"},
                {"*.self_attn.{q,k,v}_proj": "awq"},
            ],
        ),
        (
            MOE,
            {"*.1.mlp.experts.*": "awq", "*.0.self_attn.*": "awq"},
            [{"*.experts.{0..1}.*": "awq"}, {"*.experts.*": "awq", "*.mlp.gate": "base"}],
        ),
    ],
    ids=["llama", "qwen3_moe"],
)
def test_what_passes_is_the_same_function_and_what_is_refused_is_not(
    tmp_path: Path, model: Tiny, sound: Mapping[str, str], broken: list[Mapping[str, str]]
) -> None:
    """The base holds what AWQ's packed weights stand for, without the scales: no rounding lies between the two."""
    awq = write_tiny(tmp_path / "awq", model, "awq_int4", fold=SPREAD, group_size=32)
    factors = folded_factors(model, SPREAD)

    def unfold(tensors: Tensors, _: Config) -> None:
        stored: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in load_file(awq / "model.safetensors").items():
            stored.setdefault(name.rpartition(".")[0], {})[name.rpartition(".")[2]] = tensor
        for name, leaves in stored.items():
            tensors[f"{name}.weight"] = dequantize(leaves).numpy() / factors[name]

    write_tiny(tmp_path / "base", model, "bf16", edit=unfold)
    base = logits(tmp_path / "base", tmp_path / "scratch-base")

    def error(lines: Mapping[str, str], name: str) -> float:
        plan = plan_of(tmp_path, lines, allow_unservable=True)
        assert bool(plan.unservable) == name.startswith("broken")
        run_plan(plan, tmp_path / "built" / name)
        mine = logits(tmp_path / "built" / name, tmp_path / f"scratch-{name}")
        return float((mine - base).norm() / base.norm())

    assert error({"*": "awq"}, "native") < 1e-3
    assert error(sound, "sound") < 1e-3
    for number, lines in enumerate(broken):
        assert error(lines, f"broken-{number}") > 0.1, lines
