"""`mixprec suggest`: it chooses what trying every mix finds, within the budget, and what it writes can be planned."""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.hollow import write_hollow
from support.run import invoke
from support.write import DEEPSEEK, LLAMA, QWEN3_MOE, Tiny, write_tiny

from mixprec_build.checkpoint.typed import open_source
from mixprec_build.errors import BudgetError, OutputError, RecipeError, RefusedError, SourceError, StatsError
from mixprec_build.output.build import plan_recipe
from mixprec_build.planning.types import Plan
from mixprec_build.recipe.recipe import load_recipe
from mixprec_build.recipe.sources import open_sources
from mixprec_build.suggesting import allocate
from mixprec_build.suggesting.activity import Activity
from mixprec_build.suggesting.allocate import Suggestion, suggest
from mixprec_build.suggesting.choices import Request
from mixprec_build.suggesting.distortion import Distortion, DistortionCache
from mixprec_build.suggesting.objective import Objective
from mixprec_build.suggesting.recipe_file import recipe_text

VARIANTS = {"bf16": "bf16", "fp8": "fp8_block", "int4": "gptq_int4"}


def write_sources(folder: Path, model: Tiny, variants: Mapping[str, str] = VARIANTS, more: str = "") -> Path:
    for variant in variants.values():
        write_tiny(folder / variant, model, variant, skip=["*.kv_b_proj", "*.q_a_proj", "*.kv_a_proj_with_mqa"])
    first = next(iter(variants.values()))
    lines = [f"model: {first}", "sources:", *(f"  {name}: {variant}" for name, variant in variants.items())]
    (folder / "base.yaml").write_text("\n".join(lines) + f"\n{more}")
    return folder / "base.yaml"


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("moe"), QWEN3_MOE)


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sources(tmp_path_factory.mktemp("deepseek"), DEEPSEEK)


def chosen(base: Path, budget: int, **asked: Any) -> Suggestion:
    recipe = load_recipe(base)
    with DistortionCache(base.with_name("kept.jsonl")) as cache:
        return suggest(recipe, open_sources(recipe), Request(budget, **asked), cache)


def written(suggestion: Suggestion, folder: Path) -> Plan:
    """The plan of what is written, read back."""
    out = folder / "suggested.yaml"
    out.write_text(recipe_text(suggestion, folder))
    return plan_recipe(out)


def file_bytes(plan: Plan) -> int:
    return sum(shard.file_bytes(plan.sources) for shard in plan.shards)


def sources_of(plan: Plan, pattern: str) -> set[str]:
    return {module.source for name, module in plan.modules.items() if re.search(pattern, name)}


def ends(base: Path, **asked: Any) -> tuple[int, int]:
    """The bytes of the smallest mix and of the largest."""
    with pytest.raises(BudgetError) as caught:
        chosen(base, 1, **asked)
    found = re.search(r"allow is ([\d,]+) bytes", str(caught.value))
    assert found is not None
    return int(found[1].replace(",", "")), chosen(base, 1 << 40, **asked).nbytes


# The best there is


