"""What a model class of SGLang's moves while it loads: only formats that have nothing beside the rows may be there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.write import LLAMA, Config, Tensors, write_tiny

from mixprec_build.errors import RefusedError
from mixprec_build.output.build import plan_recipe
from mixprec_build.planning.types import Plan

LLAMA4 = {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"]}


def plan_of(folder: Path, variant: str, config: Config, **options: Any) -> Plan:
    def edit(tensors: Tensors, written: Config) -> None:
        written.update(config)

    write_tiny(folder / "bf16", LLAMA, "bf16", edit=edit)
    write_tiny(folder / "q", LLAMA, variant, edit=edit, **options)
    recipe = folder / "recipe.yaml"
    recipe.write_text("model: bf16\nsources: {bf16: bf16, q: q}\nweights: {'model.layers.*.self_attn.*': q}\n")
    return plan_recipe(recipe)


@pytest.mark.parametrize("variant", ["gptq_int4", "awq_int4", "ct_int4", "fp8_channel"])
def test_llama4s_queries_and_keys_are_refused_where_scales_would_stay_behind(tmp_path: Path, variant: str) -> None:
    with pytest.raises(RefusedError) as raised:
        plan_of(tmp_path, variant, LLAMA4)
    assert "model.layers.{0..1}.self_attn.{k_proj,q_proj}" in str(raised.value)
    assert "SGLang's Llama4ForConditionalGeneration moves the rows" in str(raised.value)
    (line,) = re.findall(r"[Aa]dd below line 3: `([^`]+)`", str(raised.value))
    assert line == "model.layers.{0..1}.self_attn.{k_proj,q_proj,v_proj}: bf16"


@pytest.mark.parametrize(("variant", "options"), [("fp8_block", {}), ("fp8_tensor", {})])
def test_scales_of_whole_heads_may_stay(tmp_path: Path, variant: str, options: Any) -> None:
    assert plan_of(tmp_path, variant, LLAMA4, **options).modules["model.layers.0.self_attn.q_proj"].source == "q"


def test_blocks_that_cut_heads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="moves the rows"):
        plan_of(tmp_path, "fp8_block", {**LLAMA4, "head_dim": 64}, block=(32, 128))


def test_a_class_that_moves_nothing_takes_all(tmp_path: Path) -> None:
    config = {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]}
    assert plan_of(tmp_path, "gptq_int4", config).modules["model.layers.0.self_attn.q_proj"].source == "q"
