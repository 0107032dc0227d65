"""The pages say what the code says: length, links, commands with their options, tables of codes and families."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from mixprec_build.cli.app import app
from mixprec_build.families.registry import checked_types, replicated_types
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


def test_every_checked_family_is_listed() -> None:
    section = page("mixprec_runtime/README.md").split("## Families")[1].split("## Versions")[0]
    rows = re.findall(r"(?m)^\| `(\w+)` \| [\w-]+ \| (yes|no) \|$", section)
    assert sorted(model_type for model_type, _ in rows) == checked_types()
    assert {model_type for model_type, replicas in rows if replicas == "yes"} == {*replicated_types()}


def test_every_recipe_is_in_the_gallery() -> None:
    section = page("recipes/README.md").split("## The gallery")[1].split("## The demo")[0]
    folder = ROOT / "recipes"
    there = [str(path.relative_to(folder)) for path in folder.rglob("*.yaml")]
    assert sorted(re.findall(r"(?m)^\| `([\w./-]+)` \|", section)) == sorted(there)
