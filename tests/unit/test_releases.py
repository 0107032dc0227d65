"""Rules that only some releases of SGLang keep: plans for one release, and what the manifest records for others."""

from __future__ import annotations

import importlib.metadata
from dataclasses import replace
from pathlib import Path

import pytest
from support.run import invoke
from support.write import LLAMA, write_tiny

import mixprec_build as mp
from mixprec_build.checkpoint.manifest import read_manifest
from mixprec_build.versions import NEWEST, RULES, beside, between


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """MLPs in GPTQ, whose down projections have 160 inputs, which Marlin does not take."""
    model = replace(LLAMA, intermediate=160)
    write_tiny(tmp_path / "bf16", model, "bf16")
    write_tiny(tmp_path / "int4", model, "gptq_int4", group_size=32)
    recipe = tmp_path / "mix.yaml"
    recipe.write_text("model: bf16\nsources: {bf16: bf16, int4: int4}\nweights: {'*.mlp.*': int4}\n")
    return recipe


@pytest.mark.parametrize(("release", "served"), [("0.5.15.post1", True), ("0.5.19", True), ("0.5.20", False)])
def test_a_kernel_that_a_release_has_no_more(recipe: Path, release: str, served: bool) -> None:
    if served:
        plan = mp.plan(recipe, sglang=release)
        assert plan.sglang == release
        assert plan.needs == {"gptq_untiled": ["model.layers.{0..1}.mlp.down_proj"]}
        manifest = read_manifest(mp.build(plan, recipe.parent / "out").parent)
        assert (manifest.planned_for, manifest.needs) == (release, plan.needs)
        return
    with pytest.raises(mp.RefusedError, match=f"its 160 inputs .*, and the plan is for SGLang {release}") as refused:
        mp.plan(recipe, sglang=release)
    (problem,) = refused.value.problems
    assert problem.code == "kernel_limit" and [*problem.modules] == ["model.layers.{0..1}.mlp.down_proj"]
    assert problem.fix is not None


def test_the_default_is_the_release_beside_mixprec(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(package: str) -> str:
        assert package == "sglang"
        return "0.5.16"

    monkeypatch.setattr(importlib.metadata, "version", found)
    assert beside() == "0.5.16" and mp.plan(recipe).sglang == "0.5.16"

    def missing(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert beside() == NEWEST
    with pytest.raises(mp.RefusedError, match=f"the plan is for SGLang {NEWEST}"):
        mp.plan(recipe)


def test_the_option_of_the_command(recipe: Path) -> None:
    assert invoke("plan", str(recipe), "--sglang", "0.5.17").exit_code == 0
    refused = invoke("plan", str(recipe), "--sglang", "0.5.23")
    assert refused.exit_code and "SGLang 0.5.23" in str(refused.exception)
    for text, said in (("0.5.14", "serves with SGLang 0.5.15.post1 and newer"), ("newest", "is no release of SGLang")):
        wrong = invoke("plan", str(recipe), "--sglang", text)
        assert wrong.exit_code == 2 and said in " ".join(wrong.output.replace("│", " ").split())


def test_windows_of_releases() -> None:
    assert between("", "0.5.20", "0.5.19.post2") and not between("", "0.5.20", "0.5.20")
    assert between("0.5.17", "", "0.5.17.dev1+gabc") and not between("0.5.17", "", "0.5.16")
    assert {name for name, rule in RULES.items() if rule.holds_in("0.5.17")} == {"gptq_untiled"}
