"""Builds and splits of one folder at a time."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from support.files import tree
from support.run import run_python

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.checkpoint.manifest import read_manifest
from mixprec_build.errors import InterruptedBuildError, OutputError
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.split import split
from mixprec_build.output.verify import verify

from .compiled import Killed


def rebuild(recipe: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "mixprec_build", "build", str(recipe), "-o", str(out), "--force", "--quiet")


@pytest.mark.parametrize("layout", ["both", "presplit"])
def test_a_build_does_not_replace_what_is_being_cut(small: Path, out: Path, layout: str) -> None:
    recipe = out.with_name("recipe.yaml")
    recipe.write_text((small.parent / "recipe.yaml").read_text().replace("1MiB", "2MiB"))
    ended = []

    def watch(_: Any, __: int) -> Any:
        ended.append(rebuild(recipe, out))
        return lambda _: None

    split(out, Degree(2), layout=layout, watch=watch)
    assert ended[0].returncode == 2
    why = rf"{out}: another `mixprec split` is writing there \(.* pid {os.getpid()}\); wait for it; 2 of 2 files .*kept"
    assert re.search(why, ended[0].stderr)
    assert not verify(out).differences and read_manifest(out).layout == layout
    assert rebuild(recipe, out).returncode == 0
    assert not verify(out).differences and len(list(out.glob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("before", "change"),
    [
        (None, (Degree(2), "both")),
        (None, (Degree(2), "presplit")),
        ("presplit", (None, "both")),
        ("presplit", (Degree(1), "presplit")),
        ("presplit", (None, "merged")),
        ("both", (None, "merged")),
        ("both", (None, "presplit")),
    ],
)
def test_a_split_does_not_go_on_in_another_checkpoint(
    small: Path, out: Path, before: str | None, change: tuple[Degree | None, str]
) -> None:
    """That somebody put under its name meanwhile."""
    if before is not None:
        split(out, Degree(2), layout=before)
    degree, layout = change

    def watch(_: Any, __: int) -> Any:
        out.rename(out.with_name("before"))
        shutil.copytree(small, out)
        return lambda _: None

    with pytest.raises(OutputError, match=f"{out}: was replaced meanwhile; what is there now was left as it is"):
        split(out, degree, layout=layout, watch=watch)
    assert tree(out) == tree(small)
    assert not verify(out.with_name("before")).differences


def test_a_build_replaces_what_a_stopped_split_left(small: Path, out: Path, stop: Any) -> None:
    plan, before, steps = plan_recipe(small.parent / "recipe.yaml"), tree(small), 0
    while True:
        steps += 1
        stop(steps)
        try:
            split(out, Degree(2), layout="presplit", jobs=1)
        except Killed:
            stop(0)
            run_plan(plan, out, force=True)
            assert tree(out) == before, f"step {steps}"
        else:
            stop(0)
            break
    assert steps > 7


def test_a_build_replaces_no_stranger_in_a_folder_of_ranks(small: Path, out: Path) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(InterruptedBuildError):
        split(out, Degree(2), watch=lambda *_: interrupt)
    assert not (out / "presplit").exists() and not read_manifest(out).ranks
    (out / "presplit/tp2-ep1").mkdir(parents=True)
    plan = plan_recipe(small.parent / "recipe.yaml")
    (out / "presplit/thesis.tex").write_text("...")
    with pytest.raises(OutputError, match=r"files that mixprec did not write \(presplit/thesis\.tex\)"):
        run_plan(plan, out, force=True)
    (out / "presplit/thesis.tex").unlink()
    run_plan(plan, out, force=True)
    assert tree(out) == tree(small)
    (out / "presplit").write_text("...")
    with pytest.raises(OutputError, match=r"files that mixprec did not write \(presplit\)"):
        run_plan(plan, out, force=True)
