"""Plans: where each module comes from, what is said about the lines, what is left out, and how large it gets."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.write import DEEPSEEK, LLAMA, QWEN3_MOE, Config, Tensors, write_tiny

from mixprec_build.errors import RecipeError, RefusedError, SourceError
from mixprec_build.families.registry import checked_types
from mixprec_build.output.build import plan_recipe, run_plan
from mixprec_build.patterns.pattern import Pattern
from mixprec_build.planning.planner import make_plan
from mixprec_build.planning.types import LeftOut, Plan
from mixprec_build.recipe.recipe import Rule, load_recipe
from mixprec_build.recipe.sources import Sources, open_sources


def write_recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def plan_of(folder: Path, text: str, **options: bool) -> Plan:
    return plan_recipe(write_recipe(folder, text), **options)


def kinds(plan: Plan, *patterns: str) -> set[str]:
    """The formats of the modules that any of ``patterns`` matches."""
    return {m.format.kind for name, m in plan.modules.items() if any(Pattern(p).matches(name) for p in patterns)}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE in every variant. Recipes of tests lie elsewhere and name these by absolute path."""
    folder = tmp_path_factory.mktemp("zoo")
    for variant in ("bf16", "fp16", "fp8_block", "fp8_channel", "fp8_tensor", "gptq_int4"):
        write_tiny(folder / variant, QWEN3_MOE, variant)
    return folder


def zoo_recipe(zoo: Path, weights: str, sources: str = "bf16 fp8=fp8_block int4=gptq_int4", more: str = "") -> str:
    """``sources`` are ``name=variant``; ``weights`` are lines of the recipe."""
    pairs = [word.partition("=") for word in sources.split()]
    lines = [f"model: {zoo / 'bf16'}", "sources:"]
    lines += [f"  {name}: {zoo / (variant or name)}" for name, _, variant in pairs]
    lines.append("weights:")
    for line in weights.strip().splitlines():
        pattern, _, source = line.partition(": ")
        lines.append(f'  "{pattern}": {source}')
    return "\n".join(lines) + f"\n{more}"


MIX = """
model.layers.*.self_attn.*: fp8
model.layers.*.mlp.experts.*: int4
model.layers.0.mlp.experts.{0..1}.*: fp8
"""


# Where modules come from


def test_a_mix(zoo: Path, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, zoo_recipe(zoo, MIX))
    assert kinds(plan, "*.self_attn.?_proj", "*.layers.0.*.experts.{0,1}.*") == {"fp8_block"}
    assert kinds(plan, "*.layers.0.*.experts.{2,3}.*", "*.layers.1.*.experts.*") == {"gptq_int4"}
    assert kinds(plan, "*norm", "*.mlp.gate", "lm_head", "*embed_tokens") == {"bf16"}
    assert [(use.matched, use.won) for use in plan.rules] == [(12, 8), (24, 18), (6, 6)]
    assert plan.notes == plan.unservable == ()
    # Norms lie within the glob for attention, and stay where they are: q_norm and k_norm of two layers.
    assert kinds(plan, "*.q_norm", "*.k_norm") == {"bf16"}


def test_tensors_come_from_the_source_of_their_module(zoo: Path, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, zoo_recipe(zoo, MIX))
    for name, module in plan.modules.items():
        assert {tensor.source for tensor in module.tensors.values()} == {module.source}
        stored = plan.sources.by_name[module.source].checkpoint.modules[name]
        assert {leaf: tensor.info for leaf, tensor in module.tensors.items()} == stored.tensors
    planned = [tensor.info.name for shard in plan.shards for tensor in shard.tensors]
    assert sorted(planned) == sorted(t.info.name for m in plan.modules.values() for t in m.tensors.values())


def test_modules_are_in_natural_order(tmp_path: Path) -> None:
    write_tiny(tmp_path / "bf16", dataclasses.replace(LLAMA, layers=11), "bf16")
    names = list(plan_of(tmp_path, "model: bf16\n").modules)
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers) and layers[-1] == 10


# What is said about lines


