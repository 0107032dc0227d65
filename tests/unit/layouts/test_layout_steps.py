"""Changes of a layout that are stopped or fail at any step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.files import tree
from support.run import call

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.checkpoint.manifest import read_manifest
from mixprec_build.errors import WriteError
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.split import split
from mixprec_build.output.verify import verify

from .compiled import Killed


@pytest.mark.parametrize(
    ("before", "change"),
    [
        ([], (Degree(2), "presplit")),
        ([(Degree(2), "presplit")], (None, "both")),
        ([(Degree(2), "presplit")], (Degree(1), "presplit")),
        ([(Degree(2), "presplit")], (Degree(1), "both")),
        ([(Degree(2), "presplit")], (None, "merged")),
        ([(Degree(1), "both"), (Degree(2), "both")], (None, "presplit")),
        ([(Degree(2), "both")], (None, "merged")),
    ],
)
def test_a_change_that_is_stopped_anywhere_can_be_repeated(
    out: Path, tmp_path: Path, stop: Any, before: list[Any], change: Any
) -> None:
    for degree, layout in before:
        split(out, degree, layout=layout)
    degree, layout = change
    due = Path(shutil.copytree(out, tmp_path / "due"))
    split(due, degree, layout=layout, jobs=1)
    expected, steps = tree(due), 0
    while True:
        steps += 1
        one = Path(shutil.copytree(out, tmp_path / "one"))
        stop(steps)
        try:
            split(one, degree, layout=layout, jobs=1)
        except Killed:
            stop(0)
            assert verify(one).differences == (), f"step {steps}"
            split(one, degree, layout=layout)
            assert tree(one) == expected, f"step {steps}"
            shutil.rmtree(one)
        else:
            stop(0)
            break
    assert steps >= 3 and tree(one) == expected
    assert verify(one).leftovers == ()


def test_a_build_that_is_stopped_anywhere_is_whole_or_not_there(small: Path, tmp_path: Path, stop: Any) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = (small.parent / "recipe.yaml").read_text()
    recipe.write_text(text.replace("1MiB", "1MiB, tp: [2, 1], layout: presplit"))
    plan, out = plan_recipe(recipe), tmp_path / "out"
    run_plan(plan, tmp_path / "due", jobs=1)
    expected, steps = tree(tmp_path / "due"), 0
    while True:
        steps += 1
        stop(steps)
        try:
            run_plan(plan, out, jobs=1)
        except Killed:
            stop(0)
            if out.exists():  # stopped while the stage was removed
                assert tree(out) == expected
            else:
                run_plan(plan, out, jobs=1)
            assert tree(out) == expected, f"step {steps}"
            assert [path.name for path in tmp_path.glob(".out*")] in ([], [".out.mixprec"])
            shutil.rmtree(out)
            shutil.rmtree(tmp_path / ".out.mixprec", ignore_errors=True)
        else:
            stop(0)
            break
    assert steps > 10 and not list(tmp_path.glob(".out*"))


def test_a_build_whose_cut_fails_goes_on_from_its_files(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((small.parent / "recipe.yaml").read_text().replace("1MiB", "1MiB, tp: 2, layout: presplit"))
    plan, out = plan_recipe(recipe), tmp_path / "out"
    monkeypatch.setattr("mixprec_build.ranks.assemble.pwrite_all", full)
    with pytest.raises(WriteError, match="3 of 3 files are finished and kept"):
        run_plan(plan, out)
    monkeypatch.undo()
    assert not out.exists()
    run_plan(plan, out)
    assert not verify(out).differences and read_manifest(out).layout == "presplit"


def full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_what_was_left_behind_is_named(out: Path, stop: Any, capsys: Any) -> None:
    stop(9)  # two ranks, two manifests (an unlink and a rename each) and the rest take seven
    with pytest.raises(Killed):
        split(out, Degree(2), layout="presplit", jobs=1)
    stop(0)
    assert verify(out).leftovers == ("model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors")
    assert call("verify", out) == 0
    assert "left behind by a `mixprec split` that was stopped: model-00002" in capsys.readouterr().out
    # Merged files that are there are taken for what they are, not written anew.
    kept = (out / "model-00003-of-00003.safetensors").stat().st_ino
    split(out, layout="both")
    assert (out / "model-00003-of-00003.safetensors").stat().st_ino == kept
    assert verify(out).leftovers == ()


def test_a_disk_that_is_full_loses_nothing(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split(out, Degree(2), layout="presplit")
    before = tree(out)
    monkeypatch.setattr("mixprec_build.ranks.assemble.pwrite_all", full)
    with pytest.raises(WriteError, match="free some space"):
        split(out, layout="both")
    monkeypatch.undo()
    assert verify(out).differences == ()
    split(out, Degree(2), layout="presplit")
    assert tree(out) == before


def test_space_is_asked_for_first(small: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("mixprec_build.output.split.check_space", lambda _, need: asked.append(need))
    split(out, Degree(2), layout="presplit")
    split(out, Degree(1))
    merged = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    (ranks,) = (json.loads(path.read_text()) for path in out.glob("presplit/tp1-ep1/*/index.json"))
    cut = sum(entry["bytes"] for entry in ranks["files"].values())
    assert asked[-1] > merged and asked[-1] - merged <= cut

    # A build has both for a while.
    recipe = small.parent / "space.yaml"
    recipe.write_text((small.parent / "recipe.yaml").read_text().replace("1MiB", "1MiB, tp: 1, layout: presplit"))
    monkeypatch.setattr("mixprec_build.output.copier.check_space", lambda _, need: asked.append(need))
    asked.clear()
    plan = plan_recipe(recipe)
    run_plan(plan, out.with_name("built"))
    assert asked[0] == merged + sum(plan.presplit.values())
