"""A rule of one model class of SGLang's is not applied to others that share a name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.write import DEEPSEEK, Config, Tensors, write_tiny

from mixprec_build.errors import RefusedError
from mixprec_build.families.facts import ModelFacts
from mixprec_build.output.build import plan_recipe
from mixprec_build.planning.rules import decided_groups


def test_shared_experts_of_another_class_may_be_fp8_by_channels(tmp_path: Path) -> None:
    def edit(tensors: Tensors, config: Config) -> None:
        config.update(family)

    for family in ({"model_type": "ernie4_5_moe"}, {}):
        for variant, folder in (("bf16", "bf16"), ("fp8_channel", "fp8")):
            write_tiny(tmp_path / str(len(family)) / folder, replace(DEEPSEEK, layers=2), variant, edit=edit)
        recipe = tmp_path / str(len(family)) / "recipe.yaml"
        recipe.write_text("model: bf16\nsources: {bf16: bf16, q: fp8}\nweights: {'*.shared_experts.*': q}\n")
        if family:
            assert plan_recipe(recipe).modules["model.layers.1.mlp.shared_experts.down_proj"].source == "q"
        else:
            with pytest.raises(RefusedError, match="SGLang asks shared experts for a config"):
                plan_recipe(recipe)


@pytest.mark.parametrize(
    ("config", "compares"),
    [
        ({"model_type": "deepseek_v32"}, True),
        ({"model_type": "glm4_moe"}, True),
        ({"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2"}}, True),
        ({"model_type": "x", "architectures": ["DeepseekV3ForCausalLM"]}, True),
        ({"model_type": "ernie4_5_moe"}, False),
        ({"model_type": "hunyuan_v1_moe", "architectures": ["HunYuanMoEV1ForCausalLM"]}, False),
    ],
)
def test_which_classes_compare(config: Config, compares: bool) -> None:
    assert bool(ModelFacts.of(config).family.compared) is compares


@pytest.mark.parametrize(("model_type", "together"), [("deepseek_v3", True), ("ernie4_5_moe", False)])
def test_suggest_chooses_one_source_for_them_only_where_they_are_compared(model_type: str, together: bool) -> None:
    family = ModelFacts.of({"model_type": model_type}).family
    names = [f"model.layers.1.mlp.shared_experts.{word}_proj" for word in ("gate", "up", "down")]
    groups = decided_groups(names, family)
    assert sorted(map(len, groups.values())) == ([3] if together else [1, 2])


@pytest.mark.parametrize("variant", ["ct_int4", "ct_nvfp4"])
@pytest.mark.parametrize(("model_type", "refused"), [("glm4_moe", True), ("deepseek_v3", False)])
def test_packed_values_that_a_class_does_not_find(tmp_path: Path, variant: str, model_type: str, refused: bool) -> None:
    """GLM-4.5's class looks at a parameter ``weight`` of gate and up; DeepSeek's gives packed values that name."""

    def edit(tensors: Tensors, config: Config) -> None:
        config["model_type"] = model_type

    for name, stored in (("bf16", "bf16"), ("q", variant)):
        write_tiny(tmp_path / name, DEEPSEEK, stored, edit=edit)
    recipe = tmp_path / "recipe.yaml"

    def plan(lines: str) -> None:
        recipe.write_text(f"model: bf16\nsources: {{bf16: bf16, q: q}}\nweights: {{{lines}}}\n")
        plan_recipe(recipe)

    plan("'*.mlp.experts.*': q, '*.shared_experts.down_proj': q")
    if refused:
        with pytest.raises(RefusedError, match=rf"shared experts' gate and up, and {variant} has none of that name"):
            plan("'*.shared_experts.*': q")
    else:
        plan("'*.shared_experts.*': q")
