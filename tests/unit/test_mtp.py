"""Draft layers (MTP): where they come from, what is missing of them, what is written and said of them."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support.drafts import MODELS, DraftModel, write_release
from support.producers import BF16, FP8_BLOCK, GPTQ_G128, Storage
from support.run import Run

import mixprec_build as mp
from mixprec_build.checkpoint.manifest import MANIFEST
from mixprec_build.families.draft_layers import LONGCAT_MTP, declared_drafts, place_of_draft, with_declared_drafts
from mixprec_build.families.facts import ModelFacts
from mixprec_build.families.registry import find_family
from mixprec_build.planning.complete import modules_within
from mixprec_build.planning.drafts import _Completeness
from mixprec_build.planning.planner import make_plan
from mixprec_build.planning.types import Plan
from mixprec_build.recipe.fix import RecipeFix
from mixprec_build.recipe.recipe import load_recipe
from mixprec_build.recipe.sources import open_sources
from mixprec_build.report.facts import plan_facts

Release = Callable[..., Path]
"""Writes a release once, with the arguments of ``write_release``."""

EVERY = sorted(MODELS)
WITH_EXPERTS = [name for name in EVERY if MODELS[name].experts]
QUANTIZED = [name for name in EVERY if name != "step3p5"]
"""Models whose draft layers SGLang serves quantized."""
CHECKED = ["kimi_k2", "glm4_moe", "qwen3_5", "qwen3_5_moe", "qwen3_next", "ernie4_5", "mimo_v2"]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    root = tmp_path_factory.mktemp("releases")

    @cache
    def write(name: str, storage: Storage = BF16, **options: Any) -> Path:
        folder = root / str(len(list(root.iterdir())))
        return write_release(folder, MODELS[name], storage, **options)

    return write


class Mix:
    """A recipe of a model whose Int4 release has lost its draft layers."""

    def __init__(self, folder: Path, release: Release, name: str, **sources: Path):
        self.model = MODELS[name]
        self.path = folder / "recipe.yaml"
        self.sources = {
            "bf16": release(name),
            "fp8": release(name, FP8_BLOCK, drafts=FP8_BLOCK),
            "int4": release(name, GPTQ_G128, drafts=None),
        } | sources

    def write(self, *lines: str, default: str = "int4", model: str = "", only: str = "") -> Path:
        """A recipe with ``weights:`` ``lines``. ``only``: the names of its sources; all by default."""
        used = only.split() or list(self.sources)
        text = f"model: {self.sources[model or default]}\nsources:\n"
        text += "".join(f"  {name}: {self.sources[name]}\n" for name in used) + f"default: {default}\n"
        text += "weights:\n" + "".join(f"  {line}\n" for line in lines) if lines else ""
        self.path.write_text(text)
        return self.path

    def plan(self, *lines: str, **options: Any) -> Plan:
        drop_mtp = options.pop("drop_mtp", False)
        return mp.plan(self.write(*lines, **options), drop_mtp=drop_mtp)

    def drafts(self, plan: Plan) -> dict[str, str]:
        """Source of each module of draft layers."""
        return {name: m.source for name, m in plan.modules.items() if fnmatchcase(name, self.model.drafts)}

    def refused(self, *lines: str, **options: Any) -> mp.RefusedError:
        with pytest.raises(mp.RefusedError) as refused:
            self.plan(*lines, **options)
        return refused.value

    def apply(self, fix: Any) -> Plan:
        """A plan of the recipe with an edit, as it is in ``--json``."""
        edited = RecipeFix.from_json(json.loads(json.dumps(fix))).apply(self.path.read_text())
        self.path.write_text(edited)
        return mp.plan(self.path)


@pytest.fixture
def mix(tmp_path: Path, release: Release) -> Callable[..., Mix]:
    return lambda name, **sources: Mix(tmp_path, release, name, **sources)


def all_drafts(model: DraftModel) -> set[str]:
    return {part.name for part, _ in model.parts if fnmatchcase(part.name, model.drafts)}


def declared(folder: Path, model: DraftModel) -> Any:
    value: Any = json.loads((folder / "config.json").read_text())
    for key in model.key:
        value = value.get(key)
    return value


# Where they come from


@pytest.mark.parametrize("name", EVERY)
def test_without_a_line_they_come_from_the_default_whatever_lines_say_of_the_model(
    mix: Callable[..., Mix], name: str
) -> None:
    made = mix(name)
    plan = made.plan(f'"{made.model.experts or "*.mlp.*"}": int4', default="bf16")
    assert made.drafts(plan) == dict.fromkeys(all_drafts(made.model), "bf16")
    assert any(module.source == "int4" for module in plan.modules.values())
    assert plan.warnings == ()
    facts = plan_facts(plan)["mtp"]
    assert [(entry["name"], entry["modules"]) for entry in facts["sources"]] == [("bf16", len(all_drafts(made.model)))]
    assert facts["line"] is None and facts["written"] == made.model.layers


@pytest.mark.parametrize(
    ("name", "source"), [*((name, "bf16") for name in EVERY), *((name, "fp8") for name in QUANTIZED)]
)
def test_one_line_grafts_them_into_a_release_that_has_lost_them(
    mix: Callable[..., Mix], tmp_path: Path, name: str, source: str
) -> None:
    made = mix(name)
    plan = made.plan(f"mtp: {source}", f'"*.mlp.*": {source if source == "bf16" else "int4"}')
    assert made.drafts(plan) == dict.fromkeys(all_drafts(made.model), source)
    assert plan.warnings == () and not any("mtp:" in note for note in plan.notes)
    use = next(use for use in plan.rules if use.rule.mtp)
    assert (use.matched, use.won) == (len(all_drafts(made.model)),) * 2
    mp.build(plan, tmp_path / "out")
    assert mp.verify(tmp_path / "out").differences == ()
    if made.model.key:
        assert declared(tmp_path / "out", made.model) == made.model.layers
    facts = mp.inspect(tmp_path / "out")
    kinds = {"fp8_block", "bf16"} if source == "fp8" else {"bf16"}
    assert {entry["name"] for entry in facts["mtp"]["formats"]} == kinds
    assert facts["mtp"]["modules"] == len(all_drafts(made.model)) and not facts["mtp"]["dropped"]
    assert facts["mtp"]["bytes"] == sum(m.nbytes for n, m in plan.modules.items() if fnmatchcase(n, made.model.drafts))
    layers = made.model.config.get("text_config", made.model.config)["num_hidden_layers"]
    assert [row["layer"] for row in facts["layers"]] == list(range(layers))


def test_a_line_for_experts_does_not_reach_draft_layers_and_one_that_names_them_does(mix: Callable[..., Mix]) -> None:
    made = mix("glm4_moe")
    general = '"*.mlp.experts.*": int4', '"model.layers.*.self_attn.*": fp8', '"*": bf16'
    for lines in (("mtp: fp8", *general), (*general, "mtp: fp8")):
        assert set(made.drafts(made.plan(*lines, default="bf16")).values()) == {"fp8"}
    for line in ("model.layers.3.mlp.experts.*: bf16", '"model.layers.{1..3}.mlp.experts.*": bf16'):
        for lines in (("mtp: fp8", *general, line), (line, "mtp: fp8", *general)):
            drafts = made.drafts(made.plan(*lines, default="bf16"))
            assert {n for n, source in drafts.items() if source == "bf16"} == {n for n in drafts if ".experts." in n}


@pytest.mark.parametrize(
    ("pattern", "reached"),
    [
        ("mtp.*", 2), ("*mtp.layers.*", 2), ("mtp.layers.{0,1}.mlp.experts.0.*", 2), ("{mtp,model}.layers.0.*", 2),
        ("*.pre_fc_norm_hidden", 1), ("*.layers.0.*", 0), ("*.mlp.experts.*", 0),
        ("*.layers.{0..2}.mlp.*", 0), ("*", 0),
    ],
)  # fmt: skip
def test_which_globs_reach_draft_layers(mix: Callable[..., Mix], pattern: str, reached: int) -> None:
    """2: linears, 1: norms, for the line matches nothing else, 0: none."""
    made = mix("qwen3_next")
    drafts = made.drafts(made.plan("mtp: bf16", f'"{pattern}": fp8', default="bf16"))
    found = Counter(name.rpartition(".")[2] for name, source in drafts.items() if source == "fp8")
    assert (2 if found["up_proj"] else 1 if found else 0) == reached
    assert not (found["gate"] or found["fc"]) or reached == 2


def test_a_glob_that_names_them_grafts_them_too(mix: Callable[..., Mix]) -> None:
    made = mix("qwen3_5_moe")
    plan = made.plan("mtp.*: bf16", "mtp.layers.0.mlp.experts.*: fp8")
    drafts = made.drafts(plan)
    assert drafts.keys() == all_drafts(made.model)
    assert {n for n, source in drafts.items() if source == "fp8"} == {n for n in drafts if ".experts." in n}


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_experts_of_draft_layers_are_mixed_like_others(mix: Callable[..., Mix], release: Release, name: str) -> None:
    made = mix(name, int4=release(name, GPTQ_G128, drafts=GPTQ_G128))
    names = sorted(n for n in all_drafts(made.model) if ".experts.1." in n)
    if not names:
        return  # MiMo-V2's are dense
    block = names[0].partition(".1.")[0]
    plan = made.plan("mtp: fp8", f"{block}.1.*: int4", default="bf16")
    kinds = {m.format.kind for n, m in plan.modules.items() if n.startswith(f"{block}.")}
    assert kinds == {"fp8_block", "gptq_int4"}
    assert {plan.modules[n].format.kind for n in names} == {"gptq_int4"}


def test_a_format_names_the_source(mix: Callable[..., Mix]) -> None:
    made = mix("qwen3_5", a=Path())
    made.sources = {"a": made.sources["bf16"], "b": made.sources["fp8"], "c": made.sources["int4"]}
    plan = made.plan("mtp: fp8", default="c")
    assert set(made.drafts(plan).values()) == {"b"}
    assert not any("stored as bf16" in note for note in plan.notes)


def test_the_older_form_has_the_word_too(mix: Callable[..., Mix]) -> None:
    made = mix("qwen3_5")
    paths = "".join(f"  {name}_path: {made.sources[name]}\n" for name in ("int4", "fp8"))
    made.path.write_text(f"mixed_precision:\n{paths}  weight_mapping:\n    mtp: fp8\n")
    assert set(made.drafts(mp.plan(made.path)).values()) == {"fp8"}


def test_the_word_at_the_top_is_an_error_with_advice(mix: Callable[..., Mix]) -> None:
    made = mix("qwen3_5")
    made.path.write_text(made.write().read_text() + "mtp: bf16\n")
    with pytest.raises(mp.RecipeError, match=r":7: `mtp:` at the top: .*write there `mtp: SOURCE`"):
        mp.plan(made.path)


# Lost and partly lost


@pytest.mark.parametrize("name", EVERY)
def test_lost_ones_are_a_warning_with_an_edit_that_takes_them(
    mix: Callable[..., Mix], mixprec: Run, tmp_path: Path, name: str
) -> None:
    made = mix(name)
    path = made.write()
    ended = mixprec("plan", path, "--json")
    facts = json.loads(ended.out)
    (warning,) = facts["warnings"]
    assert ended.code == 0 and warning["code"] == "lost_drafts" and not warning["hard"]
    assert "`int4`, the default, lacks them, and `bf16`, `fp8` have them" in warning["message"]
    assert "mtp: bf16`" in warning["message"] and "warning: " in mixprec("plan", path).out
    mp.build(made.path, tmp_path / "lost")
    assert not made.model.key or declared(tmp_path / "lost", made.model) == 0
    plan = made.apply(warning["fix"])
    assert made.drafts(plan) == dict.fromkeys(all_drafts(made.model), "bf16")
    assert plan.warnings == ()


def test_a_build_warns_on_standard_error(mix: Callable[..., Mix], mixprec: Run, tmp_path: Path) -> None:
    ended = mixprec("build", mix("qwen3_5").write(), "-o", tmp_path / "out")
    assert ended.code == 0 and "warning: config.json declares 1 draft layer (MTP), and the mix has none" in ended.err


def test_a_line_that_takes_them_from_where_they_are_lost_is_refused(mix: Callable[..., Mix]) -> None:
    made = mix("qwen3_5")
    (problem,) = made.refused("mtp: int4", default="bf16").problems
    assert problem.code == "missing_module" and problem.hard and problem.fix is not None
    assert str(problem) == (
        "`int4` has no draft layers (MTP), which line 8 `mtp: int4` takes from it. Change line 8 to `mtp: bf16`"
    )
    assert set(made.drafts(made.apply(problem.fix.to_json())).values()) == {"bf16"}
    (alone,) = made.refused("mtp: int4", only="int4").problems
    assert alone.fix is None and "remove the line" in str(alone)


@pytest.mark.parametrize(
    ("name", "lost"), [(name, part) for name in CHECKED for part in (MODELS[name].plain, *MODELS[name].needed)]
)
def test_partly_lost_ones_are_refused_and_taken_from_elsewhere(
    mix: Callable[..., Mix], release: Release, name: str, lost: str
) -> None:
    made = mix(name, part=release(name, lost=lost))
    (problem,) = made.refused('"*.mlp.*": bf16', default="part").problems
    assert problem.code == "incomplete_model" and problem.hard and problem.fix is not None
    shown = lost.partition(".down_proj")[0] if lost.endswith("down_proj") else lost
    assert shown.rpartition(".")[0] in str(problem) and "Add below line 9: `mtp: bf16`" in str(problem)
    assert set(made.drafts(made.apply(problem.fix.to_json())).values()) == {"bf16"}


def test_without_a_complete_source_the_advice_is_to_leave_them_out(mix: Callable[..., Mix], release: Release) -> None:
    made = mix("glm4_moe", part=release("glm4_moe", lost="*.eh_proj"))
    (problem,) = made.refused(default="part", only="part int4").problems
    assert str(problem).endswith(
        "model.layers.3.eh_proj: the draft layers (MTP) from `part` lack it, which SGLang's class for draft layers "
        "needs. Add a source that has complete draft layers, or leave them out with --drop-mtp"
    )
    assert made.drafts(made.plan(default="part", only="part int4", drop_mtp=True)) == {}


def test_fewer_layers_than_config_json_declares(mix: Callable[..., Mix], release: Release) -> None:
    made = mix("step3p5", part=release("step3p5", lost="model.layers.3.*"))
    assert "model.layers.3: the draft layers (MTP) from `part` lack it" in str(made.refused(default="part"))
    made = mix("glm4_moe", part=release("glm4_moe", declared=2))
    assert "model.layers.4: the draft layers (MTP)" in str(made.refused(default="part"))


@pytest.mark.parametrize("name", EVERY)
def test_complete_ones_have_no_note(mix: Callable[..., Mix], name: str) -> None:
    plan = mix(name).plan(default="bf16", only="bf16")
    assert not any("MTP" in note for note in plan.notes) and plan.warnings == ()


def test_declared_and_nowhere_is_a_note(mix: Callable[..., Mix], release: Release, tmp_path: Path) -> None:
    """As MiniMax-M2 with num_mtp_modules."""
    made = mix("glm4_moe", none=release("glm4_moe", drafts=None))
    plan = made.plan(default="none", only="none")
    assert plan.warnings == ()
    (note,) = [note for note in plan.notes if "MTP" in note]
    assert note.startswith("config.json declares 1 draft layer (MTP), and no source has any; ")
    mp.build(plan, tmp_path / "out")
    assert declared(tmp_path / "out", made.model) == 0
    assert mp.inspect(made.sources["none"])["mtp"]["declared"] == 1


def test_what_a_cache_lacks_is_not_called_lost(mix: Callable[..., Mix]) -> None:
    made = mix("qwen3_5")
    recipe = load_recipe(made.write("mtp: int4", default="bf16"))
    sources = open_sources(recipe)
    absent = {"mtp.fc": "model-00003-of-00003.safetensors"}
    offline = dataclasses.replace(sources.by_name["int4"].checkpoint, absent=absent)
    lacking = dataclasses.replace(sources.by_name["int4"], checkpoint=offline)
    sources = dataclasses.replace(sources, by_name={**sources.by_name, "int4": lacking})
    with pytest.raises(mp.RefusedError, match=r"lacks model-00003-of-00003\.safetensors with its draft") as refused:
        make_plan(recipe, sources)
    assert [problem.code for problem in refused.value.problems] == ["not_cached"]


_ATTENTION = tuple(f"mixer.{name}_proj" for name in "qkvo")
_EXPERTS = ("mixer.gate", *(f"mixer.experts.{n}.{word}_proj" for n in range(2) for word in ("up", "down")))
_LING = ("input_layernorm", "post_attention_layernorm", "attention.query_key_value", "attention.dense", "mlp.up_proj")


@pytest.mark.parametrize(
    ("config", "layers", "drafts", "lost"),
    [
        (
            {"model_type": "nemotron_h", "n_routed_experts": 2},
            [("norm", "mixer.in_proj", "mixer.out_proj"), ("norm", *_ATTENTION), ("norm", *_EXPERTS)],
            [
                *(f"mtp.layers.0.{name}" for name in ("norm", *_ATTENTION, "enorm", "hnorm", "eh_proj")),
                *(f"mtp.layers.1.{name}" for name in ("norm", *_EXPERTS, "final_layernorm")),
            ],
            ["mtp.layers.0.mixer.k_proj", "mtp.layers.1.mixer.experts.1.up_proj"],
        ),
        (
            {"model_type": "longcat_flash"},
            [("self_attn.0.q_a_proj", "self_attn.1.q_a_proj", "mlps.0.up_proj", "input_layernorm.0")],
            [*(f"model.mtp.layers.0.{name}" for name in LONGCAT_MTP.in_each), "model.mtp.norm"],
            ["model.mtp.layers.0.eh_proj", "model.mtp.layers.0.self_attn.o_proj", "model.mtp.norm"],
        ),
        (
            {"model_type": "bailing_moe_v2"},
            [_LING],
            [f"model.layers.2.{name}" for name in (*_LING, "eh_proj", "enorm", "hnorm", "final_layernorm")],
            ["model.layers.2.attention.dense", "model.layers.2.final_layernorm"],
        ),
    ],
)
def test_what_draft_layers_of_other_shapes_lack(
    config: dict[str, Any], layers: list[tuple[str, ...]], drafts: list[str], lost: list[str]
) -> None:
    facts = ModelFacts.of({**config, "num_hidden_layers": 2, "num_nextn_predict_layers": 1})
    kinds: dict[str, set[frozenset[str]]] = defaultdict(set)
    for inner in layers:
        for node, children in modules_within(inner, facts.family).items():
            kinds[node].add(frozenset(children))
    completeness = _Completeness(facts, kinds, None)  # type: ignore[arg-type]
    assert all(facts.family.is_draft(name, 2) for name in drafts)
    assert completeness.missing(drafts, (), 1) == completeness.likely_missing(drafts) == []
    for name in lost:
        assert completeness.missing([other for other in drafts if other != name], (), 1) == [name]


# Formats


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_linear_that_sglang_never_quantizes_in_draft_layers(
    mix: Callable[..., Mix], release: Release, name: str
) -> None:
    made = mix(name, quant=release(name, FP8_BLOCK, drafts=FP8_BLOCK, plain=True))
    (problem,) = made.refused("mtp: quant", default="bf16").problems
    assert problem.code == "role_limit" and problem.fix is not None
    assert "SGLang's class for draft layers makes it a torch.nn.Linear" in str(problem)
    plan = made.apply(problem.fix.to_json())
    assert plan.modules[made.model.plain].format.kind == "bf16"
    assert "fp8_block" in {plan.modules[name].format.kind for name in made.drafts(plan)}


def test_draft_layers_that_sglang_never_quantizes_at_all(mix: Callable[..., Mix]) -> None:
    """Step's class for draft layers passes no quantization config to the decoder layer in it."""
    made = mix("step3p5")
    (problem,) = made.refused("mtp: fp8", default="bf16").problems
    assert problem.code == "role_limit" and not problem.hard and problem.fix is not None
    assert str(problem).endswith("makes them without quantization. Change line 8 to `mtp: bf16`")
    assert set(made.drafts(made.apply(problem.fix.to_json())).values()) == {"bf16"}
    named = "model.layers.3.mlp.*: fp8"
    (problem,) = made.refused("mtp: bf16", named, default="bf16").problems
    assert problem.fix is not None and "Change" not in str(problem)
    assert set(made.drafts(made.apply(problem.fix.to_json())).values()) == {"bf16"}


