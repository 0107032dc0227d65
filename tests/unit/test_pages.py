"""The pages say what the code says: length, links, commands with their options, tables of codes and families."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main
from support.families import TINY

from mixprec_build.cli.app import app
from mixprec_build.families.registry import checked_types, find_family
from mixprec_build.planning.problems import CODES

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "recipes/README.md", "mixprec_build/README.md", "mixprec_runtime/README.md"]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_first_page_is_short_and_works_where_it_is_shown_alone() -> None:
    text = page("README.md")
    assert len(text.splitlines()) <= 150
    assert [link for link in re.findall(r"\]\(([^)]*)\)", text) if not link.startswith("https://")] == []


def named_paths(text: str) -> list[str]:
    return re.findall(r"`((?:recipes|tests|mixprec_build|mixprec_runtime)/[\w./-]+)`", text)


def test_paths_are_found_in_a_page() -> None:
    assert named_paths("see `recipes/README.md` and `tests/nothing.py`") == ["recipes/README.md", "tests/nothing.py"]


@pytest.mark.parametrize("name", PAGES)
def test_files_that_a_page_names_are_there(name: str) -> None:
    paths = {path for path in named_paths(page(name)) if "NAME" not in path}
    assert paths, "it names none"
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("name", [name for name in PAGES if name != "mixprec_build/README.md"])
def test_commands_and_options_of_a_page_exist(name: str) -> None:
    commands = typer.main.get_group(app).commands
    text = page(name).replace("\\\n", " ")
    lines = re.findall(r"(?m)^\$ mixprec (\w+) ?([^#\n]*)", text)
    lines += re.findall(r"`mixprec (\w+) ([^`]*)`", text)
    assert lines, "it has no command"
    for command, rest in lines:
        assert command in commands
        options = {o for p in commands[command].params for o in p.opts}
        used = set(re.findall(r"(?<![\w-])(--?[a-z][\w-]*)", rest))
        assert used <= options, (command, used - options)


def test_every_code_of_a_refusal_is_explained() -> None:
    rows = re.findall(r"(?m)^\| `(\w+)` \| (.*) \| (?:yes|no|where .*) \|$", page("mixprec_build/README.md"))
    assert dict(rows) == CODES


def families_on_the_page() -> list[tuple[list[str], tuple[str, str, str], str, list[str]]]:
    """Types; whether cut, with replicas and with a quantized head; what was seen, and the tests that are named."""
    section = page("mixprec_runtime/README.md").split("## Families")[1].split("## Versions")[0]
    rows = re.findall(
        r"(?m)^\| ((?:`\w+` )+)\| [^|]+ \| (yes|no) \| (yes|no) \| (yes|no) \| (\w+) \| ([^|]+) \|$", section
    )
    return [
        (re.findall(r"`(\w+)`", types), (cut, replicas, head), seen, re.findall(r"`([\w.]+)`", tests))
        for types, cut, replicas, head, seen, tests in rows
    ]


def test_every_checked_family_is_listed() -> None:
    rows = families_on_the_page()
    assert sorted(model_type for types, *_ in rows for model_type in types) == checked_types()
    for types, said, _, _ in rows:
        for model_type in types:
            family = find_family(model_type)
            assert family is not None
            has = family.can_be_cut, family.attention_replicas, family.quantized_head
            assert said == tuple("yes" if one else "no" for one in has), model_type


OF_SHAPES = {"llama", "mixtral", "qwen2", "qwen2_moe", "qwen3_moe"}
"""Types of ``support.serving`` that ``test_cpu_engine.py`` serves."""


def test_what_was_seen_of_a_family_is_in_the_test_that_is_named() -> None:
    asked = set(re.findall(r'"(\w+)"', page("tests/sglang/test_cpu_engine.py")))
    answered = {model.config["model_type"] for name, model in TINY.items() if name in asked} | OF_SHAPES
    loaded = {model.config["model_type"] for model in TINY.values()}
    for types, _, seen, tests in families_on_the_page():
        assert seen in ("plan", "load", "near", "answer") and tests, types
        if seen == "near":
            names = re.findall(r'(?m)^    "(\w+)": ', page("tests/gpu/test_families.py"))
            served = {TINY[name].config["model_type"] for name in names if name in TINY}
            assert tests == ["gpu"] and served & {*types}, types
        for test in tests:
            assert test == "gpu" or list((ROOT / "tests").glob(f"*/{test}")), test
        if "test_cpu_engine.py" in tests:
            assert seen == "answer" and answered & {*types}, types
        if "test_families.py" in tests:
            assert seen == "load" and loaded & {*types}, types


def test_every_recipe_is_in_the_gallery() -> None:
    section = page("recipes/README.md").split("## The gallery")[1].split("## The demo")[0]
    folder = ROOT / "recipes"
    there = [str(path.relative_to(folder)) for path in folder.rglob("*.yaml") if path.parent.name != "cluster"]
    tables = section.split("What serving needs")
    listed, with_needs = (sorted(re.findall(r"(?m)^\| `([\w./-]+)` \|", table)) for table in tables)
    assert listed == sorted(there)
    assert with_needs == [name for name in listed if not name.startswith("demo/")]
