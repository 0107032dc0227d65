"""Recipes: both forms, every way to get one wrong, and which line decides where several match."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.write import QWEN3_MOE, write_tiny

from mixprec_build.checkpoint.opening import open_checkpoint
from mixprec_build.checkpoint.typed import Source
from mixprec_build.errors import RecipeError
from mixprec_build.formats.registry import kinds_of_word
from mixprec_build.patterns.pattern import Pattern
from mixprec_build.planning.planner import make_plan
from mixprec_build.recipe.recipe import (
    DEFAULT_SHARD_SIZE,
    Recipe,
    Rule,
    SourceRef,
    load_recipe,
    parse_size,
)
from mixprec_build.recipe.sources import Sources


def read(folder: Path, text: str | bytes) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_recipe(path)


def meaning(recipe: Recipe) -> Mapping[str, object]:
    """A recipe without the lines it was written in."""
    return {
        "model": recipe.model.location,
        "sources": {name: ref.location for name, ref in recipe.sources.items()},
        "default": recipe.default,
        "rules": [(rule.pattern.text, rule.source) for rule in recipe.rules],
        "shard_size": recipe.shard_size,
        "serving": recipe.serving,
    }


NATIVE = """
model: org/base
sources:
  fp16: org/half
  fp8: ./fp8
  int4: ../int4
default: fp16
weights:
  model.layers.*.self_attn.*: fp8
  "*.experts.*": int4
  model.layers.{0..3}.mlp.experts.{0,7}.*: fp8
  model.layers.0.mlp.experts.1.up_proj: int4
output:
  shard_size: 2GiB
inference:
  tensor_parallel_size: 4
  backends: [marlin, triton]
server:
  host: 0.0.0.0
  options: {port: 30000, verbose: yes}
"""

MIXED = """
mixed_precision:
  base_model_path: org/base
  fp16_path: org/half
  fp8_path: ./fp8
  int4_path: ../int4
  weight_mapping:
    model.layers.*.self_attn.*: fp8
    "*.experts.*": int4
    model.layers.{0..3}.mlp.experts.{0,7}.*: fp8
    model.layers.0.mlp.experts.1.up_proj.weight: int4
output:
  shard_size: 2GiB
inference:
  tensor_parallel_size: 4
  backends: [marlin, triton]
server:
  host: 0.0.0.0
  options: {port: 30000, verbose: yes}
