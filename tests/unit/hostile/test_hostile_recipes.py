"""Patterns and recipes: matched in milliseconds, read to an end."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from mixprec_build.errors import RecipeError
from mixprec_build.patterns.pattern import Pattern, PatternError, PatternReader
from mixprec_build.recipe.recipe import load_recipe

from .spoil import link, refused

SLOW = [
    ("*a*a*a*b", "a" * 256),
    ("*a*a*a*", "b" * 256),
    ("*{a,aa}*{a,aa}*{a,aa}*b", "a" * 256),
    ("{1,11}" * 40 + "x", "1" * 60),
    ("{a,aa,aaa}" * 200 + "b", "a" * 256),
    ("*" + "{a,ab,b}" * 60 + "*" + "{a,aa}" * 60 + "*c", "ab" * 128),
    ("?" * 250 + "*" + "{a,b}" * 100 + "c", "ab" * 128),
    ("*{0..9999}{0..9999}*x", "1" * 256),
    ("{" + ",".join("a" * n for n in range(1, 257)) + "}" * 1 + "{a,aa}" * 100 + "b", "a" * 256),
]  # fmt: skip


@pytest.mark.parametrize(("text", "name"), SLOW, ids=[text[:20] for text, _ in SLOW])
def test_a_match_takes_milliseconds(text: str, name: str) -> None:
    pattern = Pattern(text)
    start = time.process_time()
    assert pattern.matches(name) is (text == "*a*a*a*" and "a" in name)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("text", "name", "matches"),
    [
        ("*{abc,b}*c", "abc", True),  # the match that starts first ends last
        ("*{abc,b}*c", "abcc", True),
        ("*{abc,b}*c", "ab", False),
        ("*{a,ab}*b", "ab", True),
        ("{a,ab}*b", "ab", True),
        ("*.{0..127}.*.x", ".1.2.x", True),
        ("*a.a.a{1,1234}*a*", "a.a.a.a12a", True),
        ("*?{a,aaaa}?*b", "aaab", True),
        ("{1,12}{3,23}", "123", True),
        ("{1,12}.{3,34}", "12.34", True),
        ("*ab{,}", "ab", None),
    ],
)
def test_what_was_found_first_need_not_be_right(text: str, name: str, matches: bool | None) -> None:
    if matches is None:
        with pytest.raises(PatternError):
            Pattern(text)
    else:
        assert Pattern(text).matches(name) is matches


def test_patterns_of_one_file_are_bounded_together() -> None:
    reader = PatternReader()
    for i in range(100_000):
        reader.read(f"model.layers.{i}.mlp")  # exact names are but looked up
    with pytest.raises(PatternError, match="more than 2000 patterns in one file"):
        for i in range(2001):
            reader.read(f"{i}.*")
    with pytest.raises(PatternError, match="have more than 1000000 characters"):
        reader = PatternReader()
        for _ in range(100):
            reader.read("{0..9999}.*")


@pytest.mark.parametrize("text", ["a\x1b[2J*", "a\x9bb", "a\n*", "\ud800*", "a\0"])
def test_a_pattern_does_not_command(text: str) -> None:
    with pytest.raises(PatternError, match="has characters that no name has") as caught:
        Pattern(text)
    assert str(caught.value).isprintable()


def test_a_pattern_is_quoted_in_few_words() -> None:
    for text in ("[" * 10_000, "{" * 10_000, "*a" * 10_000, "a" * 200_001, "{" + "x" * 10_000 + "..}"):
        with pytest.raises(PatternError) as caught:
            Pattern(text)
        assert len(str(caught.value)) < 600


# Recipes

RECIPES: dict[str, tuple[str, str]] = {
    "101 sources": ("model: a\nsources: {" + ",".join(f"s{i}: a" for i in range(101)) + "}\n", "more than 100 sources"),
    "a long source name": (f"model: a\nsources: {{{'x' * 65}: a}}\n", "is no name for a source"),
    "a long location": (f"model: {'x' * 4097}\n", "a word of 4097 characters"),
    "a long key": (f"? {'x' * 100_000}\n: a\nmodel: a\n", "unknown key"),
    "a long key twice": (f"model: a\nweights:\n  {'x' * 900}: a\n  {'x' * 900}: a\n", "is given twice"),
    "a long tag": (f"model: !{'x' * 10_000} a\n", "tags like '!xxx"),
    "many words": ("model: a\nserver: {a: [" + "a," * 500_001 + "]}\n", "more than 500000 words"),
    "many maps": ("model: a\nserver: {a: [" + "{}," * 500_001 + "]}\n", "more than 500000 words"),
    "many globs": (
        "model: a\nweights:\n" + "".join(f"  {i}*: model\n" for i in range(2001)), "more than 2000 patterns",
    ),
    "the home of nobody": ("model: ~nobody-of-that-name/x\n", "cannot be looked at: Could not determine home"),
    "a zero byte": ('model: "a\\0b/c"\n', "no such folder"),
    "half a character": ('model: "\\uD800/c"\n', "not valid YAML"),
    "a value of 10 MB": (f"model: {'x' * 10_000_000}\n", "a word of 10000000 characters"),
    "a key of 10 MB": (f"? {'x' * 10_000_000}\n: a\nmodel: a\n", "unknown key"),
    "a comment of 10 MB": (f"# {'x' * 10_000_000}\n", "is empty"),
    "a list of 10 MB": (f"model: [{'a,' * 5_000_000}]\n", "more than 500000 words"),
    "brackets of 10 MB": ("model: " + "[" * 10_000_000, "nested deeper than 16 levels"),
    "NaN as a size": ("model: a\noutput: {shard_size: .nan}\n", "'.nan' is no size"),
    "NaN as a degree": ("model: a\noutput: {tp: .nan}\n", "tp must be numbers"),
    "NaN as a source": ("model: a\nweights: {x: .nan}\n", "unknown source `.nan`"),
    "a path of 4000": (f"model: {'x' * 4000}\n", "cannot be looked at: File name too long"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECIPES)
def test_a_hostile_recipe(tmp_path: Path, mixprec: Any, case: str) -> None:
    text, message = RECIPES[case]
    (tmp_path / "mix.yaml").write_text(text)
    printed = refused(mixprec("plan", tmp_path / "mix.yaml"))
    assert message in printed and len(printed) < 5000


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_recipe_that_never_ends(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "mix.yaml"
    os.mkfifo(path) if kind == "fifo" else link(path, "/dev/zero")
    with pytest.raises(RecipeError, match="cannot read the recipe: not a regular file"):
        load_recipe(path)
