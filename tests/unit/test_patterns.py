"""Patterns against an oracle that shares nothing with them: braces expanded by hand, the rest left to fnmatch."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Iterator
from fnmatch import fnmatchcase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixprec_build.patterns.compress import compress, natural_key
from mixprec_build.patterns.index import PatternIndex
from mixprec_build.patterns.pattern import Pattern, PatternError

# Few characters, so that random names and patterns meet; `[` and newline are what fnmatch and regexes trip over.
NAME_CHARS = "ab01._-\n[]"
words = st.text("ab01_", min_size=1, max_size=3)
ranges = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(sorted).map(lambda pair: f"{pair[0]}..{pair[1]}")
braces = st.lists(words | ranges, min_size=1, max_size=3).map(lambda items: "{" + ",".join(items) + "}")
literals = st.text("ab01._-", min_size=1, max_size=4)
pieces = st.lists(literals | braces | st.sampled_from(["*", "**", "?"]), min_size=1, max_size=6)


def expand(pattern: str) -> Iterator[str]:
    """The patterns without braces that one with braces stands for."""
    before, opened, rest = pattern.partition("{")
    if not opened:
        yield pattern
        return
    body, _, after = rest.partition("}")
    for item in body.split(","):
        low, dots, high = item.partition("..")
        choices = map(str, range(int(low), int(high) + 1)) if dots else [item]
        for choice in choices:
            yield from expand(before + choice + after)


def oracle(pattern: str, name: str) -> bool:
    return any(fnmatchcase(name, plain.replace("[", "[[]")) for plain in expand(pattern))


@st.composite
def names_for(draw: st.DrawFn, pattern: list[str]) -> str:
    """A name that the pieces match, and sometimes one that lost or gained a character."""
    parts = []
    for piece in pattern:
        if piece.startswith("*"):
            parts.append(draw(st.text(NAME_CHARS, max_size=4)))
        elif piece == "?":
            parts.append(draw(st.sampled_from(NAME_CHARS)))
        elif piece.startswith("{"):
            parts.append(draw(st.sampled_from(sorted(expand(piece)))))
        else:
            parts.append(piece)
    name = "".join(parts)
    at = draw(st.integers(0, len(name)))
    return draw(st.sampled_from([name, name, name[:at] + name[at + 1 :], name[:at] + "0" + name[at:]]))


@settings(deadline=None)
@given(st.data(), pieces)
def test_matches_what_the_oracle_matches(data: st.DataObject, pattern: list[str]) -> None:
    text = "".join(pattern)
    parsed = Pattern(text)
    assert parsed.exact is not any(char in text for char in "*?{")
    for name in (data.draw(names_for(pattern)), data.draw(st.text(NAME_CHARS, max_size=8)), text):
        assert parsed.matches(name) is oracle(text, name), name


@settings(deadline=None)
@given(st.data(), st.lists(pieces, min_size=1, max_size=8))
def test_many_patterns_match_as_each_alone(data: st.DataObject, patterns: list[list[str]]) -> None:
    parsed = [Pattern("".join(pattern)) for pattern in patterns]
    index = PatternIndex(parsed)
    names = [data.draw(names_for(pattern)) for pattern in patterns]
    for name in (*names, data.draw(st.text(NAME_CHARS, max_size=8)), *(pattern.text for pattern in parsed)):
        one_by_one = [number for number, pattern in enumerate(parsed) if pattern.matches(name)]
        assert index.matching(name) == one_by_one, name
        assert index.last(name) == (one_by_one[-1] if one_by_one else None), name


# As people write them, with names that meet them: whole words between dots, parts of words, lists of numbers.
DOTTED = st.lists(
    st.sampled_from(["a", "b", "{a,b}", "{0..3}", "{a.b,0}", "{a.0}", "x{0,1}", "{a,b}{0,1}", "?", "*", "a*", "0"]),
    min_size=1,
    max_size=5,
).filter(lambda words: sum(word.count("*") for word in words) < 5)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(DOTTED.map(".".join), min_size=1, max_size=12),
    st.lists(st.lists(st.sampled_from(["a", "b", "0", "3", "x0", "a1", "ab"]), min_size=1, max_size=6), max_size=8),
)
def test_many_dotted_patterns_match_as_each_alone(patterns: list[str], names: list[list[str]]) -> None:
    parsed = [Pattern(pattern) for pattern in patterns]
    index = PatternIndex(parsed)
    for name in map(".".join, names):
        assert index.matching(name) == [n for n, pattern in enumerate(parsed) if pattern.matches(name)], name


@pytest.mark.parametrize(
    "glob",
    [
        "model.layers.{layer}.mlp.experts.{{{expert},{layer},7}}.*",
        "*.layers.{layer}.*.experts.{expert}.*",
        "model.layers.*.experts.{expert}.{{gate,up}}_proj",
        "model.layers.{layer}.mlp.experts.{expert}?.down_proj",
    ],
)
def test_as_many_patterns_as_a_file_may_hold_take_no_time(glob: str) -> None:
    patterns = [Pattern(glob.format(layer=n % 62, expert=n % 251)) for n in range(2000)]
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj"
        for layer in range(62)
        for expert in range(256)
        for part in ("gate", "up", "down")
    ]
    began = time.process_time()
    found = PatternIndex(patterns).hits(names)
    assert time.process_time() - began < 5  # one by one: more than a minute
    for name in names[::4001]:
        assert found[name] == [n for n, pattern in enumerate(patterns) if pattern.matches(name)]


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("model.layers.*.mlp.*", "model.layers.3.mlp.experts.5.up_proj", True),  # a `*` crosses dots
        ("model.layers.?.mlp", "model.layers.10.mlp", False),
        ("model.layers.{0..3}.mlp", "model.layers.3.mlp", True),
        ("model.layers.{0..3}.mlp", "model.layers.03.mlp", False),  # numbers are written as checkpoints write them
        ("model.layers.{007}.mlp", "model.layers.007.mlp", True),
        ("model.layers.{0..3, 8 ,x_y}.mlp", "model.layers.8.mlp", True),
        ("model.layers.{0..3, 8 ,x_y}.mlp", "model.layers.x_y.mlp", True),
        ("a.{0..1}{0..1}", "a.01", True),
        ("{a.b,c}.d", "a.b.d", True),
        ("a.b", "aXb", False),  # a dot is a dot
        ("a.b", "a.b\n", False),
        ("a.*", "a.b\nc", True),
        ("a+", "aa", False),
    ],
)
def test_an_example(pattern: str, name: str, matches: bool) -> None:
    assert Pattern(pattern).matches(name) is matches


MALFORMED = {
    "": "an empty name matches nothing",
    "a.{0..3": "'a.{0..3': '{' without a closing '}'",
    "a.0..3}": "'a.0..3}': unexpected '}'; '}' without an opening '{'",
    "a.[0-3].b": "'a.[0-3].b': unexpected '['; write ranges as {0..15}",
    "a.0]": "'a.0]': unexpected ']'; write ranges as {0..15}",
    "a.{}": "'a.{}': '' is no number, word or range like 0..15",
    "a.{1,}": "'a.{1,}': '' is no number, word or range like 0..15",
    "a.{1,,2}": "'a.{1,,2}': '' is no number, word or range like 0..15",
    "a.{0..}": "'a.{0..}': '0..' is no number, word or range like 0..15",
    "a.{..3}": "'a.{..3}': '..3' is no number, word or range like 0..15",
    "a.{0..3..5}": "'a.{0..3..5}': '0..3..5' is no number, word or range like 0..15",
    "a.{x..z}": "'a.{x..z}': 'x..z' is no number, word or range like 0..15",
    "a.{0-3*}": "'a.{0-3*}': '0-3*' is no number, word or range like 0..15",
    "a.{b,{c,d}}": "'a.{b,{c,d}}': '{c' is no number, word or range like 0..15",
    "a.{15..0}": "'a.{15..0}': the range 15..0 is empty; write {0..15}",
    "a.{0..10000}": "'a.{0..10000}': the range 0..10000 is longer than 10000",
    "a.{0..9999,x}": "'a.{0..9999,x}': more than 10000 alternatives",
    "*a*b*c*d*": "'*a*b*c*d*' has 5 wildcards '*'; at most 4 are allowed",
}


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_pattern(text: str) -> None:
    with pytest.raises(PatternError) as error:
        Pattern(text)
    assert str(error.value) == MALFORMED[text]


def test_patterns_from_strangers_end() -> None:
    """The most stars that are allowed, on a name as long as a name can sensibly be."""
    start = time.process_time()
    assert not Pattern("*a*a*a*b").matches("a" * 60)
    assert Pattern("*" * 10_000 + "b").matches("ab")
    assert time.process_time() - start < 1


def test_patterns_compare_by_their_text() -> None:
    assert Pattern("a.*") == Pattern("a.*") != Pattern("a.?")
    assert len({Pattern("a.*"), Pattern("a.*")}) == 1


# compress

LAYERS = ["0", "1", "2", "9", "10", "007"]
EXPERTS = ["0", "1", "2", "3", "15", "16"]
LASTS = ["gate_proj", "up_proj", "down_proj", "w-1", ""]
NAMES = [
    *("model.layers." + ".".join(part) for part in itertools.product(LAYERS, ["mlp.experts"], EXPERTS, LASTS)),
    *("model.layers." + ".".join(part) for part in itertools.product(LAYERS, ["self_attn"], LASTS)),
    *("lm_head", "model.norm", "norm", "model", "0", "12", "model.layers.2"),
]


def matched(patterns: list[str], superset: list[str]) -> list[str]:
    parsed = [Pattern(pattern) for pattern in patterns]
    return [name for name in superset if any(pattern.matches(name) for pattern in parsed)]


@settings(deadline=None)
@given(st.sets(st.sampled_from(NAMES)))
def test_compressed_names_are_exactly_the_names(names: set[str]) -> None:
    assert matched(compress(names), NAMES) == [name for name in NAMES if name in names]


@settings(deadline=None)
@given(st.sets(st.text("ab01.-_٣²é", min_size=1, max_size=8), max_size=12), st.data())
def test_compressed_names_of_any_shape(superset: set[str], data: st.DataObject) -> None:
    names = data.draw(st.sets(st.sampled_from(sorted(superset)))) if superset else set()
    assert set(matched(compress(names), sorted(superset))) == names


@settings(deadline=None)
@given(st.sets(st.integers(0, 10**9) | st.integers(999_990, 1_000_010), min_size=1))
def test_compressed_numbers_of_any_size(numbers: set[int]) -> None:
    names = {f"a.{number}.b" for number in numbers}
    near = sorted({f"a.{n + d}.b" for n in numbers for d in (-1, 0, 1)})
    assert set(matched(compress(names), near)) == names


def test_more_numbers_than_a_pattern_may_hold() -> None:
    names = [f"a.{number}.b" for number in range(25_000)]
    patterns = compress(names)
    assert len(patterns) == 3
    assert matched(patterns, [*names, "a.25000.b"]) == names


def test_experts_become_one_pattern() -> None:
    lasts = ("down_proj", "gate_proj", "up_proj")
    experts = [
        f"model.layers.{layer}.mlp.experts.{expert}.{last}"
        for layer, expert, last in itertools.product(range(94), range(16), lasts)
    ]
    assert compress(experts) == ["model.layers.{0..93}.mlp.experts.{0..15}.{down_proj,gate_proj,up_proj}"]
    one_less = [name for name in experts if name != "model.layers.3.mlp.experts.5.up_proj"]
    assert compress(one_less) == [
        "model.layers.3.mlp.experts.5.{down_proj,gate_proj}",
        "model.layers.3.mlp.experts.{0..4,6..15}.{down_proj,gate_proj,up_proj}",
        "model.layers.{0..2,4..93}.mlp.experts.{0..15}.{down_proj,gate_proj,up_proj}",
    ]


def test_compress_does_not_depend_on_order() -> None:
    assert compress(NAMES) == compress(reversed(NAMES)) == compress(NAMES * 2)


# natural_key


@settings(deadline=None)
@given(st.lists(st.sampled_from(NAMES)))
def test_natural_order(names: list[str]) -> None:
    ordered = sorted(names, key=natural_key)
    for first, second in itertools.pairwise(ordered):
        a, b = re.split(r"(\d+)", first), re.split(r"(\d+)", second)
        common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if common is not None and common % 2:  # odd columns are numbers
            assert int(a[common]) <= int(b[common])


def test_natural_order_of_layers() -> None:
    names = ["model.norm", "model.layers.10.b", "model.layers.2.b", "model.layers.2.a", "lm_head", "model.layers.10"]
    assert sorted(names, key=natural_key) == [
        "lm_head",
        "model.layers.2.a",
        "model.layers.2.b",
        "model.layers.10",
        "model.layers.10.b",
        "model.norm",
    ]


def test_digits_without_end_are_no_number() -> None:
    """Python refuses to convert them; a name from a stranger's checkpoint must not stop us."""
    name = "a." + "9" * 5000
    assert natural_key(name)
    assert compress([name]) == [name]
    assert matched(compress([name, name + "0"]), [name, name + "0", name + "1"]) == [name, name + "0"]
