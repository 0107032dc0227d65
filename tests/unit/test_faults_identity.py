"""The config.json of `model:` is of one model with all sources that weights come from, as words and weights say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.write import LLAMA, Config, Tensors, write_tiny

from mixprec_build.errors import RefusedError
from mixprec_build.families.identity import config_differences
from mixprec_build.output.build import plan_recipe
from mixprec_build.planning.types import Plan

YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


def configured(**values: Any) -> Callable[[Tensors, Config], None]:
    return lambda tensors, config: config.update(values)


def plan_of(folder: Path, model_config: Config, lines: str = "model.layers.*.mlp.*: fp8", **options: Any) -> Plan:
    """A mix whose config is that of a third checkpoint, which no weight comes from."""
    write_tiny(folder / "third", options.get("third", LLAMA), "bf16", edit=configured(**model_config))
    write_tiny(folder / "bf16", LLAMA, "bf16", edit=options.get("edit"))
    write_tiny(folder / "fp8", LLAMA, "fp8_block", edit=options.get("fp8_edit"))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"model: third\nsources: {{bf16: bf16, fp8: fp8}}\ndefault: bf16\nweights:\n  {lines!r}: fp8\n".replace(
            f"{lines!r}: fp8", f"'{lines.partition(': ')[0]}': {lines.partition(': ')[2]}"
        )
    )
    return plan_recipe(recipe, allow_unservable=options.get("allow", False))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05 and 1e-06"),
        ({"hidden_size": 512}, "hidden_size 512 and 128"),
        ({"intermediate_size": 512}, "intermediate_size 512 and 256"),
        ({"num_attention_heads": 8}, "num_attention_heads 8 and 4"),
    ],
)
def test_another_models_config_is_refused(tmp_path: Path, values: Config, said: str) -> None:
    for allow in (False, True):
        with pytest.raises(RefusedError, match=rf"`model:` \(third\) and `fp8` are different models: {said}"):
            plan_of(tmp_path / str(allow), values, allow=allow)


@pytest.mark.parametrize(
    ("ours", "theirs", "keys"),
    [
        ({"rope_theta": 1e6}, {"rope_theta": 10000.0}, ["rope_theta"]),
        ({"rope_theta": 1000000}, {"rope_theta": 1e6}, []),
        ({"rope_theta": 1e6}, {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, []),
        ({"rope_theta": 1e6}, {"rope_parameters": {"rope_theta": 1e7, "rope_type": "default"}}, ["rope_theta"]),
        ({"rope_scaling": None}, {"rope_scaling": YARN}, ["rope_type"]),
        ({}, {"rope_scaling": YARN}, ["rope_type"]),
        ({"rope_scaling": YARN}, {"rope_scaling": YARN | {"factor": 2}}, ["rope_scaling.factor"]),
        ({"rope_scaling": YARN}, {"rope_parameters": {**YARN, "rope_type": "yarn", "rope_theta": 1e4}}, []),
        ({"sliding_window": 4096}, {"sliding_window": None}, ["sliding_window"]),
        ({"sliding_window": 4096, "use_sliding_window": False}, {"sliding_window": None}, []),
        ({"final_logit_softcapping": 30.0}, {}, ["final_logit_softcapping"]),
        ({"attention_bias": False}, {}, []),
        ({"num_experts_per_tok": 8}, {"num_experts_per_tok": 4}, ["num_experts_per_tok"]),
        ({"index_topk": 512}, {"index_topk": 2048}, ["index_topk"]),
        ({"swiglu_limit": 10.0}, {"swiglu_limit": 7.0}, ["swiglu_limit"]),
        ({"routed_scaling_factor": 2.5}, {"routed_scaling_factor": 1.0}, ["routed_scaling_factor"]),
        ({"text_config": {"rms_norm_eps": 1e-5}}, {"rms_norm_eps": 1e-6}, ["rms_norm_eps"]),
        ({"layer_types": ["full_attention"]}, {"layer_types": ["sliding_attention"]}, ["layer_types"]),
        ({"vocab_size": 512}, {"vocab_size": 576}, []),
        ({"torch_dtype": "bfloat16", "use_cache": True}, {"torch_dtype": "float16", "use_cache": False}, []),
    ],
)
def test_what_counts(ours: Config, theirs: Config, keys: list[str]) -> None:
    for a, b in ((ours, theirs), (theirs, ours)):
        assert [found.key for found in config_differences(a, b) if found.counts] == keys


def test_a_limit_of_activations_that_the_model_lacks_is_refused_and_one_that_a_source_lacks_is_not() -> None:
    """SGLang limits none without it."""
    (found,) = config_differences({"swiglu_limit": None}, {"swiglu_limit": 10.0})
    assert found.counts and str(found) == "swiglu_limit None and 10"
    assert not config_differences({"swiglu_limit": 10.0}, {})


def test_a_key_that_nobody_knows_is_said(tmp_path: Path) -> None:
    notes = plan_of(tmp_path, {"gate_temperature": 2}, fp8_edit=configured(gate_temperature=1)).notes
    (note,) = [note for note in notes if "gate_temperature" in note]
    assert note == (
        "`model:` (third) and `fp8` differ in their config.json: gate_temperature 2 and 1; the output is served with "
        "the first"
    )


def test_other_words_for_one_architecture_are_said(tmp_path: Path) -> None:
    notes = plan_of(tmp_path, {}, fp8_edit=configured(model_type="mistral")).notes
    assert [note for note in notes if "model_type llama and mistral" in note]


def test_a_source_that_nothing_comes_from_is_not_compared(tmp_path: Path) -> None:
    plan_of(tmp_path, {}, "model.layers.9.*: fp8", fp8_edit=configured(rms_norm_eps=0.1))


# What weights prove


def test_a_padded_vocabulary_of_a_source_whose_layers_are_taken_does_not_matter(tmp_path: Path) -> None:
    write_tiny(tmp_path / "bf16", LLAMA, "bf16")
    write_tiny(tmp_path / "fp8", replace(LLAMA, vocab=448), "fp8_block")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: bf16\nsources: {bf16: bf16, q: fp8}\nweights: {'model.layers.*': q}\n")
    plan = plan_recipe(recipe)
    assert plan.modules["lm_head"].source == plan.modules["model.embed_tokens"].source == "bf16"
    recipe.write_text("model: bf16\nsources: {bf16: bf16, q: fp8}\nweights: {'lm_head': q}\n")
    with pytest.raises(RefusedError, match=r"lm_head: \[384, 128\] in `bf16` and \[448, 128\] in `q`"):
        plan_recipe(recipe)


def test_a_vocabulary_of_another_size_than_the_config_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"lm_head from `bf16` has 384 rows, and config.json of `model:` says"):
        plan_of(tmp_path, {}, third=replace(LLAMA, vocab=448))


def test_a_head_of_its_own_is_not_left_out(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"ties the head to the embedding.*lm_head from `bf16` holds other values"):
        plan_of(tmp_path, {"tie_word_embeddings": True})


def test_a_copy_of_the_embedding_is_no_head_of_its_own(tmp_path: Path) -> None:
    def edit(tensors: Tensors, config: Config) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    assert plan_of(tmp_path, {"tie_word_embeddings": True}, edit=edit).modules["lm_head"].source == "bf16"
