"""Scales that were folded by producers of other formats, and in layers whose norms have other names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.write import LLAMA, VARIANTS, Config, Tensors, tiny_tensors, write_tiny

from mixprec_build.errors import RefusedError
from mixprec_build.output.build import plan_recipe
from mixprec_build.planning.types import Plan
from mixprec_build.recipe.fix import RecipeFix

MODEL = replace(LLAMA, hidden=256, gain=1 / 16)
SPREAD = 0.5


def plan_of(folder: Path, lines: dict[str, str]) -> Plan:
    recipe = folder / "recipe.yaml"
    written = "".join(f"  '{pattern}': {source}\n" for pattern, source in lines.items())
    recipe.write_text(f"model: base\nsources: {{base: base, q: q}}\nweights:\n{written}")
    return plan_recipe(recipe)


def renamed(**words: str) -> Callable[[Tensors, Config], None]:
    def edit(tensors: Tensors, config: Config) -> None:
        config["model_type"] = "llama9"
        for name in list(tensors):
            new = name
            for old, word in words.items():
                new = new.replace(f".{old}.", f".{word}.")
            tensors[new] = tensors.pop(name)

    return edit


@pytest.mark.parametrize("variant", ["fp8_block", "fp8_channel", "gptq_int4"])
def test_norms_of_a_source_of_any_format_come_along_with_whole_blocks(tmp_path: Path, variant: str) -> None:
    write_tiny(tmp_path / "base", MODEL, "bf16")
    write_tiny(tmp_path / "q", MODEL, variant, fold=SPREAD)
    plan = plan_of(tmp_path, {"model.layers.0.*": "q"})
    norms = {name: m.source for name, m in plan.modules.items() if name.endswith("norm")}
    assert norms["model.layers.0.input_layernorm"] == norms["model.layers.0.post_attention_layernorm"] == "q"
    assert norms["model.layers.1.input_layernorm"] == norms["model.norm"] == "base"


def test_a_part_of_a_block_is_refused_with_the_line_that_takes_all_of_it(tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", MODEL, "bf16")
    write_tiny(tmp_path / "q", MODEL, "fp8_block", fold=SPREAD)
    with pytest.raises(RefusedError, match="come from one source where scales are folded into it, as they are in `q`"):
        plan_of(tmp_path, {"*.gate_proj": "q", "*.up_proj": "q", "*.0.self_attn.o_proj": "q", "*.k_proj": "q"})


def test_a_fine_tune_is_no_folding(tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", MODEL, "bf16")
    write_tiny(tmp_path / "q", replace(MODEL, seed=1), "fp8_block")
    with pytest.raises(RefusedError, match="they do not hold the same weights"):
        plan_of(tmp_path, {"model.layers.0.*": "q"})


@pytest.mark.parametrize(
    "words",
    [
        {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"},
        {"input_layernorm": "norm1", "post_attention_layernorm": "norm2"},
        {"self_attn": "attention", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"},
    ],
)
def test_norms_under_other_names_come_along(tmp_path: Path, words: dict[str, str]) -> None:
    write_tiny(tmp_path / "base", MODEL, "bf16", edit=renamed(**words))
    write_tiny(tmp_path / "q", MODEL, "awq_int4", fold=SPREAD, edit=renamed(**words))
    plan = plan_of(tmp_path, {"model.layers.0.*_proj": "q"})
    norms = {name: m.source for name, m in plan.modules.items() if m.format.kind != "awq_int4" and "norm" in name}
    norms |= {name: m.source for name, m in plan.modules.items() if ".ln_" in name}
    assert {source for name, source in norms.items() if ".layers.0." in name} == {"q"}
    assert {source for name, source in norms.items() if ".layers.1." in name} == {"base"}


def test_a_norm_that_feeds_two_blocks_comes_along_with_both_or_none(tmp_path: Path) -> None:
    """Cohere's and GPT-J's attention and MLP stand side by side, behind one norm."""

    def edit(tensors: Tensors, config: Config) -> None:
        config["model_type"] = "cohere9"
        for name in [name for name in tensors if "post_attention_layernorm" in name]:
            del tensors[name]

    write_tiny(tmp_path / "base", MODEL, "bf16", edit=edit)
    write_tiny(tmp_path / "q", MODEL, "awq_int4", fold=SPREAD, edit=edit)
    with pytest.raises(RefusedError, match="a norm and what it feeds must come from one source"):
        plan_of(tmp_path, {"*.self_attn.*": "q"})


# Linears that no known norm or linear feeds

UNKNOWN = {"up_proj": "widen", "down_proj": "narrow", "gate_proj": "choose"}


def scaled_apart(layers: Callable[[str], bool] = lambda name: True) -> Callable[[Tensors, Config], None]:
    """Divides outputs of ``up_proj`` and multiplies inputs of ``down_proj``; norms stay as they are."""

    def edit(tensors: Tensors, config: Config) -> None:
        for name in [name for name in tensors if name.endswith("up_proj.weight") and layers(name)]:
            scales = np.exp(SPREAD * np.random.default_rng(3).standard_normal(len(tensors[name]))).astype(np.float32)
            after = name.replace("up_proj", "down_proj")
            tensors[name] = (tensors[name].astype(np.float32) / scales[:, None]).astype(tensors[name].dtype)
            tensors[after] = (tensors[after].astype(np.float32) * scales).astype(tensors[after].dtype)

    return edit


def fp8_of(folder: Path, edit: Callable[[Tensors, Config], None]) -> None:
    """FP8 by channels of what ``edit`` makes of the weights, under other names."""

    def quantize(tensors: Tensors, config: Config) -> None:
        plain, described = tiny_tensors(MODEL, "bf16"), dict(config)
        edit(plain, described)
        for name in [name for name in plain if name.endswith("_proj.weight")]:
            made = VARIANTS["fp8_channel"].store(plain[name].astype(np.float32))
            tensors |= {name.replace("weight", leaf): value for leaf, value in made.items()}
        renamed(**UNKNOWN)(tensors, config)

    write_tiny(folder / "q", MODEL, "fp8_channel", edit=quantize)


@pytest.mark.parametrize("line", ["*.narrow", "*.widen"])
def test_a_linear_of_unknown_name_moves_together_with_what_feeds_it(tmp_path: Path, line: str) -> None:
    write_tiny(tmp_path / "base", MODEL, "bf16", edit=renamed(**UNKNOWN))
    fp8_of(tmp_path, scaled_apart())
    with pytest.raises(RefusedError, match="the inputs of narrow were scaled in one of two sources") as refused:
        plan_of(tmp_path, {line: "q"})
    fix = RecipeFix.merged(problem.fix for problem in refused.value.problems if problem.fix is not None)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(fix.apply(recipe.read_text()))
    plan = plan_recipe(recipe)
    mlp = {plan.modules[f"model.layers.{n}.mlp.{word}"].source for n in (0, 1) for word in ("narrow", "widen")}
    assert len(mlp) == 1


def test_linears_of_unknown_names_without_scales_may_part(tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", MODEL, "bf16", edit=renamed(**UNKNOWN))
    fp8_of(tmp_path, lambda tensors, config: None)
    assert plan_of(tmp_path, {"*.narrow": "q"}).modules["model.layers.0.mlp.narrow"].source == "q"


def test_linears_of_unknown_names_whose_values_are_elsewhere_are_noted(tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", MODEL, "bf16", edit=renamed(**UNKNOWN))
    fp8_of(tmp_path, scaled_apart())
    path = tmp_path / "base" / "model.safetensors"
    size, data = path.stat().st_size, path.read_bytes()
    with path.open("r+b") as file:  # only the header is there
        file.truncate(8 + int.from_bytes(data[:8], "little"))
        file.truncate(size)
    due = "model.layers.{0..1}.mlp.narrow: from `q`, and what may make their inputs is from `base`"
    assert any(note.startswith(due) for note in plan_of(tmp_path, {"*.narrow": "q"}).notes)


def test_a_whole_block_of_unknown_names_may_be_scaled(tmp_path: Path) -> None:
    write_tiny(tmp_path / "base", MODEL, "bf16", edit=renamed(**UNKNOWN))
    fp8_of(tmp_path, scaled_apart())
    assert plan_of(tmp_path, {"*.mlp.*": "q"}).modules["model.layers.0.mlp.narrow"].source == "q"


def test_scales_that_a_norm_explains_hold_no_other_linear_of_its_block(tmp_path: Path) -> None:
    """AWQ's, in a block whose linears have unknown names; of ``up_proj`` and ``down_proj`` none may be parted."""
    words = {"gate_proj": "choose", "q_proj": "ask"}
    write_tiny(tmp_path / "base", MODEL, "bf16", edit=renamed(**words))
    write_tiny(tmp_path / "q", MODEL, "awq_int4", fold=SPREAD, edit=renamed(**words))
    plan = plan_of(tmp_path, {"*.mlp.*": "q"})
    assert plan.modules["model.layers.0.post_attention_layernorm"].source == "q"
    assert plan.modules["model.layers.0.self_attn.ask"].source == "base"
