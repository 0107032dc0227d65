"""What a tool dropped of every layer is missed where another source has it, and can be taken from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
from support.write import DEEPSEEK, LLAMA, QWEN3_MOE, Config, Tensors, Tiny, write_tiny

from mixprec_build.errors import RefusedError
from mixprec_build.output.build import plan_recipe
from mixprec_build.planning.types import Plan

Edit = Callable[[Tensors, Config], None]
QWEN2 = Tiny("qwen2", attention_bias=True)
FIVE = replace(LLAMA, layers=5)


def without(*patterns: str) -> Edit:
    def edit(tensors: Tensors, config: Config) -> None:
        found = [name for name in tensors if any(fnmatchcase(name, pattern) for pattern in patterns)]
        assert found
        for name in found:
            del tensors[name]

    return edit


def plan_of(
    folder: Path, model: Tiny, lines: str, first: Edit | None = None, other: Edit | None = None, **options: object
) -> Plan:
    if not (folder / "first").exists():
        write_tiny(folder / "first", model, "bf16", edit=first)
        write_tiny(folder / "other", model, str(options.pop("variant", "fp8_block")), edit=other, **options)
    recipe = folder / "mix.yaml"
    recipe.write_text(f"model: first\nsources: {{first: first, other: other}}\ndefault: first\nweights:\n{lines}")
    return plan_recipe(recipe)


@pytest.mark.parametrize(
    ("model", "pattern", "name"),
    [
        (DEEPSEEK, "*.mlp.gate.*", "model.layers.1.mlp.gate"),
        (DEEPSEEK, "*.kv_a_layernorm.*", "model.layers.{0..1}.self_attn.kv_a_layernorm"),
        (QWEN3_MOE, "*.mlp.gate.*", "model.layers.{0..1}.mlp.gate"),
        (LLAMA, "*.post_attention_layernorm.*", "model.layers.{0..1}.post_attention_layernorm"),
    ],
)
def test_routers_and_norms_that_all_layers_lack(tmp_path: Path, model: Tiny, pattern: str, name: str) -> None:
    lines = "  '*.down_proj': other\n"
    with pytest.raises(RefusedError) as refused:
        plan_of(tmp_path, model, lines, without(pattern))
    (problem,) = refused.value.problems
    assert problem.code == "incomplete_model" and problem.hard
    assert str(problem).startswith(f"{name}: the mix has none, and `other` has;")
    assert str(problem).endswith(f"`{name}: other`")
    plan = plan_of(tmp_path, model, f"{lines}  '{name}': other\n")  # what the message says to do
    assert {m.source for m in plan.modules.values() if fnmatchcase(m.name, pattern.removesuffix(".*"))} == {"other"}


def test_a_parameter_without_a_module_is_a_warning(tmp_path: Path) -> None:
    """Not all of them are needed: some tools leave numbers of their own behind."""
    name = "model.layers.1.mlp.gate.e_score_correction_bias"

    def with_bias(tensors: Tensors, config: Config) -> None:
        tensors[name] = np.ones(4, np.float32)
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = np.ones(32, np.float32)
        tensors["model.layers.1.mlp.counts"] = np.ones(4, np.int64)

    lines = "  '*.experts.*': other\n"
    (warning,) = plan_of(tmp_path, DEEPSEEK, lines, other=with_bias).warnings
    assert warning.code == "incomplete_model" and warning.modules == (name,) and f"`{name}: other`" in str(warning)
    plan = plan_of(tmp_path, DEEPSEEK, f"{lines}  {name}: other\n")
    assert plan.modules[name].source == "other" and not plan.warnings


def test_biases_that_the_default_lacks(tmp_path: Path) -> None:
    with pytest.raises(RefusedError) as refused:
        plan_of(tmp_path, QWEN2, "  '*.mlp.*': other\n", without("*proj.bias"), variant="gptq_int4")
    (problem,) = refused.value.problems
    assert str(problem).startswith(
        "model.layers.{0..1}.self_attn.{k_proj,q_proj,v_proj}: `other` has a bias that is not zero, and `first`, which "
        "the mix takes this from, has none"
    )


def test_biases_of_zeros_are_not_missed(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, LLAMA, "  '*.mlp.*': other\n", variant="gptq_int4", zero_bias=True)
    assert not plan.warnings and not [m for m in plan.modules.values() if "bias" in m.tensors]


# Names that braces list


@pytest.mark.parametrize(
    ("lacks", "listed"),
    [
        ("*.layers.[13].input_layernorm.*", "model.layers.{1,3}.input_layernorm"),
        ("*.layers.[13].mlp.*", "model.layers.{1,3}.mlp.{down_proj,gate_proj,up_proj}"),
    ],
)
def test_a_refusal_of_several_layers_says_what_helps(tmp_path: Path, lacks: str, listed: str) -> None:
    lines = "  '*.o_proj': other\n"
    with pytest.raises(RefusedError) as refused:
        plan_of(tmp_path, FIVE, lines, without(lacks))
    (problem,) = refused.value.problems
    assert f"Add below line 5: `{listed}: other`" in str(problem)
    plan = plan_of(tmp_path, FIVE, f"{lines}  '{listed}': other\n")
    assert {m.source for m in plan.modules.values() if fnmatchcase(f"{m.name}.x", lacks)} == {"other"}


def test_a_wildcard_takes_nothing_along_that_the_default_lacks(tmp_path: Path) -> None:
    def more(tensors: Tensors, config: Config) -> None:
        tensors["model.layers.0.mlp.extra_proj.weight"] = np.ones((8, 8), np.float32)

    plan = plan_of(tmp_path, LLAMA, "  'model.layers.0.mlp.*': other\n", other=more)
    assert "model.layers.0.mlp.extra_proj" not in plan.modules
