"""Recipes of very many patterns: planned in seconds, or refused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from support.write import LLAMA, write_tiny

from mixprec_build.checkpoint.declaration import Declaration
from mixprec_build.errors import RecipeError, SourceError
from mixprec_build.output.build import plan_recipe
from mixprec_build.patterns.budget import MatchBudget


def write_recipe(folder: Path, globs: list[str]) -> Path:
    write_tiny(folder / "bf16", LLAMA, "bf16")
    write_tiny(folder / "fp8", LLAMA, "fp8_block")
    lines = "".join(f"  '{glob}': fp8\n" for glob in globs)
    recipe = folder / "mix.yaml"
    recipe.write_text(f"model: ./bf16\nsources: {{bf16: ./bf16, fp8: ./fp8}}\ndefault: bf16\nweights:\n{lines}")
    return recipe


def test_the_last_of_two_thousand_patterns_wins(tmp_path: Path) -> None:
    globs = [f"model.layers.*.mlp.experts.{{{n},{n + 1}}}.*" for n in range(1_998)]
    recipe = write_recipe(tmp_path, ["model.layers.{0,7}.mlp.*", *globs])
    plan = plan_recipe(recipe)
    assert plan.modules["model.layers.0.mlp.up_proj"].source == "fp8"
    assert plan.modules["model.layers.1.mlp.up_proj"].source == "bf16"
    assert [use.matched for use in plan.rules] == [3, *[0] * 1_998]
    assert any("no module that it matches has the number 7" in note for note in plan.notes)


def test_patterns_that_would_take_too_long_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path, ["*a*b*c*d", "*e*f*g*h"])
    monkeypatch.setattr(MatchBudget, "SECONDS", 0.0)
    with pytest.raises(RecipeError) as caught:
        plan_recipe(recipe)
    assert str(caught.value).startswith(f"{recipe}: takes more than 0 seconds to match: it has 2 patterns; write fewer")


def test_so_are_those_of_a_compiled_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    formats = {"bf16": {"kind": "bf16"}, "fp16": {"kind": "fp16"}}
    modules = [[f"*layers.{n}*", "fp16"] for n in range(2_000)]
    made = {"quant_method": "mixprec", "version": 1, "formats": formats, "modules": modules, "default": "bf16"}
    declaration = Declaration.from_json(json.loads(json.dumps(made)))
    began = time.process_time()
    kinds = [declaration.format_of(f"model.layers.{n}.mlp").kind for n in (0, 1999)]
    assert kinds == ["fp16", "fp16"] and declaration.format_of("lm_head").kind == "bf16"
    assert time.process_time() - began < 5
    monkeypatch.setattr(MatchBudget, "SECONDS", 0.0)
    with pytest.raises(SourceError, match="takes more than 0 seconds to match"):
        for _ in range(9):
            declaration.format_of("model.layers.7.mlp")