@pytest.mark.parametrize(
    ("weights", "notes"),
    [
        ("model.layers.7.*: fp8", ["line 7 `model.layers.7.*: fp8` matches nothing"]),
        (
            "model.layers.*.self_attn.*.bias: fp8",
            ["line 7 `model.layers.*.self_attn.*.bias: fp8` matches nothing (a bias comes with its module)"],
        ),
        (
            "*.experts.0.*: fp8\n*.experts.*: int4",
            ["line 7 `*.experts.0.*: fp8` never wins: later or exact lines decide all it matches"],
        ),
        (
            "*.0.self_attn.o_proj: fp8\nmodel.layers.0.self_attn.o_proj: int4",
            ["line 7 `*.0.self_attn.o_proj: fp8` never wins: later or exact lines decide all it matches"],
        ),
        (
            "model.layers.0.self_attn.o_proj.weight: fp8\nmodel.layers.0.self_attn.o_proj: int4",
            ["line 7 `model.layers.0.self_attn.o_proj: fp8` never wins: later or exact lines decide all it matches"],
        ),
        (
            "*layernorm: fp8",
            [
                "line 7 `*layernorm: fp8` covers only tensors that are never quantized (norms, routers, parameters): "
                "4 are copied from that source as they are"
            ],
        ),
        (
            "*.mlp.gate: int4",
            [
                "line 7 `*.mlp.gate: int4` covers only tensors that are never quantized (norms, routers, parameters): "
                "2 are copied from that source as they are"
            ],
        ),
        (
            "model.*: fp8",
            ["line 7 `model.*: fp8`: 1 of its modules are stored as bf16 there (model.embed_tokens)"],
        ),
        ("*.experts.*: int4\n*.experts.0.*: fp8", []),
        (
            "model.layers.{0..8}.*.experts.{1,0}.*: int4",
            ["line 7 `model.layers.{0..8}.*.experts.{1,0}.*: int4`: no module that it matches has the number 8"],
        ),
        ("model.layers.{7..8}.*: fp8", ["line 7 `model.layers.{7..8}.*: fp8` matches nothing"]),
        (
            "model.layers.{0-1}.*: fp8",
            ["line 7 `model.layers.{0-1}.*: fp8` matches nothing (a range is written {0..1})"],
        ),
        (
            "*.{0..1}.self_atn.*: fp8",
            [
                "line 7 `*.{0..1}.self_atn.*: fp8` matches nothing (no name has a part `self_atn`: did you mean "
                "`self_attn`?)"
            ],
        ),
    ],
)
def test_a_note(zoo: Path, tmp_path: Path, weights: str, notes: list[str]) -> None:
    assert list(plan_of(tmp_path, zoo_recipe(zoo, weights)).notes) == notes


def test_a_family_that_nobody_checked_is_noted(tmp_path: Path) -> None:
    write_tiny(tmp_path / "bf16", LLAMA, "bf16", edit=lambda _, config: config.update(model_type="gemma9"))
    (note,) = plan_of(tmp_path, "model: bf16\n").notes
    assert note.startswith("model_type 'gemma9' is not among the families checked against SGLang (")
    assert all(family in note for family in checked_types())


@pytest.mark.parametrize(("dtype", "flag"), [("bfloat16", True), ("float16", False)])
@pytest.mark.usefixtures("older_sglang")
def test_what_needs_fp16_activations_is_noted(tmp_path: Path, dtype: str, flag: bool) -> None:
    model = dataclasses.replace(LLAMA, intermediate=160)

    def configure(_: object, config: Config) -> None:
        config["torch_dtype"] = dtype

    write_tiny(tmp_path / "bf16", model, "bf16", edit=configure)
    write_tiny(tmp_path / "gptq_int4", model, "gptq_int4", group_size=32, edit=configure)
    text = "model: bf16\nsources: {quant: gptq_int4}\nweights: {'*.mlp.*': quant}\n"
    (note,) = plan_of(tmp_path, text).notes
    assert note.startswith(
        "model.layers.{0..1}.mlp.down_proj (gptq_int4): its 160 inputs are no multiple of 128, which Marlin needs; "
    )
    assert ("start SGLang with --dtype half" in note) is flag


# Words for formats


@pytest.mark.parametrize(
    ("sources", "word", "source"),
    [
        ("bf16 quant=gptq_int4", "int4", "quant"),
        ("bf16 quant=gptq_int4", "gptq_int4", "quant"),
        ("bf16 eight=fp8_block quant=gptq_int4", "fp8", "eight"),
        ("bf16 eight=fp8_block quant=gptq_int4", "fp8_block", "eight"),
        ("bf16 one=fp8_block two=fp8_channel", "fp8_channel", "two"),
        ("full=bf16 quant=gptq_int4", "fp16", "full"),
        ("full=bf16 half=fp16", "bf16", "full"),
        # A source's own name comes first.
        ("bf16 int4=gptq_int4 quant=gptq_int4", "int4", "int4"),
    ],
)
def test_a_word_for_a_format_finds_its_source(zoo: Path, tmp_path: Path, sources: str, word: str, source: str) -> None:
    plan = plan_of(tmp_path, zoo_recipe(zoo, f"*.experts.*: {word}", sources))
    assert {m.source for name, m in plan.modules.items() if ".experts." in name} == {source}


