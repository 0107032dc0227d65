"""Problems as data: what ``--json`` and the manifest carry, and fixes that a program applies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.llama import write_recipe, write_sources
from support.run import run_python

import mixprec_build as mp
from mixprec_build.planning.problems import CODES
from mixprec_build.recipe.fix import Line, RecipeFix

ATTENTION = "model.layers.0.self_attn"

REFUSED: Mapping[str, tuple[dict[str, str], str]] = {
    "an exact line parts q from k and v": (
        {f"{ATTENTION}.q_proj": "fp8", f"{ATTENTION}.k_proj": "int4", f"{ATTENTION}.v_proj": "fp8"},
        "fused_formats",
    ),
    "a glob parts gate from up": ({"model.layers.*.mlp.up_proj": "int4"}, "fused_formats"),
    "an exact line parts v from the rest of a glob": (
        {"model.layers.*.self_attn.*": "fp8", f"{ATTENTION}.v_proj": "bf16"},
        "fused_formats",
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_sources(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("weights", "code"), REFUSED.values(), ids=REFUSED)
def test_a_fix_is_applied_by_a_program(folder: Path, weights: dict[str, str], code: str) -> None:
    recipe = write_recipe(folder / "mix.yaml", weights)
    ended = run_python("-m", "mixprec_build", "plan", str(recipe), "--json")
    assert ended.returncode == 1
    refused = json.loads(ended.stdout)["refused"]
    assert [problem["code"] for problem in refused] == [code] and code in CODES
    assert f"  - {refused[0]['message']}\n" in ended.stderr
    fix = RecipeFix.merged([RecipeFix.from_json(problem["fix"]) for problem in refused])
    assert fix.sentence() in refused[0]["message"]
    recipe.write_text(fix.apply(recipe.read_text()))
    assert not mp.plan(recipe).problems


def test_allowed_problems_are_in_plan_build_and_manifest(folder: Path) -> None:
    recipe = write_recipe(folder / "mix.yaml", {"model.layers.*.mlp.up_proj": "int4"})
    command = ["-m", "mixprec_build", "plan", str(recipe), "--json", "--allow", "unservable"]
    planned = json.loads(run_python(*command).stdout)["problems"]
    out = folder / "out"
    command[2:4] = ["build", str(recipe), "-o", str(out)]
    built = json.loads(run_python(*command).stdout)["problems"]
    recorded = json.loads((out / "mixprec_manifest.json").read_text())["problems"]
    assert planned == built == recorded == mp.inspect(out)["problems"]
    assert [problem["modules"] for problem in planned] == [["model.layers.{0..1}.mlp.{gate_proj,up_proj}"]]
    assert RecipeFix.from_json(planned[0]["fix"]).add or RecipeFix.from_json(planned[0]["fix"]).change


NEW = (Line(0, "lm_head", "bf16"), Line(0, "*.o_proj", "fp8"))


@pytest.mark.parametrize(
    ("fix", "before", "after"),
    [
        (
            RecipeFix(add=NEW),
            "model: a\nweights: {}  # none\n",
            'model: a\nweights:\n  lm_head: bf16\n  "*.o_proj": fp8\n',
        ),
        (RecipeFix(add=NEW[:1]), "model: a", "model: a\nweights:\n  lm_head: bf16\n"),
        (
            RecipeFix(add=NEW[:1], section="weight_mapping"),
            "mixed_precision:\n  fp8_path: b\n",
            "mixed_precision:\n  weight_mapping:\n    lm_head: bf16\n  fp8_path: b\n",
        ),
        (
            RecipeFix((Line(3, "a.b", "fp8"),), (Line(5, "c.*", "int4"),), NEW[:1], below=5),
            "# kept\nweights:\n    a.b: int4\n\n    c.*: int4\noutput: {}\n",
            "# kept\nweights:\n    a.b: fp8\n\n    lm_head: bf16\noutput: {}\n",
        ),
    ],
)
def test_the_rest_of_a_recipe_stays(fix: RecipeFix, before: str, after: str) -> None:
    assert fix.apply(before) == after
    assert RecipeFix.from_json(json.loads(json.dumps(fix.to_json()))) == fix


def test_a_line_with_several_rules_is_not_edited() -> None:
    fix = RecipeFix(change=(Line(2, "a", "fp8"),))
    with pytest.raises(mp.RecipeError, match="write each rule on a line of its own"):
        fix.apply("model: a\nweights: {a: int4, b: fp8}\n")