# Left out


@pytest.mark.parametrize("name", EVERY)
def test_dropped_ones_are_nowhere_and_not_declared(
    mix: Callable[..., Mix], mixprec: Run, tmp_path: Path, name: str
) -> None:
    made, out = mix(name), tmp_path / "out"
    path = made.write("mtp: fp8", f"{made.model.plain}: bf16", default="bf16")
    facts = json.loads(mixprec("plan", path, "--drop-mtp", "--json").out)
    assert facts["mtp"]["dropped"] and facts["mtp"]["modules"] == 0 and facts["warnings"] == []
    assert sum("--drop-mtp leaves the draft layers out" in note for note in facts["notes"]) == 2
    assert not any("matches nothing" in note for note in facts["notes"])
    assert mixprec("build", path, "-o", out, "--drop-mtp", "--quiet").code == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert not any(fnmatchcase(tensor, made.model.drafts) for tensor in index) and index
    assert not made.model.key or declared(out, made.model) == 0
    assert not any(declared_drafts(json.loads((out / "config.json").read_text())).values())
    manifest = json.loads((out / MANIFEST).read_text())
    assert manifest["drop_mtp"] is True
    assert {entry["source"] for entry in manifest["left_out"] if entry["reason"] == "draft layers (MTP), dropped"} >= {
        "bf16", "fp8",
    }  # fmt: skip
    ended = mixprec("verify", out)
    assert ended.code == 0 and "left out when it was built (--drop-mtp)" in ended.out
    assert mp.verify(out).drops_mtp
    assert mp.inspect(out)["mtp"]["dropped"]
    assert "draft layers (MTP): left out with --drop-mtp" in mixprec("inspect", out).out


