"""A model family from outside the package, with names of its own for everything.

Its checkpoints are Qwen3-MoE's under other names, so that whatever is planned, built, cut and said of them must be
what is of Qwen3-MoE's, but for the names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.files import folder_tensors
from support.write import QWEN3_MOE, Config, Tensors, write_tiny

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.checkpoint.typed import open_source
from mixprec_build.errors import RefusedError, SplitError
from mixprec_build.families import registry
from mixprec_build.families.base import Family
from mixprec_build.families.parts import CutBy, FusedGroup, Projections, Restriction, Role, StoredFormat
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.output.split import split
from mixprec_build.output.verify import verify
from mixprec_build.planning.types import Plan
from mixprec_build.report.facts import inspect_facts

TOY = Family(
    model_types=frozenset({"toy"}),
    architectures=frozenset({"ToyForConditionalGeneration"}),
    embedding="toy.text.table",
    head="toy.answer",
    renamed=(("toy.text.", "model."), ("toy.answer", "answer")),
    embeddings=frozenset({"table"}),
    heads=frozenset({"answer"}),
    routers=frozenset({"chooser"}),
    norms=re.compile(r".*_scaling"),
    last_norms=("last_scaling",),
    drafts=("toy.ahead.",),
    fused=(FusedGroup("kqv", ("key", "query", "value")), FusedGroup("wide", ("open", "rise"))),
    experts="specialists",
    projections=(Projections("open", "rise", "fall"),),
    checked=True,
    can_be_cut=True,
    cuts={
        "query": CutBy.QUERY_HEADS, "key": CutBy.KEY_VALUE_HEADS, "value": CutBy.KEY_VALUE_HEADS,
        "merge": CutBy.HEAD_INPUTS, "table": CutBy.VOCABULARY, "answer": CutBy.VOCABULARY,
    },
    attention_norms=("first_scaling",),
    attention_inputs=frozenset({"query", "key", "value"}),
    mlp_norms=("second_scaling",),
    linears_before={"merge": "value"},
)  # fmt: skip

# Qwen3-MoE's words -> the toy's, in the order that they are looked for in.
WORDS = {
    "input_layernorm": "first_scaling", "post_attention_layernorm": "second_scaling",
    "model.norm": "toy.text.last_scaling",
    "q_norm": "query_scaling", "k_norm": "key_scaling", "embed_tokens": "table", "lm_head": "toy.answer",
    "self_attn": "mixer", "q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "merge",
    "mlp.experts": "mlp.specialists", "gate_proj": "open", "up_proj": "rise", "down_proj": "fall",
    "mlp.gate": "mlp.chooser", "model.": "toy.text.",
}  # fmt: skip

MODEL = replace(QWEN3_MOE, kv_heads=4)
SOURCES = ("bf16", "fp8_block", "gptq_int4", "awq_int4")
LINES = {
    "model.layers.*.self_attn.*": "fp8_block",
    "model.layers.*.mlp.experts.*": "gptq_int4",
    "model.layers.1.mlp.experts.{1,3}.*": "fp8_block",
    "model.layers.1.mlp.experts.2.down_proj": "fp8_block",
}
DEGREE = Degree(2)


def toy_name(name: str) -> str:
    """A name, pattern or message of Qwen3-MoE's in the toy's words."""
    for ours, theirs in WORDS.items():
        name = name.replace(ours, theirs)
    return name


def toy(tensors: Tensors, config: Config) -> None:
    tensors |= {toy_name(name): tensors.pop(name) for name in list(tensors)}
    config["model_type"] = "toy"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``toy`` and ``plain``, the same weights in the same formats."""
    folder = tmp_path_factory.mktemp("families")
    for source in SOURCES:
        options: dict[str, Any] = {"fold": 0.5} if source == "awq_int4" else {}
        write_tiny(folder / "plain" / source, MODEL, source, **options)
        write_tiny(folder / "toy" / source, MODEL, source, edit=toy, **options)
    return folder


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(registry, "FAMILIES", registry.FAMILIES)
    registry.register(TOY)
    return