@pytest.mark.parametrize(
    ("sources", "word", "message"),
    [
        (
            "bf16 a=gptq_int4 b=gptq_int4",
            "int4",
            "several sources hold `int4`: `bf16` holds bf16, `a` holds gptq_int4, `b` holds gptq_int4; name a source",
        ),
        (
            "full=bf16 half=fp16",
            "fp16",
            "several sources hold `fp16`: `full` holds bf16, `half` holds fp16; name a source",
        ),
        (
            "bf16 fp8=fp8_block",
            "int4",
            "no source holds `int4`: `bf16` holds bf16, `fp8` holds fp8_block; name a source",
        ),
        ("full=bf16 fp8=fp8_block", "fp8_tensor", "no source holds `fp8_tensor`: "),
        ("bf16 int4=gptq_int4", "awq_int4", "no source holds `awq_int4`: "),
        ("bf16 int4=gptq_int4", "int8", "no source holds `int8`: "),
    ],
)
def test_a_word_for_a_format_without_one_source(
    zoo: Path, tmp_path: Path, sources: str, word: str, message: str
) -> None:
    with pytest.raises(RecipeError) as error:
        plan_of(tmp_path, zoo_recipe(zoo, f"*.experts.*: {word}", sources))
    line = 4 + len(sources.split())
    assert str(error.value).startswith(f"{tmp_path / 'recipe.yaml'}:{line}: ")
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["fp16", "bf16", "anything"])
def test_a_source_may_be_called_what_it_holds(zoo: Path, tmp_path: Path, name: str) -> None:
    plan = plan_of(tmp_path, zoo_recipe(zoo, f"*.experts.*: {name}", f"{name}=bf16 fp8=fp8_tensor"))
    assert kinds(plan, "*") == {"bf16"}


@pytest.mark.parametrize(
    ("name", "variant", "holds"),
    [
        ("int4", "fp8_block", "fp8_block"),
        ("int4", "bf16", "bf16"),
        ("awq_int4", "gptq_int4", "gptq_int4"),
        ("fp8", "gptq_int4", "gptq_int4"),
        ("fp8_channel", "fp8_block", "fp8_block"),
        ("fp16", "fp8_tensor", "fp8_tensor"),
        ("bf16", "fp16", "fp16"),
        ("int8", "gptq_int4", "gptq_int4"),
    ],
)
def test_a_source_called_what_it_is_not(zoo: Path, tmp_path: Path, name: str, variant: str, holds: str) -> None:
    with pytest.raises(RecipeError) as error:
        plan_of(tmp_path, zoo_recipe(zoo, "", f"full=bf16 {name}={variant}"))
    assert str(error.value) == (
        f"{tmp_path / 'recipe.yaml'}:4: the source `{name}` ({zoo / variant}) holds {holds}; rename it after what it "
        "holds, or point it to another checkpoint"
    )


def test_a_source_called_int4_that_is_not_read(tmp_path: Path) -> None:
    """An AWQ of a layout that is not read, under the name int4: the message says what it is."""

    def make_awq(tensors: Tensors, config: Config) -> None:
        config["quantization_config"] |= {"quant_method": "awq", "zero_point": True, "version": "gemv"}
        for name in [name for name in tensors if name.endswith("g_idx")]:
            del tensors[name]

    write_tiny(tmp_path / "bf16", LLAMA, "bf16")
    write_tiny(tmp_path / "awq", LLAMA, "gptq_int4", edit=make_awq)
    text = "model: bf16\nsources: {bf16: bf16, int4: awq}\nweights: {'*.mlp.*': int4}\n"
    with pytest.raises(
        RecipeError, match=r":2: the source `int4` \(awq\) holds fp16 \(a module is AWQ version 'gemv' "
    ):
        plan_of(tmp_path, text)
    # Under another name it may lie there, and what is not quantized may be taken from it.
    text = "model: bf16\nsources: {bf16: bf16, other: awq}\nweights: {lm_head: other}\n"
    assert plan_of(tmp_path, text).modules["lm_head"].source == "other"
    with pytest.raises(SourceError, match=r"model\.layers\.0\.mlp\.down_proj: AWQ version 'gemv' is not read"):
        plan_of(tmp_path, text.replace("lm_head", "'*.mlp.*'"))