def test_it_finds_the_best_of_all_mixes(tmp_path: Path) -> None:
    """All 81 mixes of a layer's four groups, planned and measured one by one."""
    base = write_sources(tmp_path, replace(LLAMA, layers=1))
    opened = {name: open_source(str(tmp_path / variant)) for name, variant in VARIANTS.items()}
    groups = [("self_attn", "qkv"), ("self_attn", "o"), ("mlp", ("gate", "up")), ("mlp", ("down",))]
    names = [[f"model.layers.0.{parent}.{part}_proj" for part in parts] for parent, parts in groups]
    errors = {}
    for name in itertools.chain(*names):
        weight = opened["bf16"].dequantize(name).astype(np.float64)
        for source in VARIANTS:
            delta = opened[source].dequantize(name) - weight
            errors[name, source] = float((delta**2).sum() / (weight**2).sum())
    mixes = []
    for picks in itertools.product(VARIANTS, repeat=len(groups)):
        lines = [f"  {name}: {source}" for part, source in zip(names, picks, strict=True) for name in part]
        (tmp_path / "mix.yaml").write_text(base.read_text() + "weights:\n" + "\n".join(lines) + "\n")
        loss = sum(errors[name, source] for part, source in zip(names, picks, strict=True) for name in part)
        mixes.append((file_bytes(plan_recipe(tmp_path / "mix.yaml")), loss))
    low, high = min(nbytes for nbytes, _ in mixes), max(nbytes for nbytes, _ in mixes)
    for budget in np.linspace(low, high, 12).astype(int):
        found = chosen(base, int(budget))
        best = min(loss for nbytes, loss in mixes if nbytes <= budget)
        assert found.nbytes <= budget
        # Headers are no part of what is solved: near a budget they may cost a choice, and not more.
        near = min(loss for nbytes, loss in mixes if nbytes <= budget - 4096) if budget > low + 4096 else best
        assert best * (1 - 1e-6) <= found.solution.loss <= near * (1 + 1e-6)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1))
@pytest.mark.parametrize("model", ["moe", "deepseek"])
def test_whatever_it_writes_can_be_planned(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, share: float
) -> None:
    base: Path = request.getfixturevalue(model)
    low, high = ends(base)
    budget = int(low + share * (high - low))
    suggestion = chosen(base, budget)
    plan = written(suggestion, tmp_path)  # which refuses what SGLang could not serve
    assert file_bytes(plan) == suggestion.nbytes <= budget
    assert {n: m.source for n, m in plan.modules.items()} == {n: m.source for n, m in suggestion.plan.modules.items()}
    assert sources_of(plan, r"norm$|\.gate$|embed|lm_head|kv_b_proj") == {"bf16"}
    assert suggestion.solution.gap < 1e-9
    assert not any("never wins" in note or "matches nothing" in note for note in plan.notes)


def test_what_has_no_choice_stays_as_the_base_has_it(tmp_path: Path) -> None:
    base = write_sources(tmp_path, LLAMA, {"bf16": "bf16", "half": "fp16", "fp8": "fp8_block"})
    base.write_text(base.read_text() + 'weights: {lm_head: half, "*norm": half, "model.layers.*.mlp.*": fp8}\n')
    plan = written(chosen(base, ends(base)[1]), tmp_path)
    assert sources_of(plan, "lm_head|norm$") == {"half"}
    assert sources_of(plan, "mlp") == {"bf16"}


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocate, "measure", lambda *_, **__: pytest.fail("measured"))


def write_partial(folder: Path, skip: list[str], weights: str = "{}") -> Path:
    """Sources called ``fp8`` and ``int4`` that both leave some linears unquantized."""
    for variant in ("fp8_block", "gptq_int4"):
        write_tiny(folder / variant, LLAMA, variant, skip=skip)
    base = folder / "base.yaml"
    base.write_text(f"model: fp8_block\nsources: {{fp8: fp8_block, int4: gptq_int4}}\nweights: {weights}\n")
    return base


@pytest.mark.parametrize("weights", ["{}", '{"model.layers.1.*": int4}', '{"*.down_proj": int4, "*.1.*": fp8}'])
def test_what_no_source_holds_as_its_name_says_stays(tmp_path: Path, weights: str) -> None:
    base = write_partial(tmp_path, ["*.1.mlp.down_proj"], weights)
    kept = "model.layers.1.mlp.down_proj"
    source = plan_recipe(base).modules[kept].source
    for budget in (ends(base)[0], 1 << 40):
        suggestion = chosen(base, budget)
        plan = written(suggestion, tmp_path)
        assert plan.modules[kept].source == source and not plan.modules[kept].format.quantized
        assert file_bytes(plan) == suggestion.nbytes
        assert f"{kept}: as in base.yaml, for no source can be chosen: `fp8` holds it as bf16; `int4` holds" in str(
            suggestion.notes
        )
    with pytest.raises(RecipeError, match="among them linears that have no choice"):
        chosen(base, 1 << 40, pins=[(kept, "fp8")])