def test_a_dropped_build_and_one_with_them_follow_one_another(mix: Callable[..., Mix], tmp_path: Path) -> None:
    made, out = mix("qwen3_5"), tmp_path / "out"
    path = made.write(default="bf16", only="bf16")
    mp.build(path, out, drop_mtp=True)
    mp.build(path, out, force=True)
    assert mp.verify(out).differences == () and not mp.verify(out).drops_mtp
    assert declared(out, made.model) == 1 and mp.inspect(out)["mtp"]["modules"] == len(all_drafts(made.model))


# config.json


def test_a_config_without_the_key_gets_that_of_the_draft_s_source(
    mix: Callable[..., Mix], release: Release, tmp_path: Path
) -> None:
    for name in ("glm4_moe", "qwen3_5"):
        made = mix(name, int4=release(name, GPTQ_G128, drafts=None, declared=-1))
        plan = made.plan()
        assert [warning.code for warning in plan.warnings] == ["lost_drafts"]
        mp.build(plan, tmp_path / f"lost-{name}")
        assert declared(tmp_path / f"lost-{name}", made.model) is None
        mp.build(made.write("mtp: bf16"), tmp_path / name)
        assert declared(tmp_path / name, made.model) == 1


def test_the_count_is_that_of_the_draft_s_source() -> None:
    key = "num_nextn_predict_layers"
    assert with_declared_drafts({key: 1}, 3) == {key: 3}
    assert with_declared_drafts({key: 0}, 1) == {key: 1}
    assert with_declared_drafts({key: None}, 0) == {key: None}
    assert with_declared_drafts({"num_mtp_modules": 3, key: 1}, 0) == {"num_mtp_modules": 0, key: 0}
    assert with_declared_drafts({"a": 1}, 2, {key: 2}) == {"a": 1, key: 2}
    text = {"text_config": {"mtp_num_hidden_layers": 1}}
    assert with_declared_drafts({"text_config": {}}, 1, text) == text
    assert with_declared_drafts({}, 1, text) == {}
    assert with_declared_drafts({"a": 1}, 2, {"b": 1}) == {"a": 1}
    config = {"text_config": {"mtp_num_hidden_layers": 1}}
    assert with_declared_drafts(config, 0)["text_config"] == {"mtp_num_hidden_layers": 0}
    assert config == text


