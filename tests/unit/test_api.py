"""``import mixprec_build as mp``: its functions, with the examples of their docstrings."""

from __future__ import annotations

import doctest
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from support.llama import write_recipe, write_sources

import mixprec_build as mp
from mixprec_build import api, errors
from mixprec_build.planning.planner import make_plan


@pytest.fixture
def mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_sources(tmp_path)
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path / "mix.yaml")


@pytest.mark.parametrize("name", api.__all__)
def test_the_example_of_each_function(mix: Path, name: str) -> None:
    if name in ("inspect", "split", "verify"):
        mp.build(mix, "out")
    examples = doctest.DocTestFinder().find(getattr(api, name), name, globs={"mp": mp})
    assert any(example.examples for example in examples), "it has none"
    runner = doctest.DocTestRunner(verbose=False)
    for example in examples:
        runner.run(example)
    assert runner.summarize(verbose=False).failed == 0


def test_all_that_is_offered_is_there_and_typed() -> None:
    assert set(mp.__all__) == {"__version__", *api.__all__, *errors.__all__} == set(dir(mp))
    for name in api.__all__:
        function = getattr(mp, name)
        assert function is getattr(api, name)
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())
    with pytest.raises(AttributeError, match="has no attribute 'plans'"):
        mp.plans  # noqa: B018


def test_a_plan_is_built_as_it_stands(mix: Path) -> None:
    plan = mp.plan(mix)
    done: list[int] = []
    assert mp.build(plan, "out", progress=done.append) == Path("out/mixprec_manifest.json")
    assert sum(done) == plan.written_bytes
    with pytest.raises(mp.OutputError, match="exists and is not empty"):
        mp.build(plan, "out")


def test_functions_stay_what_they_are_once_rooms_are_imported(mix: Path) -> None:
    """A room called ``plan`` would take the function's place."""
    code = "import mixprec_build as mp; mp.build('mix.yaml', 'out'); print(*(callable(getattr(mp, n)) for n in 'abc'))"
    code = code.replace("'abc'", repr(api.__all__))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.split() == ["True"] * len(api.__all__)


def test_what_the_commands_ask_for_can_be_asked_of_functions(mix: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--check full`` and ``--take-over``, which are passed on as they are."""
    asked: dict[str, object] = {}
    made = make_plan
    monkeypatch.setattr(
        "mixprec_build.output.build.make_plan", lambda *args, **options: asked.update(options) or made(*args, **options)
    )
    monkeypatch.setattr(
        "mixprec_build.output.publish.write", lambda *args, **options: asked.update(options) or Path("manifest")
    )
    mp.build(mix, "out", check="full", take_over=True)
    assert asked["check_all"] is True and asked["take_over"] is True
    mp.build(mix, "out")
    assert asked["check_all"] is False and asked["take_over"] is False