def plan(folder: Path, which: str, lines: dict[str, str], output: str = "") -> Plan:
    lines = {toy_name(pattern): source for pattern, source in lines.items()} if which == "toy" else lines
    text = [f"model: {which}/bf16", "default: bf16", "sources:", *(f"  {name}: {which}/{name}" for name in SOURCES)]
    text += ["weights:", *(f"  '{pattern}': {source}" for pattern, source in lines.items()), output]
    recipe = folder / f"{which}.yaml"
    recipe.write_text("\n".join(text))
    return plan_recipe(recipe)


def in_toy_words(tensors: dict[str, Any]) -> dict[str, Any]:
    return {toy_name(name): tensor for name, tensor in tensors.items()}


@pytest.mark.usefixtures("registered")
def test_it_is_built_verified_and_cut_as_the_family_that_it_is_like(folder: Path, tmp_path: Path) -> None:
    outs = {}
    for which in ("toy", "plain"):
        planned = plan(folder, which, LINES, "output: {tp: 2}")
        assert planned.notes == ()
        outs[which] = tmp_path / which
        run_plan(planned, outs[which])
        split(outs[which], DEGREE)
        assert not verify(outs[which]).differences
    assert folder_tensors(outs["toy"]) == in_toy_words(folder_tensors(outs["plain"]))
    for rank in range(DEGREE.tp):
        ours, theirs = (folder_tensors(outs[which] / DEGREE.folder(rank)) for which in ("toy", "plain"))
        # SGLang's names: of its own layers, below `model.`
        words = {"toy.text.": "model.", "toy.answer": "answer", "qkv_proj": "kqv", "gate_up_proj": "wide"}
        assert ours.keys() == {_replaced(toy_name(name.replace("qkv_proj", "kqv")), words) for name in theirs}
        joined = "model.layers.0.self_attn.qkv_proj.weight", "model.layers.0.mixer.kqv.weight"
        assert joined[0] in theirs and joined[1] in ours
        for name, tensor in theirs.items():
            if "qkv_proj" not in name:  # the toy joins them in another order
                assert ours[_replaced(toy_name(name), words)] == tensor
    rank_0 = folder_tensors(outs["toy"] / DEGREE.folder(0))
    assert rank_0["model.layers.0.mixer.kqv.weight"][1] == [3 * 128, 128]


def _replaced(name: str, words: dict[str, str]) -> str:
    for ours, theirs in words.items():
        name = name.replace(ours, theirs)
    return name


@pytest.mark.usefixtures("registered")
def test_it_is_inspected_as_the_family_that_it_is_like(folder: Path, tmp_path: Path) -> None:
    facts = {}
    for which in ("toy", "plain"):
        run_plan(plan(folder, which, LINES), tmp_path / which)
        facts[which] = inspect_facts(open_source(str(tmp_path / which)), tmp_path / which)
    layers = json.loads(toy_name(json.dumps(facts["plain"]["layers"])))
    assert facts["toy"]["layers"] == layers
    assert facts["toy"]["layers"][1]["projections"]["experts"] == {
        "gptq_int4": 1, "fp8_block": 2, "gptq_int4 (down fp8_block)": 1,
    }  # fmt: skip
    ours, theirs = (sorted(facts[which]["formats"], key=lambda entry: str(entry["name"])) for which in facts)
    assert ours == theirs