# Files beside the index


@pytest.mark.parametrize("file", ["mtp.safetensors", "model_mtp.safetensors", "model_extra_tensors.safetensors"])
@pytest.mark.parametrize("name", ["glm4_moe", "qwen3_5_moe", "ernie4_5", "step3p5"])
def test_they_are_grafted_from_a_file_beside_the_index(
    mix: Callable[..., Mix], release: Release, name: str, file: str
) -> None:
    made = mix(name, beside=release(name, beside=file))
    plan = made.plan("mtp: beside")
    assert made.drafts(plan) == dict.fromkeys(all_drafts(made.model), "beside")
    assert {tensor.info.file for n in made.drafts(plan) for tensor in plan.modules[n].tensors.values()} == {file}


# Reports, suggest


def test_a_plan_and_inspect_show_a_row(mix: Callable[..., Mix], mixprec: Run, tmp_path: Path) -> None:
    made = mix("glm4_moe")
    path = made.write("mtp: fp8", '"*.mlp.*": int4', default="bf16")
    shown = mixprec("plan", path).out
    assert "Draft layers (MTP)" in shown and "model.layers.3" in shown and "fp8 x" in shown
    mp.build(path, tmp_path / "out")
    facts = json.loads(mixprec("inspect", tmp_path / "out", "--json").out)
    assert facts["mtp"]["layers"] == ["model.layers.3"] and facts["mtp"]["projections"]["experts"] == {"fp8_block": 2}
    assert "Draft layers (MTP)" in mixprec("inspect", tmp_path / "out").out


