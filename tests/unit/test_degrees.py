"""Degrees that a recipe asks for, or `--gpus`: what says that SGLang's class refuses them. Every class is asked in
``tests/sglang/test_degrees.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.degrees import variants, write_variant

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.errors import MixprecError
from mixprec_build.output.build import plan_recipe


def write(folder: Path, name: str, changed: str, tp: int) -> Path:
    """A recipe of a tiny model's variant that asks for files of ``tp`` ranks."""
    write_variant(folder / "model", name, dict(variants(name))[changed])
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"model: {folder / 'model'}\noutput: {{tp: [{tp}]}}\n")
    return recipe


@pytest.mark.parametrize(
    ("name", "changed", "tp", "why"),
    [
        ("deepseek_v4", "o_groups 8", 16, r"layers\.0\.attn\.wo_b: 8 groups cannot be shared by 16 ranks; tp 1, 2"),
        ("deepseek_v4", "o_groups 3", 4, r"layers\.0\.attn\.wo_b: 3 groups cannot be shared by 4 ranks"),
        ("internlm2", "num_key_value_heads 8", 3, r"wqkv: 8 heads cannot be shared by 3 ranks; tp 1, 2, 4, 8, 16"),
        ("llama4", "text_config.num_key_value_heads 8", 3, r"k_proj: 8 heads cannot be shared by 3 ranks; tp 1, 2, 4"),
        ("glm4_moe", "n_routed_experts 3", 4, r"glm4_moe takes no more ranks than there are experts \(3\); tp 1, 2, 3"),
        ("mistral3", "vision_config.num_attention_heads 8", 3, r"the 8 num_attention_heads of its encoder cannot be"),
        ("gemma3_images", "vision_config.image_size 448", 3, r"the 1024 positions of its encoder cannot be"),
    ],
)  # fmt: skip
def test_a_degree_that_the_class_refuses_is_refused_with_the_line(
    tmp_path: Path, name: str, changed: str, tp: int, why: str
) -> None:
    with pytest.raises(MixprecError, match=rf"recipe\.yaml:2: tp {tp}: .*{why}"):
        plan_recipe(write(tmp_path, name, changed, tp))


def test_more_ranks_than_experts_are_planned_where_the_class_takes_them(tmp_path: Path) -> None:
    assert plan_recipe(write(tmp_path, "granitemoe", "num_local_experts 3", 4)).presplit.keys() == {str(Degree(4))}


@pytest.mark.parametrize(("tp", "noted"), [(4, False), (16, True)])
def test_an_encoder_that_ranks_cannot_share_needs_a_flag(tmp_path: Path, tp: int, noted: bool) -> None:
    plan = plan_recipe(write(tmp_path, "qwen3_vl", "vision_config.num_heads 8", tp))
    said = f"tp{tp}-ep1: the 8 num_heads of its encoder cannot be shared by {tp} ranks; start SGLang with --mm-enable-"
    assert any(note.startswith(said) for note in plan.notes) == noted


def test_gpus_that_the_class_refuses(tmp_path: Path) -> None:
    from mixprec_build import api

    plan = plan_recipe(write(tmp_path, "deepseek_v4", "o_groups 8", 8))
    memory: Any = api.memory(plan, "8x80GB")
    assert memory["tp"] == 8
    with pytest.raises(MixprecError, match=r"on 16 x 80\.0 GB: .*wo_b: 8 groups cannot be shared by 16 ranks"):
        api.memory(plan, "16x80GB")