REFUSED = [
    # Parts of a fused group, of which two run as one GEMM; and an expert's gate and up
    {"model.layers.0.self_attn.q_proj": "fp8_block"},
    {"model.layers.1.mlp.experts.2.gate_proj": "gptq_int4"},
    # Scales that are folded into a norm, and into a linear before
    {"model.layers.0.self_attn.{q,k}_proj": "awq_int4", "model.layers.0.self_attn.v_proj": "bf16"},
    {"model.layers.*.mlp.experts.*.{gate,up}_proj": "awq_int4", "model.layers.*.self_attn.*": "awq_int4"},
]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("lines", REFUSED, ids=[str(n) for n in range(len(REFUSED))])
def test_it_is_refused_what_the_family_that_it_is_like_is(folder: Path, lines: dict[str, str]) -> None:
    patterns = {pattern.replace("{q,k}_proj", "{q_proj,k_proj}"): source for pattern, source in lines.items()}
    patterns = {p.replace("{gate,up}_proj", "{gate_proj,up_proj}"): source for p, source in patterns.items()}
    with pytest.raises(RefusedError) as theirs:
        plan(folder, "plain", patterns)
    with pytest.raises(RefusedError) as ours:
        plan(folder, "toy", patterns)
    assert len(ours.value.problems) == len(theirs.value.problems) > 0
    assert any(word in str(ours.value) for word in ("kqv", "rise", "toy.text.layers.{0..1}.first_scaling"))


def test_what_it_has_no_place_for_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def limit(fmt: StoredFormat) -> str | None:
        return None if fmt.has_weight else "a toy merges weights alone"

    monkeypatch.setattr(registry, "FAMILIES", registry.FAMILIES)
    registry.register(replace(TOY, restrictions=(Restriction(("mixer.merge",), limit),)))
    plan(folder, "toy", {"model.layers.*.self_attn.o_proj": "fp8_block"})
    with pytest.raises(RefusedError, match=r"toy\.text\.layers\.0\.mixer\.merge: .*: a toy merges weights alone"):
        plan(folder, "toy", {"model.layers.0.self_attn.o_proj": "gptq_int4"})


@pytest.mark.usefixtures("registered")
def test_norms_and_routers_follow_what_they_feed(folder: Path) -> None:
    lines = {"model.layers.*.self_attn.*": "awq_int4", "model.layers.*.mlp.experts.*": "awq_int4"}
    ours, theirs = (plan(folder, which, lines) for which in ("toy", "plain"))
    followers = [{m.name for m in planned.modules.values() if m.follows} for planned in (ours, theirs)]
    assert followers[0] == {toy_name(name) for name in followers[1]}
    assert "toy.text.layers.1.mlp.chooser" in followers[0] and "toy.text.layers.0.first_scaling" in followers[0]


def test_without_it_its_names_mean_nothing(folder: Path, tmp_path: Path) -> None:
    planned = plan(folder, "toy", REFUSED[0])
    assert planned.notes[0].startswith("model_type 'toy' is not among the families checked against SGLang (")
    run_plan(planned, tmp_path / "out")
    with pytest.raises(SplitError, match="model_type 'toy' cannot be cut; the families known are apertus,"):
        split(tmp_path / "out", DEGREE)


@pytest.mark.usefixtures("registered")
def test_it_is_found_by_its_class_where_model_type_says_something_else(folder: Path, tmp_path: Path) -> None:
    def renamed(tensors: Tensors, config: Config) -> None:
        toy(tensors, config)
        config.update(model_type="toy_reference", architectures=["ToyForConditionalGeneration"])

    write_tiny(tmp_path / "bf16", MODEL, "bf16", edit=renamed)
    assert open_source(str(tmp_path / "bf16")).facts.family is TOY
    with pytest.raises(ValueError, match="there is a family for ToyForConditionalGeneration, toy"):
        registry.register(replace(TOY, embedding="table"))


def test_what_it_says_of_names() -> None:
    assert TOY.role_by_name("toy.text.layers.0.mlp.specialists.3.fall") is Role.EXPERT
    assert TOY.role_by_name("toy.text.layers.0.mlp.experts.3.down_proj") is None
    assert TOY.is_draft("toy.ahead.layers.0.mixer.query", 2) and TOY.is_draft("toy.text.layers.2.mixer.query", 2)
    assert not TOY.is_draft("toy.text.layers.1.mixer.query", 2)
    assert TOY.members_of("kqv") == ("key", "query", "value")
    # A layer that SGLang's class tells a name without `model.`
    told = list(TOY.stored_names("layers.0.mixer.merge"))
    assert told == ["layers.0.mixer.merge", "model.layers.0.mixer.merge", "toy.text.layers.0.mixer.merge"]
