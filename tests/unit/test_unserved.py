"""Models that no class of SGLang's takes as they are compiled: refused by plan and doctor, with a way out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import producers as made
from support.write import LLAMA, write_tiny

from mixprec_build.errors import RefusedError
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.report.doctor import examine

V4 = {"*.experts.?.*": made.DSV4_MXFP4, "*.shared_experts.*": made.DSV4_FP8, "*.attn.w*": made.DSV4_FP8}
MISTRAL4 = {"model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"]}


def recipe_of(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({**MISTRAL4, "text_config": {"model_type": "mistral4"}}, "Name a folder with params.json and consolidated"),
        ({"model_type": "mistral4", "architectures": ["Mistral4ForCausalLM"]}, "no class for the decoder `mistral4`"),
        ({"model_type": "deepseek_v41"}, "DeepSeek-V4.1.*Serve the release by itself"),
        ({"model_type": "x", "architectures": ["DeepseekV41ForCausalLM"]}, "DeepSeek-V4.1"),
        ({"model_type": "deepseek_ref", "architectures": ["DeepseekV4ForCausalLM"]}, "says deepseek_v4"),
    ],
)
def test_it_is_refused_before_a_build_and_by_doctor(tmp_path: Path, config: dict[str, Any], text: str) -> None:
    written = write_tiny(tmp_path / "q", LLAMA, "bf16") / "config.json"
    written.write_text(json.dumps({**json.loads(written.read_text()), **config}))
    recipe = recipe_of(tmp_path, "model: q\n")
    with pytest.raises(RefusedError, match=text) as refused:
        plan_recipe(recipe)
    assert [problem.code for problem in refused.value.problems] == ["unserved_model"]
    run_plan(plan_recipe(recipe, allow_unservable=True), tmp_path / "out")
    told = [finding.text for finding in examine(tmp_path / "out") if finding.status == "fail"]
    assert sum(refused.value.problems[0].text in one for one in told) == 1


@pytest.mark.parametrize("classes", [["DeepseekV4ForCausalLM"], ["DeepseekRefForCausalLM"]])
def test_a_type_that_no_server_knows_is_a_source_beside_one_that_it_knows(tmp_path: Path, classes: list[str]) -> None:
    """The release of DeepSeek-V4 in FP8: what is built has the type of ``model:``."""
    release = made.Checkpoint(made.deepseek_v4(), V4 | {"mtp.0.[eh]_proj": made.DSV4_FP8})
    real = made.real_config("deepseek-v4-flash")
    release.write(tmp_path / "v4", real)
    release.write(tmp_path / "fp8", {**real, "config": {**real["config"], "model_type": "deepseek_ref"}})
    path = tmp_path / "fp8" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": classes}))
    lines = "{'layers.1.ffn.experts.{0..1}.*': fp8, mtp: fp8}"
    text = f"model: v4\nsources: {{v4: v4, fp8: fp8}}\ndefault: v4\nweights: {lines}\n"
    plan = plan_recipe(recipe_of(tmp_path, text))
    assert {module.source for module in plan.modules.values() if module.draft} == {"fp8"}
    run_plan(plan, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "deepseek_v4"


def test_stages_of_dspark_are_no_draft_layers_that_a_server_loads(tmp_path: Path) -> None:
    """As releases of DeepSeek-V4 have them since 0731: three, of which the first projects hidden states."""
    skeleton = made.deepseek_v4()
    own = ("e_proj", "h_proj", "enorm", "hnorm", "norm", "hc_head")
    parts = [part for part in skeleton.parts if not part.name.startswith(tuple(f"mtp.0.{name}" for name in own))]
    stage = [part for part in parts if part.name.startswith("mtp.0.")]
    parts += [part._replace(name=part.name.replace("mtp.0", f"mtp.{n}")) for n in (1, 2) for part in stage]
    parts += [made.Part("mtp.0.main_proj", (256, 768)), made.Part("mtp.0.main_norm", (256,))]
    parts += [made.Part("mtp.2.norm", (256,)), made.Part("mtp.2.markov_head.markov_w1", (256, 32))]
    release = made.Checkpoint(replace(skeleton, parts=parts), V4 | {"mtp.0.main_proj": made.DSV4_FP8})
    real = made.real_config("deepseek-v4-flash")
    release.write(tmp_path / "v4", {**real, "config": {**real["config"], "dspark_block_size": 5}})
    recipe = recipe_of(tmp_path, "model: v4\n")
    with pytest.raises(RefusedError, match=r"mtp\.0\.main_proj: .*are stages of DSpark.*--drop-mtp") as refused:
        plan_recipe(recipe)
    assert [problem.code for problem in refused.value.problems] == ["unserved_model"]
    assert not [name for name in plan_recipe(recipe, drop_mtp=True).modules if name.startswith("mtp")]