@pytest.mark.usefixtures("unmeasured")
def test_what_stays_and_cannot_be_served_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    base = write_partial(tmp_path, ["*.1.self_attn.k_proj"])
    with pytest.raises(RefusedError) as planned:
        plan_recipe(base)
    with pytest.raises(RefusedError) as suggested:
        chosen(base, 1 << 40)
    assert suggested.value.problems == planned.value.problems


@pytest.mark.parametrize(
    ("weights", "lines"),
    [
        ("lm_*: fp8", ["lm_*: fp8"]),
        ('"*.norm": fp8', ['"*.norm": fp8']),
        ("model.embed*: fp8", ["model.embed*: fp8"]),
        ('"*.norm": fp8, model.norm: bf16', ["model.norm: bf16"]),
        ('"*": fp8', ['"{lm_head}": fp8', "model.{embed_tokens}: fp8"]),
        ('"*": fp8, lm_head: bf16', ["lm_head: bf16", "model.{embed_tokens}: fp8"]),
        ('"*": fp8, "l*": bf16', ["model.{embed_tokens}: fp8", "l*: bf16"]),
        ('"*": bf16', []),
        ('"*norm": int4, "*": fp8, "model*": bf16', ['"*norm": int4', '"{lm_head}": fp8']),
        (
            '"{lm_head,model.embed_tokens}": fp8, "{lm_head,model.layers.0.self_attn.o_proj}": bf16',
            ['"{lm_head,model.embed_tokens}": fp8', "lm_head: bf16"],
        ),
    ],
)
def test_the_bases_lines_for_what_has_no_choice(moe: Path, weights: str, lines: list[str]) -> None:
    base = moe.with_name("lines.yaml")
    base.write_text(moe.read_text() + f"weights: {{{weights}}}\n")
    suggestion = chosen(base, 1 << 40)
    plan, planned = written(suggestion, moe.parent), plan_recipe(base)
    fixed = [name for name in plan.modules if re.search(r"norm$|\.gate$|embed|lm_head", name)]
    assert {n: plan.modules[n].source for n in fixed} == {n: planned.modules[n].source for n in fixed}
    text = (moe.parent / "suggested.yaml").read_text()
    block = re.search(r"# as in lines\.yaml\n((?:  [^#\n].*\n)*)", text)
    kept = [line.split("  #")[0].strip() for line in block[1].splitlines()] if block else []
    assert sorted(kept) == sorted(lines)


# Files cut for ranks


def test_what_cannot_be_cut_for_the_bases_ranks_is_not_offered(tmp_path: Path) -> None:
    """Of 4 ranks each has a head of 64 columns: half a block of FP8, half a group of Int4."""
    base = write_sources(tmp_path, LLAMA, more="output: {shard_size: 2MB, tp: [2, 4], layout: presplit}\n")
    suggestion = chosen(base, ends(base)[0])
    plan = written(suggestion, tmp_path)
    assert (plan.recipe.tp, plan.recipe.layout, plan.recipe.shard_size) == ((2, 4), "presplit", 2_000_000)
    assert set(plan.presplit) == {"tp2-ep1", "tp4-ep1"}
    assert sources_of(plan, "o_proj") == {"bf16"} and sources_of(plan, "mlp") == {"int4"}
    assert "# 2 of them: no other source can be chosen: from `fp8`: tp 4: " in recipe_text(suggestion, tmp_path)
    (reason,) = {group.reason for group in suggestion.groups if group.column == "self_attn.o_proj"}
    assert "from `fp8`: tp 4: self_attn.o_proj (fp8_block): a rank's heads have 64 of its 256 columns" in reason
    base.write_text(base.read_text().replace("tp: [2, 4], layout: presplit", "tp: 2"))
    plan = written(chosen(base, ends(base)[0]), tmp_path)
    assert (plan.recipe.tp, plan.recipe.layout) == ((2,), "both")
    assert sources_of(plan, "proj") == {"int4"}