# What must survive

BIASED = dataclasses.replace(LLAMA, family="qwen2", attention_bias=True)


def drop(suffix: str) -> Any:
    def edit(tensors: Tensors, _: Config) -> None:
        for name in [name for name in tensors if name.endswith(suffix)]:
            del tensors[name]

    return edit


TWO = "model: bf16\nsources: {bf16: bf16, int4: int4}\nweights: {'model.layers.*': int4}\n"


def test_attention_biases_come_with_their_module(tmp_path: Path) -> None:
    write_tiny(tmp_path / "bf16", BIASED, "bf16")
    write_tiny(tmp_path / "int4", BIASED, "gptq_int4")
    q_proj = plan_of(tmp_path, TWO).modules["model.layers.0.self_attn.q_proj"]
    assert q_proj.tensors["bias"].source == "int4"
    assert set(q_proj.tensors) == {"qweight", "qzeros", "scales", "g_idx", "bias"}


def test_attention_biases_that_a_quantizer_lost_come_from_the_default(tmp_path: Path) -> None:
    write_tiny(tmp_path / "bf16", BIASED, "bf16")
    write_tiny(tmp_path / "int4", BIASED, "gptq_int4", edit=drop(".bias"))
    plan = plan_of(tmp_path, TWO)
    for last in ("q_proj", "k_proj", "v_proj"):
        module = plan.modules[f"model.layers.1.self_attn.{last}"]
        assert (module.source, module.tensors["bias"].source) == ("int4", "bf16")
        assert module.tensors["qweight"].source == "int4"
    assert "bias" not in plan.modules["model.layers.1.self_attn.o_proj"].tensors


def test_zero_biases_of_a_packer_are_left_out(tmp_path: Path) -> None:
    write_tiny(tmp_path / "bf16", LLAMA, "bf16")
    write_tiny(tmp_path / "int4", LLAMA, "gptq_int4", zero_bias=True)
    plan = plan_of(tmp_path, TWO)
    assert not any("bias" in module.tensors for module in plan.modules.values())
    assert (
        LeftOut(
            "int4",
            "zero biases that `bf16` does not have",
            14,
            2 * 2 * (256 + 128 + 128 + 128 + 256 + 256 + 128),
            (
                "model.layers.{0..1}.mlp.{down_proj,gate_proj,up_proj}",
                "model.layers.{0..1}.self_attn.{k_proj,o_proj,q_proj,v_proj}",
            ),
        )
        in plan.left_out
    )


@pytest.mark.parametrize("allow", [False, True])
def test_a_bias_that_is_not_zero_is_another_model(tmp_path: Path, allow: bool) -> None:
    def edit(tensors: Tensors, _: Config) -> None:
        tensors["model.layers.1.mlp.down_proj.bias"][-1] = 1

    write_tiny(tmp_path / "bf16", LLAMA, "bf16")
    write_tiny(tmp_path / "int4", LLAMA, "gptq_int4", zero_bias=True, edit=edit)
    with pytest.raises(RefusedError) as error:
        plan_of(tmp_path, TWO, allow_unservable=allow)
    assert tuple(map(str, error.value.problems)) == (
        "model.layers.1.mlp.down_proj has a bias in `int4` that is not zero, and none in `bf16`: these are different "
        "models; point `int4` (line 2) to a checkpoint of the same model",
    )


def test_zero_biases_of_the_default_are_its_own(tmp_path: Path) -> None:
    write_tiny(tmp_path / "int4", LLAMA, "gptq_int4", zero_bias=True)
    plan = plan_of(tmp_path, "model: int4\n")
    assert "bias" in plan.modules["model.layers.0.mlp.up_proj"].tensors
    assert plan.left_out == ()


TIED = dataclasses.replace(LLAMA, tied=True)


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    """Some quantizers write the head of a tied model out; the model has none."""
    write_tiny(tmp_path / "bf16", TIED, "bf16")
    write_tiny(tmp_path / "int4", LLAMA, "gptq_int4", edit=lambda _, config: config.update(tie_word_embeddings=True))
    plan = plan_of(tmp_path, TWO)
    assert "lm_head" not in plan.modules
    assert plan.modules["model.embed_tokens"].source == "bf16"
    assert LeftOut("int4", "tied to the embedding", 1, 384 * 128 * 2, ("lm_head",)) in plan.left_out