"""


def test_both_forms_mean_the_same(tmp_path: Path) -> None:
    native, mixed = read(tmp_path, NATIVE), read(tmp_path, MIXED)
    assert meaning(native) == meaning(mixed)
    assert meaning(native) == {
        "model": "org/base",
        "sources": {"fp16": "org/half", "fp8": "./fp8", "int4": "../int4"},
        "default": "fp16",
        "rules": [
            ("model.layers.*.self_attn.*", "fp8"),
            ("*.experts.*", "int4"),
            ("model.layers.{0..3}.mlp.experts.{0,7}.*", "fp8"),
            ("model.layers.0.mlp.experts.1.up_proj", "int4"),
        ],
        "shard_size": 2 << 30,
        "serving": {
            "inference": {"tensor_parallel_size": "4", "backends": ["marlin", "triton"]},
            "server": {"host": "0.0.0.0", "options": {"port": "30000", "verbose": "yes"}},
        },
    }
    assert native.folder == tmp_path


@pytest.mark.parametrize(
    ("native", "mixed"),
    [
        # Without `base_model_path` the first checkpoint gives the config.
        (
            "model: a\nsources: {fp16: a, fp8: b}\n",
            "mixed_precision: {fp8_path: b, fp16_path: a}\n",
        ),
        # The checkpoint that gives the config is the default where it is a source, ...
        (
            "model: b\nsources: {fp16: a, int4: b}\ndefault: int4\n",
            "mixed_precision: {base_model_path: b, fp16_path: a, int4_path: b}\n",
        ),
        # ... a source of its own where there is no other default.
        (
            "model: a\nsources: {fp8: b}\nweights: {x: fp8}\n",
            "mixed_precision: {base_model_path: a, fp8_path: b, weight_mapping: {x: fp8}}\n",
        ),
        (
            "model: a\nsources: {fp16: a, gptq_int4: b, awq_int4: c, int8: d}\nweights: {x: awq_int4, y: int8}\n",
            "mixed_precision: {fp16_path: a, gptq_int4_path: b, awq_int4_path: c, int8_path: d, "
            "weight_mapping: {x: awq_int4, y: int8}}\n",
        ),
        # Of two names for it, the first is.
        ("model: a\nsources: {fp16: a, fp8: a}\ndefault: fp16\n", "mixed_precision: {fp16_path: a, fp8_path: a}\n"),
        # A word for a format needs no source of that name.
        (
            "model: a\nsources: {fp16: a, gptq_int4: b}\nweights: {x: int4}\n",
            "mixed_precision: {fp16_path: a, gptq_int4_path: b, weight_mapping: {x: int4}}\n",
        ),
    ],
)
def test_defaults_of_both_forms(tmp_path: Path, native: str, mixed: str) -> None:
    assert meaning(read(tmp_path, native)) == meaning(read(tmp_path, mixed))


def test_the_smallest_recipe(tmp_path: Path) -> None:
    recipe = read(tmp_path, "model: a\n")
    assert meaning(recipe) == {
        "model": "a",
        "sources": {"model": "a"},
        "default": "model",
        "rules": [],
        "shard_size": DEFAULT_SHARD_SIZE,
        "serving": {},
    }


def test_empty_sections_are_no_sections(tmp_path: Path) -> None:
    recipe = read(tmp_path, "model: a\nsources:\nweights:\noutput:\ninference:\nserver:\n")
    assert meaning(recipe) == meaning(read(tmp_path, "model: a\n")) | {"serving": {"inference": {}, "server": {}}}


def test_rules_know_their_lines(tmp_path: Path) -> None:
    recipe = read(tmp_path, NATIVE)
    lines = NATIVE.splitlines()
    for rule in recipe.rules:
        assert rule.pattern.text in lines[rule.line - 1]
        assert str(rule) == f"line {rule.line} `{rule.pattern.text}: {rule.source}`"
    assert [ref.line for ref in recipe.sources.values()] == [4, 5, 6]


@pytest.mark.parametrize(
    "word", ["on", "off", "yes", "null", "~", "010", "0x1F", "1:30", "1e3", "2026-01-01", "=", "|"]
)
def test_words_stay_the_words_they_are(tmp_path: Path, word: str) -> None:
    """YAML 1.1 turns each of these into something else; a name has to stay a name."""
    quoted = f"'{word}'" if word == "|" else word
    recipe = read(tmp_path, f"model: {quoted}\nsources:\n  a: {quoted}\nweights:\n  {quoted}: a\n")
    assert recipe.model.location == recipe.sources["a"].location == recipe.rules[0].pattern.text == word


@pytest.mark.parametrize(
    "text", ["\ufeffmodel: a\n", "\r\nmodel: a\r\n", "%YAML 1.1\n---\nmodel: a\n...\n", '{"model": "a"}']
)
def test_files_that_other_editors_write(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text).model.location == "a"


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("a.b.weight", "a.b"),
        ("a.*.weight", "a.*"),
        ("a.weight.b", "a.weight.b"),
        ("a.b.weight_scale", "a.b.weight_scale"),
        ("a.b.bias", "a.b.bias"),
    ],
)
def test_the_weight_names_its_module(tmp_path: Path, name: str, module: str) -> None:
    assert read(tmp_path, f"model: a\nweights: {{{name}: model}}\n").rules[0].pattern == Pattern(module)


WORDS = {
    "fp16": {"fp16", "bf16"}, "bf16": {"bf16"}, "fp32": {"fp32"},
    "fp8": {"fp8_block", "fp8_channel", "fp8_tensor"},
    "int4": {"gptq_int4", "awq_int4", "ct_int4", "w4afp8"},
    "int8": {"gptq_int8", "ct_int8", "int8_channel", "int8_block", "int8_tensor"},
    **{kind: {kind} for kind in ("fp8_block", "fp8_channel", "fp8_tensor", "gptq_int4", "awq_int4", "ct_int4")},
    **{kind: {kind} for kind in ("gptq_int8", "ct_int8", "int8_channel", "int8_block", "int8_tensor")},
    "i32": set(), "int2": set(),
}  # fmt: skip


@pytest.mark.parametrize("word", WORDS)
def test_words_for_formats(word: str) -> None:
    assert kinds_of_word(word) == WORDS[word]


# Errors: each names file and line, and the nearest word that is known

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)

BROKEN: dict[str, tuple[str | bytes, int | None, str]] = {
    # YAML
    "empty": ("", None, "the recipe is empty"),
    "only a comment": ("# nothing\n", None, "the recipe is empty"),
    "an empty document": ("---\n", 2, "a recipe is a mapping with `model:`, `sources:` and `weights:`"),
    "a list": ("- a\n- b\n", 1, "a recipe is a mapping with `model:`, `sources:` and `weights:`"),
    "a word": ("hello\n", 1, "a recipe is a mapping with `model:`, `sources:` and `weights:`"),
    "two documents": ("model: a\n---\nmodel: b\n", None, "one document only; remove the second `---`"),
    "not UTF-8": (b"model: a\n# caf\xe9\n", 2, "not UTF-8 text; is this a recipe?"),
    "binary": (b"model: a\nb: \x93NUMPY\x01", 2, "not UTF-8 text; is this a recipe?"),
    "a tab": ("model: a\n\tsources: b\n", 2, "not valid YAML: found a tab character that violates indentation"),
    "two colons": ("model: a: b\n", 1, "not valid YAML: mapping values are not allowed in this context"),
    "a tag": ("model: !!python/object:os.system a\n", 1, "tags like 'tag:yaml.org,2002:python/object:os.system'"),
    "a local tag": ("model: a\nweights: !x {}\n", 2, "tags like '!x' are not allowed"),
    "an anchor": ("model: &a b\n", 1, "anchors (&) and aliases (*) are not allowed; quote names that start with *"),
    "an alias": ("model: *a\n", 1, "anchors (&) and aliases (*) are not allowed; quote names that start with *"),
    "a star": ("model: a\nweights:\n  *.mlp.*: model\n", 3, "; quote names that start with *"),
    "a lone star": ("model: a\nweights:\n  *: model\n", 3, "; quote names that start with *"),
    "a star and a word": ("model: a\nweights:\n  *mlp: model\n", 3, "quote names that start with *"),
    "a brace": ("model: a\nweights:\n  {a,b}.c: model\n", 3, "a key must be a plain name; quote patterns that start"),
    "nested lists": ("model: " + "[" * 100_000, 1, "nested deeper than 16 levels"),
    "nested maps": ("model: " + "{a: " * 100_000, 1, "nested deeper than 16 levels"),
    "aliases of aliases": (BOMB, 1, "anchors (&) and aliases (*) are not allowed"),
    "a tab before a key": ("model: a\nsources:\n\tb: c\n", 3, "that cannot start any token; a tab: YAML wants spaces"),
    "a control character": ("model: a\x07\n", None, "not valid YAML: unacceptable character #x0007"),
    # Keys
    "given twice": ("model: a\nweights: {}\nmodel: b\n", 3, "`model` is given twice; first on line 1"),
    "a rule twice": ("model: a\nweights:\n  x: model\n  x: model\n", 4, "`x` is given twice; first on line 3"),
    "an unknown key": ("model: a\nwieghts: {}\n", 2, "in the recipe: unknown key `wieghts`; did you mean `weights`?"),
    "a strange key": (
        "model: a\nfoo: b\n",
        2,
        "in the recipe: unknown key `foo`; known: `default`, `inference`, `model`, `output`, `server`, `sources`, "
        "`weights`",
    ),
    "an unknown key of output": (
        "model: a\noutput:\n  shardsize: 1GB\n",
        3,
        "in `output:`: unknown key `shardsize`; did you mean `shard_size`?",
    ),
    "an unknown key of mixed_precision": (
        "mixed_precision:\n  fp16_path: a\n  int_4_path: b\n",
        3,
        "in `mixed_precision:`: unknown key `int_4_path`; did you mean `int4_path`?",
    ),
    "an unknown key beside mixed_precision": (
        "mixed_precision: {fp16_path: a}\nsevrer: {}\n",
        2,
        "in a recipe with `mixed_precision:`: unknown key `sevrer`; did you mean `server`?",
    ),
    "keys of both forms": (
        "mixed_precision: {fp16_path: a}\nweights: {}\n",
        2,
        "in a recipe with `mixed_precision:`: unknown key `weights`",
    ),
    # Values
    "no model": ("sources: {fp8: a}\n", 1, "`model:` is missing: the checkpoint that gives config and tokenizer"),
    "an empty model": ("sources: {fp8: a}\nmodel:\n", 2, "expected one word or name here"),
    "no checkpoint": (
        "mixed_precision:\n  base_model_path: a\n",
        2,
        "`mixed_precision:` names no checkpoint; give one of fp16_path, fp8_path, int4_path, gptq_int4_path, "
        "awq_int4_path, int8_path",
    ),
    "sources as a list": ("model: a\nsources:\n  - b\n", 3, "expected `key: value` lines here"),
    "weights as a word": ("model: a\nweights: fp8\n", 2, "expected `key: value` lines here"),
    "inference as a list": ("model: a\ninference: [b]\n", 2, "expected `key: value` lines here"),
    "a list of sources": ("model: a\nweights:\n  x: [model]\n", 3, "expected one word or name here"),
    "a source with a space": ("model: a\nsources:\n  my fp8: b\n", 3, "'my fp8' is no name for a source"),
    "an unknown source": (
        "model: a\nsources:\n  quant: b\nweights:\n  x: quamt\n",
        5,
        "unknown source `quamt`; did you mean `quant`?",
    ),
    "a strange source": (
        "model: a\nsources: {one: b, two: c}\nweights:\n  x: else\n",
        4,
        "unknown source `else`; known: `model`, `one`, `two`",
    ),
    "an unknown default": (
        "model: a\nsources: {fp8: b}\ndefault: fp9\n",
        3,
        "unknown source `fp9`; did you mean `fp8`?",
    ),
    "model as another source": (
        "model: a\nsources:\n  model: b\n",
        3,
        "the source `model` is another checkpoint than `model:`; say which is meant with `default:`",
    ),
    "a malformed pattern": ("model: a\nweights:\n  x.{3..0}: model\n", 3, "the range 3..0 is empty; write {0..3}"),
    "a name that is all suffix": ("model: a\nweights:\n  .weight: model\n", 3, "an empty name matches nothing"),
    "no size": (
        "model: a\noutput:\n  shard_size: 5XB\n",
        3,
        "'5XB' is no size; write 5GB, 512MiB or a number of bytes",
    ),
    "a small size": ("model: a\noutput: {shard_size: 1MB}\n", 2, "shard_size must be at least 1MiB"),
    "a size of two words": ("model: a\noutput: {shard_size: [5, GB]}\n", 2, "expected one word or name here"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_recipe(tmp_path: Path, case: str) -> None:
    text, line, message = BROKEN[case]
    start = time.process_time()
    with pytest.raises(RecipeError) as error:
        read(tmp_path, text)
    assert time.process_time() - start < 2
    where = f"{tmp_path / 'recipe.yaml'}:" if line is None else f"{tmp_path / 'recipe.yaml'}:{line}:"
    assert str(error.value).startswith(f"{where} ")
    assert message in str(error.value)
    assert (error.value.path, error.value.line) == (tmp_path / "recipe.yaml", line)


def test_the_bomb_is_small() -> None:
    """Nine lines that stand for 9 ** 9 words."""
    assert len(BOMB) < 350


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot read the recipe: No such file or directory"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot read the recipe: Is a directory"):
        load_recipe(tmp_path)


def test_a_recipe_that_is_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        os.truncate(file.fileno(), (16 << 20) + 1)
    with pytest.raises(RecipeError, match=r"model\.safetensors: larger than 16 MiB; write ranges like \{0\.\.15\}"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("5 gb", 5_000_000_000),
        (" 512MiB ", 512 << 20),
        ("0.5TiB", 1 << 39),
        ("1.5kb", 1500),
        ("1048576", 1 << 20),
        ("1048576B", 1 << 20),
    ],
)
def test_a_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 G B", "5e9", "5GBs", "1_000", "5.GB", "inf", "9" * 400])
def test_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


# Which line decides


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """Three names for one checkpoint: whatever a recipe says of them is one model and can be served."""
    folder = write_tiny(tmp_path_factory.mktemp("precedence") / "bf16", QWEN3_MOE, "bf16")
    checkpoint = open_checkpoint(str(folder))
    return Sources(checkpoint, {name: Source.of(name, checkpoint) for name in ("a", "b", "c")})


def chosen(sources: Sources, rules: list[tuple[str, str]]) -> dict[str, str]:
    refs = {name: SourceRef(name, name, 1) for name in sources.by_name}
    numbered = tuple(Rule(Pattern(text), source, line) for line, (text, source) in enumerate(rules, start=10))
    recipe = Recipe(Path("recipe.yaml"), refs["a"], refs, "a", numbered)
    return {name: module.source for name, module in make_plan(recipe, sources).modules.items()}


def is_fixed(name: str) -> bool:
    return name.endswith(("norm", ".gate"))


def naive(names: list[str], rules: list[tuple[str, str]]) -> dict[str, str]:
    """The rule as recipes/README.md says it, once for each name and from first to last."""
    result = {}
    for name in names:
        source = "a"
        for text, candidate in rules:
            # A glob does not mean norms and routers, unless it matches nothing else.
            meant = not is_fixed(name) or all(is_fixed(other) for other in names if fnmatchcase(other, text))
            if "*" in text and fnmatchcase(name, text) and meant:
                source = candidate
        for text, candidate in rules:
            if text == name:
                source = candidate
        result[name] = source
    return result


EXACT = [
    "lm_head",
    "model.norm",
    "model.layers.0.mlp.gate",
    "model.layers.1.self_attn.q_proj",
    *(f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(2) for expert in range(2)),
]
GLOBS = [
    "*",
    "lm*",
    "*norm",
    "model.layers.*",
    "model.layers.0.*",
    "*.mlp.*",
    "*.experts.*",
    "*.experts.1.*",
    "*.up_proj",
    "*.mlp.gate*",
    "*.mlp.gate",
    "*layernorm",
    "*.self_attn.*",
    "nothing.*",
]


@given(
    st.lists(st.tuples(st.sampled_from(EXACT + GLOBS), st.sampled_from("abc")), max_size=8, unique_by=lambda r: r[0])
)
def test_an_exact_name_beats_a_glob_and_the_later_glob_wins(sources: Sources, rules: list[tuple[str, str]]) -> None:
    names = list(sources.model.modules)
    assert chosen(sources, rules) == naive(names, rules)


def test_an_exact_name_wins_wherever_it_stands(sources: Sources) -> None:
    name, glob = "model.layers.0.mlp.experts.0.up_proj", "model.layers.*"
    assert chosen(sources, [(name, "b"), (glob, "c")])[name] == "b"
    assert chosen(sources, [(glob, "c"), (name, "b")])[name] == "b"


def test_the_last_of_two_spellings_of_a_module_wins(tmp_path: Path, sources: Sources) -> None:
    recipe = read(tmp_path, "model: m\nsources: {a: m, b: n}\nweights:\n  lm_head.weight: b\n  lm_head: a\n")
    rules = [(rule.pattern.text, rule.source) for rule in recipe.rules]
    assert chosen(sources, rules)["lm_head"] == "a"
    assert chosen(sources, rules[::-1])["lm_head"] == "b"
