"""What a checkpoint says of its quantization, wherever it says it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support import producers as made
from support.producers import Checkpoint

from mixprec_build.checkpoint.declared import (
    DECLARATION_FILES,
    Declared,
    differences,
    read_declarations,
    without_declarations,
)
from mixprec_build.checkpoint.opening import open_checkpoint
from mixprec_build.errors import SourceError
from mixprec_build.formats.names import name_forms
from mixprec_build.output.build import plan_recipe, run_plan

Json = dict[str, Any]

GPTQ: Json = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
FP8: Json = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def declared(config: Json, **files: Json) -> tuple[Declared, ...]:
    beside: Mapping[str, Json] = {f"{name}.json": content for name, content in files.items()}
    return read_declarations(config, beside.get, "q")


def the_one(config: Json, **files: Json) -> Declared:
    (found,) = declared(config, **files)
    return found


def test_a_plain_model_declares_nothing() -> None:
    assert declared({"model_type": "llama"}) == ()
    assert declared({"quantization_config": None, "text_config": {"quantization_config": {}}}) == ()


@pytest.mark.parametrize(
    ("config", "place"),
    [
        ({"quantization_config": GPTQ}, "quantization_config"),
        ({"text_config": {"quantization_config": GPTQ}}, "text_config.quantization_config"),
        ({"thinker_config": {"text_config": {"quantization_config": GPTQ}}},
         "thinker_config.text_config.quantization_config"),
        ({"compression_config": GPTQ}, "compression_config"),
    ],
)  # fmt: skip
def test_it_may_stand_in_a_part_of_the_config(config: Json, place: str) -> None:
    assert the_one(config) == Declared(GPTQ, "config.json", place)


def test_the_top_goes_before_a_part_a_decoder_before_an_encoder_and_all_before_files() -> None:
    config = {
        "compression_config": {"n": 4},
        "vision_config": {"quantization_config": {"n": 5}},
        "text_config": {"quantization_config": {"n": 2}},
        "talker": {"quantization_config": {"n": 3}},
        "quantization_config": {"n": 1},
    }
    found = declared(config, quantize_config={"n": 7}, hf_quant_config={"n": 6}, quant_config={"n": 8})
    assert [one.quantization["n"] for one in found] == list(range(1, 9))


def test_a_part_that_repeats_the_top_is_no_second_declaration() -> None:
    assert len(declared({"quantization_config": GPTQ, "text_config": {"quantization_config": dict(GPTQ)}})) == 1


def test_modelopt_says_it_in_a_file_of_its_own() -> None:
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    found = the_one({}, hf_quant_config={"producer": {"name": "modelopt"}, "quantization": quantization})
    assert found.file == "hf_quant_config.json"
    assert found.quantization == {"quant_method": "modelopt", **quantization, "producer": {"name": "modelopt"}}


def test_modelopt_that_quantized_nothing_declares_nothing() -> None:
    assert declared({}, hf_quant_config={"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}) == ()


@pytest.mark.parametrize(
    ("block", "method"),
    [
        ({"quant_algo": "FP8", "ignore": ["lm_head"]}, "modelopt"),
        ({"config_groups": {}, "producer": {"name": "modelopt"}}, "modelopt"),
        ({"w_bit": 4, "q_group_size": 128, "zero_point": True, "version": "GEMM"}, "awq"),
        ({"global_quant_config": {}}, "quark"),
        ({"quant_method": "GPTQ"}, "gptq"),
        ({"quant_method": "intel/auto-round"}, "auto-round"),
        ({"bits": 4}, None),
    ],
)
def test_the_method_is_told_by_what_there_is(block: Json, method: str | None) -> None:
    assert the_one({"quantization_config": block}).quantization.get("quant_method") == method


@pytest.mark.parametrize(
    ("file", "content", "method"),
    [
        ("quantize_config", {"bits": 4}, "gptq"),
        ("quantize_config", {"w_bit": 4}, "awq"),
        ("quant_config", {"w_bit": 4}, "awq"),
        ("quantize_config", {"bits": 4, "quant_method": "awq"}, "awq"),
    ],
)
def test_the_method_of_a_file_is_its_tools(file: str, content: Json, method: str) -> None:
    assert the_one({}, **{file: content}).quantization["quant_method"] == method


def test_old_words_stand_for_the_new() -> None:
    found = the_one({"quantization_config": {"w_bit": 4, "q_group_size": 64}})
    assert (found.quantization["bits"], found.quantization["group_size"]) == (4, 64)


def test_two_words_for_one_setting_that_agree_are_one_declaration() -> None:
    assert len(declared({"quantization_config": GPTQ | {"groupsize": 128, "actorder": False}})) == 1


def test_two_words_for_one_setting_that_differ_are_two_declarations() -> None:
    first, second = declared({"quantization_config": GPTQ | {"groupsize": 64}})
    assert (first.quantization["group_size"], second.quantization["group_size"]) == (128, 64)
    assert first.described == "`quantization_config` of config.json (`group_size`)"
    assert second.described == "`quantization_config` of config.json (`groupsize`)"
    assert differences(first, second) == ["group_size 128 and 64"]


def test_what_mixprec_wrote_counts_alone() -> None:
    mixprec = {"quant_method": "mixprec", "version": 1}
    assert the_one({"quantization_config": mixprec}, quantize_config=GPTQ).quantization == mixprec


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ({"quantization_config": [1]}, {}, "q/config.json: `quantization_config` is not an object"),
        ({"text_config": {"quantization_config": "fp8"}}, {},
         "q/config.json: `text_config.quantization_config` is not an object"),
        ({}, {"hf_quant_config": {"quantization": 1}}, "q/hf_quant_config.json: `quantization` is not an object"),
    ],
)  # fmt: skip
def test_a_declaration_is_an_object(config: Json, files: Json, message: str) -> None:
    with pytest.raises(SourceError) as error:
        declared(config, **files)
    assert str(error.value) == message


def test_none_is_left_in_any_part() -> None:
    config = {"a": 1, "quantization_config": {}, "compression_config": {}, "list": [{"quantization_config": 1, "b": 2}]}
    config["text_config"] = {"hidden_size": 8, "quantization_config": {"quant_method": "gptq"}}
    assert without_declarations(config) == {"a": 1, "list": [{"b": 2}], "text_config": {"hidden_size": 8}}


@pytest.mark.parametrize(
    "module",
    ["model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj",
     "model.language_model.layers.0.mlp.up_proj"],
)  # fmt: skip
def test_a_decoder_has_the_same_names_inside_a_larger_model_and_alone(module: str) -> None:
    forms = name_forms(module)
    assert forms[0] == module
    assert {"model.layers.0.mlp.up_proj", "language_model.model.layers.0.mlp.up_proj",
            "model.language_model.layers.0.mlp.up_proj"} <= set(forms)  # fmt: skip


def test_heads_too() -> None:
    assert "lm_head" in name_forms("language_model.lm_head")
    assert "language_model.lm_head" in name_forms("lm_head")


def test_no_declaration_but_one_is_in_what_is_built(tmp_path: Path) -> None:
    """The sources' own files stay behind, and so does a block in a part of ``config.json``."""
    checkpoint = Checkpoint(made.deepseek(prefix="language_model."), {"*.experts.?.*": made.FP8_BLOCK})
    source = checkpoint.write(tmp_path / "q", {"config": {"text_config": {"quantization_config": FP8}}})
    for file in DECLARATION_FILES:
        (source / file).write_text(json.dumps({"bits": 4}))
    assert open_checkpoint(str(source)).quantization_file == "config.json"
    (tmp_path / "recipe.yaml").write_text("model: q\n")
    plan = plan_recipe(tmp_path / "recipe.yaml", allow_unservable=True)
    run_plan(plan, tmp_path / "out", allow_unservable=True)
    text = (tmp_path / "out" / "config.json").read_text()
    assert text.count("quantization_config") == 1
    assert json.loads(text)["quantization_config"]["quant_method"] == "mixprec"
    assert not {path.name for path in (tmp_path / "out").iterdir()} & set(DECLARATION_FILES)