@pytest.mark.usefixtures("unmeasured")
@pytest.mark.parametrize("tp", [3, 4])
def test_what_stays_and_cannot_be_cut_is_refused_before_anything_is_measured(tmp_path: Path, tp: int) -> None:
    base = write_sources(tmp_path, LLAMA, {"fp8": "fp8_block", "int4": "gptq_int4"}, f"output: {{tp: {tp}}}\n")
    with pytest.raises(RecipeError) as caught:
        chosen(base, 1 << 40)
    assert re.match(rf".*base\.yaml:5: tp {tp}: .* cannot be (shared|filled up)", str(caught.value))
    assert caught.value.line == 5


def test_experts_of_one_format_have_the_same_dtypes_where_they_are_cut(tmp_path: Path) -> None:
    variants = {"half": "fp16", "bf16": "bf16", "fp8": "fp8_block"}
    base = write_sources(tmp_path, QWEN3_MOE, variants, "default: bf16\noutput: {tp: 2}\n")
    pins = [("model.layers.0.mlp.experts.3.*", "half")]
    plan = written(chosen(base, 1 << 40, pins=pins), tmp_path)  # which refuses what cannot be cut
    assert sources_of(plan, r"layers\.0\..*experts") <= {"half", "fp8"}
    assert sources_of(plan, r"layers\.1\..*experts") == {"bf16"}
    pins.append(("model.layers.0.mlp.experts.1.*", "bf16"))
    with pytest.raises(RecipeError, match=r"has other dtypes than `.*pin all of model.layers.0.mlp.experts"):
        chosen(base, 1 << 40, pins=pins)
    base.write_text(base.read_text().replace("output: {tp: 2}", ""))
    plan = written(chosen(base, 1 << 40, pins=pins), tmp_path)
    assert sources_of(plan, r"layers\.0\..*experts") == {"half", "bf16"}


# What weighs