@pytest.mark.parametrize("lines", [("mtp: fp8",), ()])
def test_suggest_leaves_them_and_counts_their_bytes(
    mix: Callable[..., Mix], tmp_path: Path, lines: tuple[str, ...]
) -> None:
    made, out = mix("qwen3_5_moe"), tmp_path / "suggested.yaml"
    path = made.write(*lines, default="bf16")
    suggestion = mp.suggest(path, "1GB", out, errors=tmp_path / "errors")
    source = "fp8" if lines else "bf16"
    assert set(made.drafts(suggestion.plan).values()) == {source}
    assert not any(fnmatchcase(n, made.model.drafts) for group in suggestion.groups for n in group.members)
    assert any("draft layers (MTP): as in recipe.yaml, " in n and f"from `{source}`" in n for n in suggestion.notes)
    assert suggestion.nbytes == sum(shard.file_bytes(suggestion.plan.sources) for shard in suggestion.plan.shards)
    assert ("  mtp: fp8  #" in out.read_text()) == bool(lines)
    again = mp.plan(out)
    assert {n: m.source for n, m in again.modules.items()} == {n: m.source for n, m in suggestion.plan.modules.items()}
    with pytest.raises(mp.BudgetError):
        mp.suggest(path, sum(m.nbytes for m in again.modules.values() if m.draft), errors=tmp_path / "errors")


