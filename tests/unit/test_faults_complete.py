"""The output has every weight that the model of its config.json needs, or the plan is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.write import DEEPSEEK, LLAMA, QWEN3_MOE, Config, Tensors, Tiny, write_tiny

from mixprec_build.errors import RefusedError
from mixprec_build.output.build import plan_recipe
from mixprec_build.planning.types import Plan

THREE = replace(LLAMA, layers=3)
LINES = "weights: {'model.layers.*.mlp.*': other}\n"


def without(*patterns: str) -> Callable[[Tensors, Config], None]:
    def edit(tensors: Tensors, config: Config) -> None:
        found = [name for name in tensors if any(re.search(pattern, name) for pattern in patterns)]
        assert found
        for name in found:
            del tensors[name]

    return edit


def configured(**values: object) -> Callable[[Tensors, Config], None]:
    return lambda tensors, config: config.update(values)


def plan_of(
    folder: Path,
    model: Tiny,
    edit: Callable[[Tensors, Config], None] | None = None,
    lines: str = LINES,
    fp8_edit: Callable[[Tensors, Config], None] | None = None,
) -> Plan:
    write_tiny(folder / "bf16", model, "bf16", edit=edit)
    write_tiny(folder / "fp8", model, "fp8_block", edit=fp8_edit or edit)
    recipe = folder / "recipe.yaml"
    recipe.write_text(f"model: bf16\nsources: {{first: bf16, other: fp8}}\n{lines}")
    return plan_recipe(recipe)


@pytest.mark.parametrize("model", [LLAMA, QWEN3_MOE, DEEPSEEK, replace(DEEPSEEK, mtp=1), replace(LLAMA, tied=True)])
def test_a_model_that_has_all_is_planned(tmp_path: Path, model: Tiny) -> None:
    # kv_b_proj, which SGLang reads outside of its methods, stays where it is.
    lines = "weights: {'model.layers.*.mlp.*': other}\n"
    assert plan_of(tmp_path, model, lines=lines).notes == ()


@pytest.mark.parametrize(
    ("model", "edit", "said"),
    [
        (LLAMA, without("^lm_head"), "the model needs an lm_head, which config.json does not tie"),
        (LLAMA, without("embed_tokens"), "the model needs an embedding"),
        (THREE, without(r"layers\.1\."), "num_hidden_layers 3, and the mix has nothing of model.layers.1;"),
        (THREE, without(r"layers\.2\."), "nothing of model.layers.2;"),
        (LLAMA, configured(num_hidden_layers=5), "nothing of model.layers.{2..4}"),
        (THREE, without(r"layers\.1\.self_attn"), "model.layers.1.self_attn: no source of the mix has it"),
        (THREE, without(r"layers\.1\.mlp\.down"), "model.layers.1.mlp.down_proj: no source of the mix has it"),
        (LLAMA, without(r"layers\.1\.input_layernorm"), "model.layers.1.input_layernorm: no source"),
        (LLAMA, without(r"^model\.norm"), "has the norm after the last layer (model.norm)"),
        (QWEN3_MOE, without(r"layers\.1\.mlp\.experts\.3\."), "nothing of model.layers.1.mlp.experts.3;"),
        (QWEN3_MOE, without(r"experts\.2\.up"), "nothing of model.layers.{0..1}.mlp.experts.2.up_proj"),
        (
            QWEN3_MOE,
            configured(num_experts=6),
            "the model has 6 experts a layer, and the mix has nothing of model.layers.{0..1}.mlp.experts.{4..5};",
        ),
        (
            QWEN3_MOE,
            configured(num_experts=3),
            "3 experts a layer, and the mix has model.layers.{0..1}.mlp.experts.3 beside",
        ),
        (QWEN3_MOE, without(r"layers\.0\.mlp\.gate\."), "model.layers.0.mlp.gate: no source of the mix has it"),
        (DEEPSEEK, without(r"layers\.0\.self_attn\.q_a_proj"), "model.layers.0.self_attn.q_a_proj: no source"),
        (DEEPSEEK, without(r"layers\.1\..*shared_experts\.up"), None),
    ],
)
def test_what_a_model_lacks_is_refused(
    tmp_path: Path, model: Tiny, edit: Callable[[Tensors, Config], None], said: str | None
) -> None:
    if said is None:  # one layer alone has shared experts: nothing to compare them with
        plan_of(tmp_path, model, edit, lines="weights: {'*.o_proj': other}\n")
        return
    with pytest.raises(RefusedError, match=re.escape(said)):
        plan_of(tmp_path, model, edit)


def test_what_another_source_has_is_named_with_it(tmp_path: Path) -> None:
    def whole(tensors: Tensors, config: Config) -> None:
        del config["head_dim"]

    with pytest.raises(RefusedError, match=r"lm_head.*`lm_head: other`"):
        plan_of(tmp_path / "a", LLAMA, without("^lm_head"), fp8_edit=whole)
    said = r"layers\.1\.mlp\.up_proj: the mix lacks it, .*so has `other`.*`model.layers.1.mlp.up_proj: other`"
    with pytest.raises(RefusedError, match=said):
        plan_of(tmp_path / "b", LLAMA, without(r"1\.mlp\.up"), "weights: {'*.o_proj': other}\n", fp8_edit=whole)


def test_a_line_for_what_the_default_lacks_is_enough(tmp_path: Path) -> None:
    plan = plan_of(
        tmp_path, LLAMA, without("^lm_head"), "weights: {lm_head: other, '*.mlp.*': other}\n", fp8_edit=configured()
    )
    assert plan.modules["lm_head"].source == "other"


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        ({"tie_word_embeddings": True}, False),
        ({"architectures": ["LlamaForSequenceClassification"]}, False),
        ({"architectures": ["LlamaForCausalLM"]}, True),
        ({"model_type": "gemma3_text", "tie_word_embeddings": None}, False),
        ({"tie_word_embeddings": None}, True),
    ],
)
def test_whether_a_head_is_needed_is_said_by_the_config(tmp_path: Path, values: Config, refused: bool) -> None:
    def edit(tensors: Tensors, config: Config) -> None:
        without("^lm_head")(tensors, config)
        config.update(values)

    if refused:
        with pytest.raises(RefusedError, match="lm_head"):
            plan_of(tmp_path, LLAMA, edit)
    else:
        assert "lm_head" not in plan_of(tmp_path, LLAMA, edit).modules


def test_an_embedding_under_another_name_is_found_by_its_shape(tmp_path: Path) -> None:
    def edit(tensors: Tensors, config: Config) -> None:
        tensors["model.tok_embeddings.weight"] = tensors.pop("model.embed_tokens.weight")
        tensors["output.weight"] = tensors.pop("lm_head.weight")
        config["model_type"] = "internlm9"

    assert "output" in plan_of(tmp_path, LLAMA, edit).modules


def test_layers_of_several_kinds_do_not_lack_what_others_have(tmp_path: Path) -> None:
    def edit(tensors: Tensors, config: Config) -> None:
        config["model_type"] = "qwen9_next"
        for name in [name for name in tensors if ".layers.1.self_attn." in name]:
            tensors[name.replace("self_attn", "linear_attn").replace("q_proj", "in_proj")] = tensors.pop(name)

    notes = plan_of(tmp_path, THREE, edit).notes
    assert not [note for note in notes if "other layers have" in note]


def test_a_layer_of_an_unchecked_family_that_has_less_is_noted(tmp_path: Path) -> None:
    def edit(tensors: Tensors, config: Config) -> None:
        config["model_type"] = "gemma9n"  # whose last layers share keys and values
        without(r"layers\.2\.self_attn\.[kv]_proj")(tensors, config)

    (note,) = [note for note in plan_of(tmp_path, THREE, edit).notes if "other layers have" in note]
    assert note.startswith("model.layers.2.self_attn.{k_proj,v_proj}: ")


def test_a_head_that_is_left_out_is_said(tmp_path: Path) -> None:
    """The default ties its head; the quantized source stores one, equal to the embedding."""

    def with_head(tensors: Tensors, config: Config) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]

    tied = replace(LLAMA, tied=True)
    write_tiny(tmp_path / "bf16", tied, "bf16")
    write_tiny(tmp_path / "fp8", tied, "fp8_block", edit=with_head)
    recipe = tmp_path / "mix.yaml"
    recipe.write_text("model: bf16\nsources: {bf16: bf16, fp8: fp8}\ndefault: bf16\nweights: {'model.layers.*': fp8}\n")
    (note,) = [note for note in plan_recipe(recipe).notes if "is left out" in note]
    assert note == (
        "lm_head of `fp8` is left out: `bf16` ties its head to the embedding (tie_word_embeddings), which takes its "
        "place"
    )