def test_busy_experts_get_the_bytes(moe: Path) -> None:
    low, high = ends(moe)
    counts = {layer: np.array([1, 900, 5, 2]) for layer in (0, 1)}
    suggestion = chosen(moe, (2 * low + high) // 3, activity=Activity(counts, {}), floors=[("*.self_attn.*", "fp8")])
    bits = {"gptq_int4": 4, "fp8_block": 8, "bf16": 16}
    by_expert = {
        (group.layer, int(group.name.rpartition(".")[2])): bits[option.kind]
        for group, option in suggestion.picked()
        if group.column == "experts"
    }
    for layer in (0, 1):
        others = [by_expert[layer, expert] for expert in (0, 2, 3)]
        assert by_expert[layer, 1] > max(others)


def test_frequencies_are_shares_of_tokens(moe: Path) -> None:
    k = json.loads((moe.parent / "bf16" / "config.json").read_text())["num_experts_per_tok"]
    activity = Activity({0: np.array([10, 20, 30, 40]), 1: np.array([1, 0, 0, 0])}, {})
    groups = {group.name: group for group in chosen(moe, 1 << 40, activity=activity).groups}
    for expert, count in enumerate([10, 20, 30, 40]):
        expected = (count + 0.5) / (100 / k + 1)
        assert groups[f"model.layers.0.mlp.experts.{expert}"].frequency == pytest.approx(expected)
    # One that was not seen does not weigh nothing.
    assert groups["model.layers.1.mlp.experts.3"].frequency > 0
    assert groups["model.layers.0.self_attn.o_proj"].frequency == 1
    alike = {group.name: group for group in chosen(moe, 1 << 40).groups}
    assert alike["model.layers.0.mlp.experts.2"].frequency == k / 4


def test_objectives_add_up_what_they_say(moe: Path, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    reference = open_source(str(moe.parent / "bf16"))
    rounded = open_source(str(moe.parent / "gptq_int4"))
    names = [n for n in reference.checkpoint.modules if n.endswith("_proj")]
    random = np.random.default_rng(0)
    m = {n: random.uniform(0.1, 2, reference.dequantize(n).shape[1]).astype(np.float32) for n in names}
    save_file(m, tmp_path / "m.safetensors")
    f = dict.fromkeys(names, 1.0)
    f |= {n: 0.5 for n in names if ".experts." in n}  # two of four, without statistics

    def added(name: str, weighted: bool, relative: bool) -> float:
        def power(array: np.ndarray, n: str) -> float:
            columns = (array.astype(np.float64) ** 2).sum(0)
            return float(columns @ m[n] if weighted else columns.sum())

        w = reference.dequantize(name)
        lost = f[name] * power(rounded.dequantize(name) - w, name)
        if not relative:
            return lost
        # All experts of the layer make the signal.
        peers = [n for n in names if re.sub(r"experts\.\d+", "", n) == re.sub(r"experts\.\d+", "", name)]
        return lost / sum(f[n] * power(reference.dequantize(n), n) for n in peers)

    from mixprec_build.suggesting.distortion import Moments

    for objective, weighted, relative in (
        (Objective.WEIGHT, False, False),
        (Objective.RELATIVE, False, True),
        (Objective.OUTPUT, True, False),
        (Objective.RELATIVE_OUTPUT, True, True),
    ):
        moments = Moments(tmp_path / "m.safetensors")
        for group in chosen(moe, 1 << 40, objective=objective, moments=moments).groups:
            (option,) = (o for o in group.options if o.source == "int4")
            expected = sum(added(member, weighted, relative) for member in group.members)
            assert option.loss == pytest.approx(expected, rel=1e-4), (objective, group.name)
            assert group.options[0].loss == 0  # the reference


def test_against_the_best_there_is_where_none_is_unquantized(tmp_path: Path) -> None:
    base = write_sources(tmp_path, LLAMA, {"fp8": "fp8_block", "int4": "gptq_int4"})
    suggestion = chosen(base, 1 << 40)
    assert any(
        "no source holds 14 modules in 16 bits: their errors are measured against `fp8`" in n for n in suggestion.notes
    )
    assert {option.source for _, option in suggestion.picked()} == {"fp8"}
    assert suggestion.solution.loss == 0


# Wishes


def test_pins_and_floors(moe: Path, tmp_path: Path) -> None:
    low, _ = ends(moe)
    suggestion = chosen(
        moe,
        2 * low,
        pins=[("model.layers.0.*", "int4"), ("model.layers.0.self_attn.o_proj", "fp8"), ("*.experts.3.*", "bf16")],
        floors=[("model.layers.1.self_attn.*", "fp8"), ("model.layers.1.mlp.experts.2.*", "int8")],
    )
    plan = written(suggestion, tmp_path)
    assert sources_of(plan, r"layers\.0\.mlp\.experts\.[0-2]\.") == {"int4"}
    assert sources_of(plan, r"experts\.3\.") == {"bf16"}
    assert sources_of(plan, r"layers\.0\.self_attn\.o_proj") == {"fp8"}
    assert "int4" not in sources_of(plan, r"layers\.1\.(self_attn|mlp\.experts\.2)")
    assert sources_of(plan, "norm|gate$") == {"bf16"}
    text = (tmp_path / "suggested.yaml").read_text()
    assert '--pin "model.layers.0.*: int4"' in text


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"pins": [("model.layers.7.*", "fp8")]}, RecipeError, "layers.7.*: fp8\" matches no module that has a choice"),
        ({"pins": [("*norm", "fp8")]}, RecipeError, "(norms, routers, embeddings) stay as the base has them"),
        ({"pins": [("*", "awq")]}, RecipeError, "no source is called `awq`; there are `bf16`, `fp8`, `int4`"),
        ({"pins": [("*", "int8")]}, RecipeError, "no source holds `int8`"),
        ({"pins": [("model.{", "fp8")]}, RecipeError, "--pin: 'model.{': '{' without a closing '}'"),
        (
            {"pins": [("*.q_proj", "int4"), ("*.self_attn.*", "fp8"), ("x.*", "fp8")]},
            RecipeError,
            '--pin "x.*: fp8" matches no module that has a choice; see',
        ),
        (
            {"pins": [("model.layers.0.self_attn.k_proj", "fp8"), ("model.layers.0.self_attn.q_proj", "int4")]},
            RecipeError,
            '--pin "model.layers.0.self_attn.k_proj: fp8" and --pin "model.layers.0.self_attn.q_proj: int4": '
            "model.layers.0.self_attn.{k_proj,q_proj,v_proj} are decided together",
        ),
        (
            {"pins": [("*", "int4")], "floors": [("*.self_attn.*", "fp8")]},
            RecipeError,
            '--pin "*: int4" and --min-format "*.self_attn.*: fp8": model.layers.0.self_attn.qkv_proj is gptq_int4 in '
            "`int4`, which has fewer bits",
        ),
        ({"floors": [("*", "big")]}, RecipeError, "`big` is no format; write int4, int8, fp8, fp16"),
        ({"floors": [("*", "fp32")]}, RecipeError, "in as many bits; it can be"),
        ({"objective": Objective.OUTPUT}, SourceError, "output weighs errors by the inputs' second moments"),
        ({"activity": Activity({0: np.array([1] * 9)}, {})}, StatsError, "expert 8 of layer 0, and the model has 4"),
        ({"activity": Activity({5: np.array([1])}, {})}, StatsError, "experts of layer 5, where the model has none"),
    ],
)  # fmt: skip
def test_what_cannot_be(moe: Path, asked: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        chosen(moe, 1 << 40, **asked)


def test_a_pin_that_later_ones_decide_against_is_noted(moe: Path) -> None:
    pins = [("*.q_proj", "int4"), ("*.self_attn.*", "fp8"), ("model.layers.1.self_attn.k_proj", "bf16")]
    suggestion = chosen(moe, 1 << 40, pins=pins)
    assert '--pin "*.q_proj: int4" never wins: later or exact ones decide all it matches' in suggestion.notes
    assert not any('"*.self_attn.*: fp8" never' in note for note in suggestion.notes)
    picked = {g.name: o.source for g, o in suggestion.picked()}
    assert [picked[f"model.layers.{i}.self_attn.qkv_proj"] for i in (0, 1)] == ["fp8", "bf16"]


def test_a_pin_to_what_cannot_be_served(deepseek: Path) -> None:
    with pytest.raises(RecipeError, match=r"`int4` cannot be chosen for .*kv_b_proj; it can be bf16 from `bf16`"):
        chosen(deepseek, 1 << 40, pins=[("*kv_b_proj", "int4")])


def test_another_models_weights_are_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_sources(tmp_path, LLAMA, {"bf16": "bf16"})
    write_tiny(tmp_path / "other", replace(LLAMA, seed=1), "fp8_block")
    base.write_text(base.read_text() + "  fp8: other\n")
    monkeypatch.setattr(allocate, "measure", lambda *_, **__: pytest.fail("measured"))
    with pytest.raises(RefusedError, match="hold different values, so they do not hold the same weights"):
        chosen(base, 1 << 40)


def test_budgets_beyond_both_ends(moe: Path) -> None:
    low, high = ends(moe)
    assert chosen(moe, low).nbytes == low
    with pytest.raises(BudgetError, match=f"give --budget {low} or more, or a source with fewer bits"):
        chosen(moe, low - 1)
    above = chosen(moe, 10 * high)
    assert above.nbytes == high and above.solution.loss == 0
    assert any("is more than is of use" in note for note in above.notes)


# The command line


def test_the_command(moe: Path, tmp_path: Path) -> None:
    low, high = ends(moe)
    (tmp_path / "deep").mkdir()
    out = tmp_path / "deep" / "mix.yaml"
    stats = tmp_path / "stats.json"
    entries = {f"layer_{la}_expert_{e}": (la, e) for la in range(2) for e in range(4)}
    stats.write_text(
        json.dumps(
            {
                "expert_stats": {
                    key: {"layer_id": la, "expert_id": e, "activation_count": e, "total_tokens_processed": e}
                    for key, (la, e) in entries.items()
                }
            }
        )
    )
    budget = (low + high) // 2
    arguments = ["suggest", str(moe), "--budget", str(budget), "-o", str(out), "--stats", str(stats)]
    arguments += ["--errors", str(tmp_path / "kept.jsonl"), "--min-format", "*.self_attn.*: fp8", "--json"]
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    plan = plan_recipe(out)
    assert file_bytes(plan) == facts["bytes"] <= budget
    assert "int4" not in sources_of(plan, "self_attn")
    assert [entry["source"] for entry in facts["uniform"]] == ["bf16", "fp8", "int4"]
    frontier = [(point["bytes"], point["loss"]) for point in facts["frontier"]]
    assert frontier == sorted(frontier, key=lambda point: (point[0], -point[1]))
    assert facts["bound"] <= facts["loss"]
    again = invoke(*arguments)
    assert again.exit_code != 0 and "exists; pass --force" in str(again.exception)
    shown = invoke(*arguments[:-1], "--force")
    assert "all int4" in shown.output and "this mix" in shown.output


def test_the_table_has_no_row_twice(moe: Path, tmp_path: Path) -> None:
    arguments = [
        "suggest",
        str(moe),
        "--budget",
        "1TB",
        "-o",
        str(tmp_path / "x.yaml"),
        "--errors",
        str(tmp_path / "k"),
    ]
    shown = invoke(*arguments, COLUMNS="200")
    rows = [line.split("│")[1:-1] for line in shown.output.partition("against bytes")[2].splitlines() if "│" in line]
    cells = [tuple(cell.strip() for cell in row[:2]) for row in rows]
    assert len(cells) > 5 and len({*cells}) == len(cells)
    assert rows[-1][2].strip() == "all bf16, this mix"


@pytest.mark.usefixtures("unmeasured")
def test_what_cannot_be_is_refused_before_anything_is_measured(moe: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="the budget 15 "):
        chosen(moe, 15)
    with pytest.raises(StatsError, match="another model's"):
        chosen(moe, 1 << 40, activity=Activity({5: np.array([1])}, {}))
    before = moe.read_text()
    for arguments, message in (
        (["-o", str(moe), "--force"], "is the recipe with the sources to choose from"),
        (["-o", str(tmp_path / "x.yaml"), "--errors", str(moe)], "holds no measured errors; name another file"),
    ):
        done = invoke("suggest", str(moe), "--budget", "1TB", *arguments)
        assert message in str(done.exception) and moe.read_text() == before


@pytest.mark.usefixtures("unmeasured")
def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plotted(to: Path) -> str:
        arguments = ["suggest", str(moe), "--budget", "1TB", "-o", str(tmp_path / "x.yaml"), "--plot", str(to)]
        done = invoke(*arguments)
        assert isinstance(done.exception, OutputError) and not (tmp_path / "x.yaml").exists()
        return str(done.exception)

    assert "pictures are written as .png" in plotted(tmp_path / "f.pdf")
    assert "there is no folder" in plotted(tmp_path / "none" / "f.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in plotted(tmp_path / "f.png")


def test_into_a_folder_that_is_a_link(moe: Path, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    (tmp_path / "models").symlink_to(moe.parent)
    for base in (moe, tmp_path / "models" / moe.name):
        (tmp_path / "link" / "x.yaml").write_text(recipe_text(chosen(base, 1 << 40), tmp_path / "link"))
        plan = plan_recipe(tmp_path / "link" / "x.yaml")
        assert plan.recipe.model.location.startswith("../../")


@pytest.mark.parametrize("flag", [["--budget", "much"], ["--pin", "model.layers.0"]])
def test_wrong_usage(moe: Path, tmp_path: Path, flag: list[str]) -> None:
    done = invoke("suggest", str(moe), "--budget", "1GB", "-o", str(tmp_path / "x.yaml"), *flag)
    assert done.exit_code == 2


# At size


@pytest.mark.slow
def test_qwen3_235b(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """36,096 choices of experts, with errors that are known: chosen, planned and within 1 % in under two minutes."""
    for variant in VARIANTS.values():
        write_hollow(tmp_path / variant, "Qwen3-235B-A22B", variant)
    sources = "\n".join(f"  {name}: {variant}" for name, variant in VARIANTS.items())
    (tmp_path / "base.yaml").write_text(f"model: bf16\nsources:\n{sources}\n")

    def known(modules: Mapping[str, Any], *_: Any, **__: Any) -> dict[tuple[str, str], Distortion]:
        random = np.random.default_rng(0)
        out = {}
        for name, (_, others) in modules.items():
            power = random.lognormal()
            for other in others:
                share = {"int4": 1e-2, "fp8": 7e-4}[other.name] * random.uniform(0.5, 2)
                out[name, other.name] = Distortion(power * share, power)
        return out

    monkeypatch.setattr(allocate, "measure", known)
    started = time.monotonic()
    suggestion = chosen(tmp_path / "base.yaml", 140_000_000_000)
    took = time.monotonic() - started
    print(f"\nchosen and planned in {took:.1f} s, at most {suggestion.solution.gap:.1e} above the best")
    assert took < 120
    assert sum(group.column == "experts" for group in suggestion.groups) * 3 == 36_096
    assert 0.99 * 140e9 < suggestion.nbytes <= 140e9
    assert suggestion.solution.gap < 1e-4
    assert file_bytes(written(suggestion, tmp_path)) == suggestion.nbytes


def test_experts_of_a_source_in_two_formats_are_offered_under_tp(tmp_path: Path) -> None:
    """Each is looked at alone, without the others of its layer."""
    write_tiny(tmp_path / "bf16", QWEN3_MOE, "bf16")
    write_tiny(tmp_path / "mix", QWEN3_MOE, "gptq_int4", skip=["*.experts.0.*"])
    base = tmp_path / "base.yaml"
    least = []
    for more in ("", "output: {tp: 2}\n"):
        base.write_text(f"model: bf16\nsources: {{bf16: bf16, mix: mix}}\n{more}")
        least.append(ends(base)[0])
        plan = written(chosen(base, least[-1]), tmp_path)
        assert {plan.modules[n].source for n in plan.modules if ".experts.3." in n} == {"mix"}
    assert least[0] == least[1]


def test_shared_experts_are_as_small_as_their_smallest_part(tmp_path: Path) -> None:
    write_tiny(tmp_path / "bf16", DEEPSEEK, "bf16")
    skip = ["*.shared_experts.gate_proj", "*.shared_experts.up_proj", "*.self_attn.*"]
    write_tiny(tmp_path / "mix", DEEPSEEK, "gptq_int4", skip=skip)
    base = tmp_path / "base.yaml"
    base.write_text("model: bf16\nsources: {bf16: bf16, mix: mix}\n")
    for floors, sources in (([], {"mix"}), ([("*.shared_experts.*", "fp8")], {"bf16"})):
        plan = written(chosen(base, ends(base, floors=floors)[0], floors=floors), tmp_path)
        assert {plan.modules[n].source for n in plan.modules if ".shared_experts.down_proj" in n} == sources
