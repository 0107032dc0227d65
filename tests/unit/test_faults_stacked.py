"""Experts that a source keeps in one tensor a layer are named, and no line passes over them without a word."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.write import QWEN3_MOE, Config, Tensors, write_tiny

from mixprec_build.checkpoint.typed import open_source
from mixprec_build.errors import RefusedError
from mixprec_build.output.build import plan_recipe
from mixprec_build.planning.types import Plan
from mixprec_build.recipe.fix import RecipeFix
from mixprec_build.recipe.recipe import load_recipe
from mixprec_build.recipe.sources import open_sources
from mixprec_build.report.facts import inspect_facts
from mixprec_build.suggesting.choices import Choices, Request

BLOCK = "model.layers.{}.mlp.experts"
NAMES = "model.layers.{0..1}.mlp.experts.{down_proj,gate_up_proj}"


def stacked(tensors: Tensors, config: Config) -> None:
    """As transformers 5 saves experts."""
    for layer in range(2):
        block = BLOCK.format(layer)

        def of(expert: int, part: str, block: str = block) -> np.ndarray:
            return tensors.pop(f"{block}.{expert}.{part}.weight")

        ups = [np.concatenate([of(e, "gate_proj"), of(e, "up_proj")]) for e in range(4)]
        tensors[f"{block}.gate_up_proj"] = np.stack(ups)
        tensors[f"{block}.down_proj"] = np.stack([of(e, "down_proj") for e in range(4)])


def of_unknown_class(tensors: Tensors, config: Config) -> None:
    stacked(tensors, config)
    renamed(tensors, config)


def renamed(_: Tensors, config: Config) -> None:
    config |= {"model_type": "new_moe", "architectures": ["NewMoeForCausalLM"]}


def recipe(folder: Path, lines: str, default: str = "bf16", *, known: bool = False) -> Path:
    write_tiny(folder / "bf16", QWEN3_MOE, "bf16", edit=stacked if known else of_unknown_class)
    write_tiny(folder / "int4", QWEN3_MOE, "gptq_int4", edit=None if known else renamed)
    path = folder / "recipe.yaml"
    path.write_text(f"model: bf16\nsources: {{bf16: bf16, int4: int4}}\ndefault: {default}\nweights:\n  {lines}\n")
    return path


def fixed(path: Path, refused: RefusedError) -> Plan:
    """The plan of a recipe after the edits that its problems ask for."""
    fix = RecipeFix.merged(problem.fix for problem in refused.problems if problem.fix is not None)
    assert fix == RecipeFix.from_json(json.loads(json.dumps(fix.to_json()))) != RecipeFix()
    path.write_text(fix.apply(path.read_text()))
    return plan_recipe(path)


@pytest.mark.parametrize(
    ("pattern", "stay"),
    [("model.layers.*", ", add below line 5: `lm_head: bf16`, `model.embed_tokens: bf16`"), ("'*'", "")],
)
def test_a_line_for_all_does_not_pass_over_them(tmp_path: Path, pattern: str, stay: str) -> None:
    path = recipe(tmp_path, f"{pattern}: int4")
    with pytest.raises(RefusedError) as refused:
        plan_recipe(path)
    (problem,) = refused.value.problems
    assert str(problem) == (
        f"{NAMES}: `bf16` keeps all experts of a layer in one tensor, which line 5 "
        f"`{pattern.strip(chr(39))}: int4` does not reach: `int4` stores each expert on its own; lines that leave "
        f"experts out are planned, too. Change line 3 to `default: int4`{stay}"
    )
    plan = fixed(path, refused.value)
    assert plan.modules["model.layers.1.mlp.experts.3.up_proj"].source == "int4"
    assert plan.modules["lm_head"].source == ("bf16" if stay else "int4")


def test_a_line_for_them_alone_says_why_it_cannot_be(tmp_path: Path) -> None:
    path = recipe(tmp_path, "model.layers.*.mlp.experts.*: int4")
    with pytest.raises(RefusedError, match=r"one tensor, which no line can take apart, and `int4` stores") as refused:
        plan_recipe(path)
    plan = fixed(path, refused.value)
    kinds = {
        name: plan.modules[f"model.layers.0.{name}"].source for name in ("self_attn.q_proj", "mlp.experts.0.up_proj")
    }
    assert kinds == {"self_attn.q_proj": "bf16", "mlp.experts.0.up_proj": "int4"}


def test_a_recipe_without_a_default_is_given_one(tmp_path: Path) -> None:
    path = recipe(tmp_path, "model.layers.*: int4")
    path.write_text("model: bf16\nsources: {bf16: bf16, int4: int4}\nweights:\n  model.layers.*: int4\n")
    with pytest.raises(RefusedError, match=r"Add below line 4: .*, add `default: int4`") as refused:
        plan_recipe(path)
    assert fixed(path, refused.value).modules["model.layers.1.mlp.experts.3.up_proj"].source == "int4"


def test_where_no_edit_can_name_the_present_default_the_advice_says_so_in_words(tmp_path: Path) -> None:
    path = recipe(tmp_path, "model.layers.*: int4")
    path.write_text("model: bf16\nsources: {int4: int4}\nweights:\n  model.layers.*: int4\n")
    with pytest.raises(RefusedError, match="Make `int4` the default") as refused:
        plan_recipe(path)
    assert [problem.fix for problem in refused.value.problems] == [None]


def test_the_other_form_of_recipes_has_no_default_to_change(tmp_path: Path) -> None:
    path = recipe(tmp_path, "model.layers.*: int4")
    path.write_text(
        "mixed_precision:\n  fp16_path: bf16\n  int4_path: int4\n  weight_mapping:\n    model.layers.*: int4\n"
    )
    with pytest.raises(RefusedError, match="Make `int4` the default") as refused:
        plan_recipe(path)
    assert [problem.fix for problem in refused.value.problems] == [None]


def test_a_line_takes_none_from_such_a_source(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"`bf16` has no .*: `bf16` keeps all experts of a layer in one tensor"):
        plan_recipe(recipe(tmp_path, "model.layers.0.mlp.experts.*: bf16", "int4"))


def test_lines_for_other_modules_and_the_other_default_are_planned(tmp_path: Path) -> None:
    assert plan_recipe(recipe(tmp_path, "model.layers.*.self_attn.*: int4")).modules
    (tmp_path / "other").mkdir()
    plan = plan_recipe(recipe(tmp_path / "other", "model.layers.*.self_attn.*: bf16", "int4"))
    assert "model.layers.0.mlp.experts.0.up_proj" in plan.modules


def test_a_class_that_cannot_load_them_is_refused_whatever_the_lines_say(tmp_path: Path) -> None:
    path = recipe(tmp_path, "model.layers.*.self_attn.*: int4", known=True)
    with pytest.raises(RefusedError, match=r"SGLang's class for qwen3_moe has no parameter for such a ten") as refused:
        plan_recipe(path)
    assert fixed(path, refused.value).modules["model.layers.1.mlp.experts.3.up_proj"].source == "int4"


def test_inspect_shows_them(tmp_path: Path) -> None:
    recipe(tmp_path, "model.layers.*: int4")
    notes = inspect_facts(open_source(str(tmp_path / "bf16")), tmp_path / "bf16")["notes"]
    assert sorted(note.partition(": ")[2].partition(" (")[0] for note in notes) == [
        "all experts of a layer in one tensor, BF16 [4, 128, 256]",
        "all experts of a layer in one tensor, BF16 [4, 512, 128]",
    ]


def test_inspect_shows_those_that_lie_in_no_block_of_experts(tmp_path: Path) -> None:
    def joined(tensors: Tensors, config: Config) -> None:
        """As Granite has them, of a type that nothing is known of."""
        of_unknown_class(tensors, config)
        for layer in range(2):
            block, home = BLOCK.format(layer), f"model.layers.{layer}.block_sparse_moe"
            for part, name in (("gate_up_proj", "input_linear"), ("down_proj", "output_linear")):
                tensors[f"{home}.{name}.weight"] = tensors.pop(f"{block}.{part}")

    write_tiny(tmp_path / "bf16", QWEN3_MOE, "bf16", edit=joined)
    notes = inspect_facts(open_source(str(tmp_path / "bf16")), tmp_path / "bf16")["notes"]
    (names, *_), (others, *_) = (note.partition(": ") for note in sorted(notes))
    assert {names, others} == {f"model.layers.{{0..1}}.block_sparse_moe.{n}put_linear" for n in ("in", "out")}


def test_suggest_says_that_no_source_can_be_chosen_for_them(tmp_path: Path) -> None:
    base = load_recipe(recipe(tmp_path, "model.layers.*.self_attn.*: int4"))
    notes = Choices(base, open_sources(base), Request(1 << 30)).notes
    assert (
        f"{NAMES}: as in recipe.yaml, for no source can be chosen: `bf16` keeps all experts of a layer in one tensor; "
        "it can with `default: int4`, which stores each expert on its own"
    ) in notes