PREDICTS = dataclasses.replace(DEEPSEEK, mtp=1)


def test_layers_for_prediction_survive(tmp_path: Path) -> None:
    """Quantizers drop the layer after the last; a glob that ends before it leaves it as it is."""
    write_tiny(tmp_path / "fp8", PREDICTS, "fp8_block", skip=["*.kv_b_proj"])
    write_tiny(tmp_path / "int4", DEEPSEEK, "gptq_int4")
    text = "model: fp8\nsources: {fp8: fp8, int4: int4}\nweights:\n  model.layers.{0..1}.mlp.experts.*: int4\n"
    plan = plan_of(tmp_path, text)
    assert kinds(plan, "model.layers.1.mlp.experts.*") == {"gptq_int4"}
    assert kinds(plan, "model.layers.2.mlp.*.*_proj", "model.layers.2.self_attn.o_proj") == {"fp8_block"}
    assert kinds(plan, "model.layers.2.{eh_proj,enorm}", "model.layers.2.shared_head.head") == {"bf16"}
    assert plan.notes == ()
    # kv_a_proj_with_mqa [192, 128] ends inside a block, like the real one: it is joined last, and may.
    assert kinds(plan, "*.kv_a_proj_with_mqa") == {"fp8_block"}


# What is left out


def check_accounts(plan: Plan) -> None:
    """Every tensor of every source is either in a shard or in one account of what is left out."""
    kept = {(t.source, t.info.name) for shard in plan.shards for t in shard.tensors}
    assert sum(len(shard.tensors) for shard in plan.shards) == len(kept)
    for name, source in plan.sources.by_name.items():
        tensors = source.checkpoint.tensors()
        left = [account for account in plan.left_out if account.source == name]
        assert len({account.reason for account in left}) == len(left)
        mine = {tensor for owner, tensor in kept if owner == name}
        assert mine <= tensors.keys()
        assert len(mine) + sum(account.tensors for account in left) == len(tensors)
        nbytes = sum(info.nbytes for info in tensors.values())
        assert sum(tensors[tensor].nbytes for tensor in mine) + sum(account.nbytes for account in left) == nbytes
        patterns = [Pattern(text) for account in left for text in account.modules]
        for module, stored in source.checkpoint.modules.items():
            is_left = any(info.name not in mine for info in stored.tensors.values())
            assert is_left == any(pattern.matches(module) for pattern in patterns), module


@pytest.fixture(scope="module")
def odd_sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Sources]:
    """Sources that differ in every way that leaves something out: biases, a head, layers, formats."""
    folder = tmp_path_factory.mktemp("odd")
    model = dataclasses.replace(TIED, family="qwen2", attention_bias=True)
    write_tiny(folder / "bf16", model, "bf16")
    write_tiny(folder / "fp8", dataclasses.replace(model, layers=3), "fp8_block", edit=_same_layers)
    write_tiny(
        folder / "int4", dataclasses.replace(model, attention_bias=False, tied=False), "gptq_int4", zero_bias=True
    )
    recipe = write_recipe(folder, "model: bf16\nsources: {a: bf16, b: fp8, c: int4, d: bf16}\n")
    return recipe, open_sources(load_recipe(recipe))


def _same_layers(_: Tensors, config: Config) -> None:
    config["num_hidden_layers"] = 2


RULES = ["*", "*.mlp.*", "*.self_attn.*", "model.layers.0.*", "*_proj", "*norm", "model.embed_tokens", "model.norm"]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(RULES), st.sampled_from("abcd")), max_size=6, unique_by=lambda r: r[0]))
def test_every_tensor_is_accounted_for(odd_sources: tuple[Path, Sources], rules: list[tuple[str, str]]) -> None:
    path, sources = odd_sources
    numbered = tuple(Rule(Pattern(text), source, line) for line, (text, source) in enumerate(rules, start=3))
    recipe = dataclasses.replace(load_recipe(path), rules=numbered)
    check_accounts(make_plan(recipe, sources, allow_unservable=True))


