"""`--objective measured`: measured swaps decide between kinds of modules, and `recipes/swaps.py` measures them."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.serving import LLAMA, QWEN3_MOE, Shape, write_sources
from transformers import AutoModelForCausalLM

from mixprec_build.errors import SourceError, StatsError
from mixprec_build.recipe.recipe import load_recipe
from mixprec_build.recipe.sources import open_sources
from mixprec_build.suggesting.allocate import Suggestion, suggest
from mixprec_build.suggesting.choices import Choices, Request
from mixprec_build.suggesting.distortion import DistortionCache
from mixprec_build.suggesting.objective import Objective
from mixprec_build.suggesting.recipe_file import recipe_text
from mixprec_build.suggesting.swaps import read_swaps

RECIPE = Path(__file__).parents[2] / "recipes" / "swaps.py"
SMALL = {"hidden": 128, "layers": 3, "heads": 2, "kv_heads": 1, "head_dim": 64, "vocab": 128}
MOE = QWEN3_MOE.of(**SMALL, experts=4, top_k=2, expert_intermediate=128)
DENSE = LLAMA.of(**SMALL, intermediate=256)


def base_of(folder: Path, shape: Shape) -> Path:
    sources = write_sources(folder, shape, ["bf16", "fp8_block", "gptq_int4"])
    names = {"bf16": "bf16", "fp8": "fp8_block", "int4": "gptq_int4"}
    lines = [f"model: {sources['bf16']}", "sources:", *(f"  {name}: {sources[v]}" for name, v in names.items())]
    (folder / "base.yaml").write_text("\n".join(lines) + "\n")
    return folder / "base.yaml"


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_of(tmp_path_factory.mktemp("moe"), MOE)


def swap(pattern: str, source: str, loss: float) -> dict[str, Any]:
    return {"modules": [pattern], "source": source, "loss": loss}


EVERYWHERE = [
    swap("model.layers.0.self_attn.{q_proj,k_proj,v_proj}", "int4", 0.5),
    swap("model.layers.2.self_attn.{q_proj,k_proj,v_proj}", "int4", 0.02),
    swap("model.layers.1.self_attn.o_proj", "int4", 0.001),
    swap("model.layers.0.mlp.experts.*", "int4", 0.3),
]


def chosen(base: Path, swaps: object, budget: int = 1 << 40, **asked: Any) -> Suggestion:
    path = base.with_name("swaps.json")
    path.write_text(swaps if isinstance(swaps, str) else json.dumps(swaps))
    recipe = load_recipe(base)
    with DistortionCache(base.with_name("kept.jsonl")) as cache:
        return suggest(recipe, open_sources(recipe), Request(budget, swaps=read_swaps(path), **asked), cache)


def losses(suggestion: Suggestion, source: str) -> Mapping[str, float]:
    return {group.name: o.loss for group in suggestion.groups for o in group.options if o.source == source}


def test_a_swaps_loss_is_shared_out_and_scales_what_was_not_swapped(moe: Path) -> None:
    found = chosen(moe, {"swaps": EVERYWHERE, "together": [{"swaps": [0, 3], "loss": 1.2}]})
    plain = chosen(moe, {"swaps": EVERYWHERE}, objective=Objective.RELATIVE)
    assert found.objective is Objective.MEASURED
    mine, errors = losses(found, "int4"), losses(plain, "int4")
    experts = [f"model.layers.0.mlp.experts.{e}" for e in range(4)]
    assert sum(mine[name] for name in experts) == pytest.approx(0.3)
    for name in experts:
        assert mine[name] / 0.3 == pytest.approx(errors[name] / sum(errors[e] for e in experts))
    qkv = "model.layers.{}.self_attn.qkv_proj"
    assert [mine[qkv.format(at)] for at in (0, 2)] == pytest.approx([0.5, 0.02])
    # Halfway between two layers, in logarithms.
    ratio = (0.5 / errors[qkv.format(0)] * 0.02 / errors[qkv.format(2)]) ** 0.5
    assert mine[qkv.format(1)] == pytest.approx(ratio * errors[qkv.format(1)])
    # A column measured in one layer, and from another source.
    o = "model.layers.{}.self_attn.o_proj"
    eight = losses(found, "fp8")[o.format(2)] / losses(plain, "fp8")[o.format(2)]
    assert eight == pytest.approx(0.001 / errors[o.format(1)])
    assert set(losses(found, "bf16").values()) == {0.0}
    text = "\n".join(found.notes)
    assert "measured at once, lose 1.50 to 1.50 times the sum" in text
    assert "self_attn.o_proj was not swapped from `fp8`" in text


def test_losses_add_up_as_their_powers(moe: Path) -> None:
    """Of what goes with the square root of errors, as the sum of their squares."""
    parts = [entry["loss"] for entry in EVERYWHERE]
    for power, due in ((1.0, 1.0), (1.5, 1.5), (2.0, 2.0), (0.5, 1.0), (4.0, 2.0)):
        sets = [
            {"swaps": one, "loss": sum(parts[i] ** power for i in one) ** (1 / power)} for one in ([0, 3], [1, 2, 3])
        ]
        found = chosen(moe, {"swaps": EVERYWHERE, "together": sets})
        assert found.exponent == pytest.approx(due, abs=0.01)
        experts = [loss for name, loss in losses(found, "int4").items() if ".0.mlp.experts." in name]
        assert sum(experts) == pytest.approx(0.3**due, rel=0.01)
    assert chosen(moe, {"swaps": EVERYWHERE}).exponent == 1
    assert "p = 2.00" in "\n".join(found.notes)
    assert "by measured swaps, to the power of 2.00, added up" in recipe_text(found, moe.parent)


def test_a_swap_of_small_errors_counts_by_them(moe: Path) -> None:
    """Its loss may be a floor, as where any error changes which experts some tokens go to."""
    errors = {
        source: losses(chosen(moe, {"swaps": EVERYWHERE}, objective=Objective.RELATIVE), source)
        for source in ("fp8", "int4")
    }
    experts = [f"model.layers.0.mlp.experts.{e}" for e in range(4)]
    share = sum(errors["fp8"][name] for name in experts) / sum(errors["int4"][name] for name in experts)
    assert share < 0.1
    found = chosen(moe, {"swaps": [*EVERYWHERE, swap("model.layers.0.mlp.experts.*", "fp8", 0.2)]})
    assert sum(losses(found, "fp8")[name] for name in experts) == pytest.approx(0.3 * share)
    assert any(note.startswith("1 of the swaps count by their errors") for note in found.notes)
    alone = chosen(moe, {"swaps": [*EVERYWHERE[:3], swap("model.layers.0.mlp.experts.*", "fp8", 0.2)]})
    assert sum(losses(alone, "fp8")[name] for name in experts) == pytest.approx(0.2)


def test_the_swap_of_fewest_groups_decides(moe: Path) -> None:
    found = chosen(moe, {"swaps": [*EVERYWHERE, swap("model.layers.0.mlp.experts.2.*", "int4", 0.25)]})
    assert losses(found, "int4")["model.layers.0.mlp.experts.2"] == 0.25


def test_measured_losses_decide_where_bytes_go(moe: Path) -> None:
    """Attention has few bytes: whether it or experts get the better source depends on what swaps say."""
    low = chosen(moe, {"swaps": EVERYWHERE}, pins=[("*", "int4")]).nbytes
    better = []
    for loss in (1.0, 1e-9):
        swaps = [
            swap("model.layers.0.self_attn.{q_proj,k_proj,v_proj}", "int4", loss),
            swap("model.layers.0.self_attn.o_proj", "int4", loss),
            swap("model.layers.0.mlp.experts.*", "int4", 1e-3),
        ]
        found = chosen(moe, {"swaps": swaps}, budget=int(low * 1.25))
        attention = [option.source for group, option in found.picked() if "self_attn" in group.column]
        better.append(len(attention) - attention.count("int4"))
    assert better[0] >= 5  # of six
    assert better[1] <= 2  # what fits into bytes that no expert can use


@pytest.mark.parametrize(
    ("swaps", "message"),
    [
        ("{", "no measured swaps: JSON that cannot be read"),
        ([], "`swaps` is missing, a list of objects"),
        ({"swaps": []}, "`swaps` is empty"),
        ({"swaps": [3]}, "entry 0 of `swaps` is 3, an object"),
        ({"swaps": [{"modules": "x", "source": "int4", "loss": 1}]}, "`modules` is 'x', a list of patterns"),
        ({"swaps": [{"modules": ["{"], "source": "int4", "loss": 1}]}, "entry 0 of `swaps`: '{'"),
        ({"swaps": [{"modules": ["x"], "loss": 1}]}, "`source` is None, the name of a source"),
        ({"swaps": [swap("x", "int4", -1)]}, "`loss` is -1, a number of nats from 0 to 1,000,000"),
        ({"swaps": [swap("x", "int4", 10**400)]}, "`loss` is 1000"),
        ({"swaps": [swap("x", "int4", 1e300)]}, "`loss` is 1e+300, a number of nats"),
        ('{"swaps": [{"modules": ["x"], "source": "int4", "loss": NaN}]}', "`loss` is nan"),
        ({"swaps": EVERYWHERE, "together": [{"swaps": [9], "loss": 1}]}, "a list of indices below 4"),
        ({"swaps": [swap("model.*", "int3", 1)]}, "swaps are from `int3`, and the recipe has no source of that name"),
        ({"swaps": [swap("model.layers.9.*", "int4", 1)]}, "matches no module that has this choice"),
        ({"swaps": [swap("*.q_proj", "int4", 1)]}, "matches a part of model.layers.0.self_attn.qkv_proj"),
        ({"swaps": [EVERYWHERE[2], EVERYWHERE[2]]}, "model.layers.1.self_attn.o_proj from `int4` was measured twice"),
        ({"swaps": EVERYWHERE[:3]}, "no swap measures experts, so its errors cannot be compared"),
    ],
)
def test_files_that_cannot_be_used_are_refused(moe: Path, swaps: object, message: str) -> None:
    with pytest.raises(StatsError, match=re.escape(message)) as caught:
        chosen(moe, swaps)
    assert str(moe.with_name("swaps.json")) in str(caught.value)


def test_the_objective_needs_swaps(moe: Path) -> None:
    recipe = load_recipe(moe)
    with pytest.raises(SourceError, match="give --swaps FILE"), DistortionCache(None) as cache:
        suggest(recipe, open_sources(recipe), Request(1 << 40, Objective.MEASURED), cache)


@pytest.mark.parametrize("shape", [DENSE, MOE], ids=["dense", "experts"])
def test_a_swaps_loss_is_that_of_a_model_with_these_weights(tmp_path: Path, shape: Shape) -> None:
    """Each loss beside that of a model of transformers loaded with the swapped weights from its start."""
    base = base_of(tmp_path, shape)
    recipe = load_recipe(base)
    sources = open_sources(recipe)
    script = runpy.run_path(str(RECIPE))
    folder = tmp_path / "bf16"
    ids = torch.randint(3, 128, (40,), generator=torch.Generator().manual_seed(0))

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def weights(names: list[str], source: str) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(sources.by_name[source].dequantize(name)) for name in names}

    runs = script["InTransformers"](model(), sources.model.facts.family, ids.split(24))
    runs.keep_reference()
    choices = Choices(recipe, sources, Request(1, allow_unservable=True))
    for groups, source in script["swaps_of"](choices.groups, ["int4"], 2):
        names = [member for group in groups for member in group.members]
        assert groups[0].layer in (0, 2)  # every second layer, and the last
        runs.put(weights(names, source))
        loss = runs.loss(names)
        runs.put(weights(names, "bf16"))
        other = script["InTransformers"](model(), sources.model.facts.family, ids.split(24))
        other.put(weights(names, source))
        expected, tokens = 0.0, 0
        for at, window in enumerate(ids.split(24)):
            exact, mine = runs._exact[at], other.logprobs(window)
            expected += float((exact.double().exp() * (exact.double() - mine.double())).sum())
            tokens += len(window)
        assert loss == pytest.approx(expected / tokens, rel=1e-3, abs=1e-7)
        assert loss > 0, names
    assert runs.loss(["model.layers.0.self_attn.o_proj"]) == 0


def test_the_script_writes_what_suggest_reads_and_continues(
    tmp_path: Path, moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = runpy.run_path(str(RECIPE))
    ids = torch.arange(3, 43)
    tokenizer = type("Tokenizer", (), {"__call__": lambda *_, **__: type("Out", (), {"input_ids": ids[None]})})
    stand_in = type("Auto", (), {"from_pretrained": staticmethod(lambda _: tokenizer())})
    monkeypatch.setitem(script["main"].__globals__, "AutoTokenizer", stand_in)
    (tmp_path / "text.txt").write_text("-")

    def run(together: int) -> dict[str, Any]:
        script["main"](
            moe, tmp_path / "text.txt", tmp_path / "out.json", tokens=40, window=20, every=2, sources="int4",
            together=together, engine=script["Engine"].TRANSFORMERS, tp=1, top=8,
            engine_options="{}", allow_unservable=False,
        )  # fmt: skip
        return json.loads((tmp_path / "out.json").read_text())  # type: ignore[no-any-return]

    first = run(0)
    assert len(first["swaps"]) == 6  # qkv, o and experts of two layers
    assert first["swaps"][0].keys() == {"modules", "source", "loss"}
    monkeypatch.setattr(script["InTransformers"], "put", lambda *_: None)  # a swap measured again would be refused
    assert run(0) == first
    monkeypatch.undo()
    monkeypatch.setitem(script["main"].__globals__, "AutoTokenizer", stand_in)
    second = run(2)
    assert [len(one["swaps"]) for one in second["together"]] == [2, 6]
    found = chosen(moe, second)
    assert found.objective is Objective.MEASURED
    assert any("sets of swaps, measured at once" in note for note in found.notes)


def test_a_coarse_kl_is_at_most_the_exact_one() -> None:
    coarse = runpy.run_path(str(RECIPE))["coarse_kl"]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = (torch.log_softmax(3 * torch.randn(50, generator=generator), 0) for _ in range(2))
        exact = float((a.exp() * (a - b)).sum())
        tops = [{int(i): float(one[i]) for i in one.topk(12).indices} for one in (a, b)]
        assert 0 <= coarse(*tops) <= exact + 1e-6
        every = [{i: float(v) for i, v in enumerate(one)} for one in (a, b)]
        assert coarse(*every) == pytest.approx(exact, rel=1e-3)