def test_suggest_refuses_partly_lost_ones_before_it_measures(mix: Callable[..., Mix], release: Release) -> None:
    made = mix("qwen3_5", part=release("qwen3_5", lost="mtp.fc"))
    with pytest.raises(mp.RefusedError, match=r"mtp\.fc: the draft layers \(MTP\) from `part` lack it"):
        mp.suggest(made.write(default="part"), "1GB", errors=made.path.parent / "errors")


# Names


def test_an_encoder_with_more_layers_than_the_decoder_is_no_draft() -> None:
    family = find_family("mistral3")
    assert family is not None
    assert family.is_draft("model.layers.2.eh_proj", 2)
    for name in ("vision_tower.transformer.layers.5.attention.q_proj", "model.visual.layers.9.mlp.fc1"):
        assert not family.is_draft(name, 2)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.61.mlp.experts.3.up_proj", ("model.layers", 61, "mlp.experts.3.up_proj")),
        ("mtp.layers.0.self_attn.q_proj", ("mtp.layers", 0, "self_attn.q_proj")),
        ("mtp.0.attn.wq_a", ("mtp", 0, "attn.wq_a")),
        ("mtp.fc", ("mtp", None, "fc")),
        ("model.mtp.pre_fc_norm_hidden", ("model.mtp", None, "pre_fc_norm_hidden")),
        ("model.mtp_linear_proj.0", ("model", 0, "mtp_linear_proj")),
        ("model.mtp_layers.1.input_proj", ("model.mtp_layers", 1, "input_proj")),
    ],
)
def test_the_place_of_a_module(name: str, place: tuple[str, int | None, str]) -> None:
    assert place_of_draft(name) == place


def test_configs_that_differ_in_draft_layers_alone_are_of_one_model() -> None:
    ours = ModelFacts.of({"model_type": "minimax_m2", "num_mtp_modules": 3, "mtp_num_layers": 1})
    assert ours.differences(ModelFacts.of({"model_type": "minimax_m2", "num_mtp_modules": 0})) == []
    assert ours.draft_layers == 3