def test_reasons_for_leaving_out(odd_sources: tuple[Path, Sources]) -> None:
    path, sources = odd_sources
    recipe = dataclasses.replace(load_recipe(path), rules=(Rule(Pattern("*.mlp.*"), "c", 3),))
    plan = make_plan(recipe, sources)
    reasons = {(account.source, account.reason): account.tensors for account in plan.left_out}
    assert reasons == {
        ("a", "taken from `c`"): 6,
        ("b", "taken from `a`"): 1 + 1 + 4 + 2 * (4 * 2 + 3),
        ("b", "taken from `c`"): 6 * 2,
        ("b", "draft layers (MTP), which no line takes from it"): 7 * 2 + 3 + 2,
        ("c", "taken from `a`"): 1 + 1 + 4 + 2 * 4 * 5,
        ("c", "zero biases that `a` does not have"): 6,
        ("c", "tied to the embedding"): 1,
        ("d", "taken from `a`"): 1 + 1 + 4 + 2 * (4 + 3),
        ("d", "taken from `c`"): 6,
    }


# Sizes

WIDE = dataclasses.replace(QWEN3_MOE, layers=4, intermediate=512, vocab=4096)

BUILDS = {
    "as it is": "weights: {}",
    "experts": "weights: {'*.experts.*': int4}",
    "all three": "weights: {'*.self_attn.*': fp8, '*.experts.*': int4, '*.experts.{0,3}.*': fp8}",
    "one layer": "weights: {'model.layers.2.*': fp8}",
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide")
    write_tiny(folder / "bf16", WIDE, "bf16", shards=5)
    write_tiny(folder / "fp8", WIDE, "fp8_channel", shards=2)
    write_tiny(folder / "int4", WIDE, "gptq_int4", desc_act=True)
    return folder


def check_shard_sizes(plan: Plan, limit: int) -> None:
    """No shard is over the limit but one that holds a single module; no two neighbours would fit into one."""
    owner = {t.info.name: name for name, m in plan.modules.items() for t in m.tensors.values()}
    cut = [shard for shard in plan.shards if shard.link is None]
    for shard in cut:
        modules = {owner[tensor.info.name] for tensor in shard.tensors}
        assert shard.data_bytes <= limit or len(modules) == 1, shard.file
    for first, second in itertools.pairwise(cut):
        order = [name for name in plan.modules if any(owner[t.info.name] == name for t in second.tensors)]
        next_one = sum(t.info.nbytes for t in second.tensors if owner[t.info.name] == order[0])
        assert first.data_bytes + next_one > limit
    homes: dict[str, set[str]] = {}
    for shard in plan.shards:
        for tensor in shard.tensors:
            homes.setdefault(owner[tensor.info.name], set()).add(shard.file)
    if len(cut) == len(plan.shards):
        assert all(len(files) == 1 for files in homes.values())
    count = len(plan.shards)
    assert [s.file for s in plan.shards] == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("size", ["1MiB", "2500KB", "1GB"])
@pytest.mark.parametrize("mix", BUILDS)
def test_a_build_is_as_large_as_its_plan_says(wide: Path, tmp_path: Path, mix: str, size: str, link: bool) -> None:
    text = f"model: {wide / 'bf16'}\nsources:\n" + "".join(f"  {n}: {wide / n}\n" for n in ("bf16", "fp8", "int4"))
    plan = plan_of(tmp_path, f"{text}{BUILDS[mix]}\noutput: {{shard_size: {size}}}\n", link=link)
    check_shard_sizes(plan, plan.recipe.shard_size)
    check_accounts(plan)
    run_plan(plan, tmp_path / "out", link=link)
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert written == {shard.file: shard.file_bytes(plan.sources) for shard in plan.shards}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == plan.tensor_bytes
    if not link:
        assert sum(written.values()) == plan.tensor_bytes + sum(len(shard.header) for shard in plan.shards)


@settings(deadline=None)
@given(st.integers(1, 4_000_000))
def test_shards_of_any_size(wide: Path, size: int) -> None:
    path = write_recipe(wide, f"model: bf16\nsources: {{bf16: bf16, int4: int4}}\n{BUILDS['experts']}\n")
    recipe = dataclasses.replace(load_recipe(path), shard_size=size)
    check_shard_sizes(make_plan(recipe, open_wide(path)), size)


_opened: dict[Path, Sources] = {}


def open_wide(path: Path) -> Sources:
    """Opened once: what a checkpoint holds does not change between examples."""
    if path not in _opened:
        _opened[path] = open_sources(load_recipe(path))
    return _opened[path]
