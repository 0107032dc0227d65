"""Declarations of quantization are read where SGLang reads them, and none is left in an output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.write import LLAMA, Config, write_tiny

from mixprec_build.checkpoint.typed import open_source
from mixprec_build.formats.base import FormatError
from mixprec_build.output.build import plan_recipe, run_plan


@pytest.mark.parametrize("place", ["text_config", "llm_config", "compression_config", "file"])
@pytest.mark.parametrize("variant", ["ct_int4", "awq_int4", "fp8_tensor"])
def test_a_declaration_elsewhere_is_read_and_not_written(tmp_path: Path, variant: str, place: str) -> None:
    write_tiny(tmp_path / "q", LLAMA, variant)
    path = tmp_path / "q" / "config.json"
    config: Config = json.loads(path.read_text())
    block = config.pop("quantization_config")
    if place == "file":
        name = {"awq_int4": "quant_config.json", "fp8_tensor": "hf_quant_config.json"}.get(variant)
        if name is None:
            return  # compressed-tensors has no file of its own
        if variant == "awq_int4":  # AutoAWQ's own spelling
            block = {"zero_point": True, "q_group_size": block["group_size"], "w_bit": 4, "version": "GEMM"}
        else:
            block = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
        (tmp_path / "q" / name).write_text(json.dumps(block))
    elif place == "compression_config":
        config[place] = block
    else:
        config[place] = {"quantization_config": block}
    path.write_text(json.dumps(config))
    formats = open_source(str(tmp_path / "q")).formats
    assert not [fmt for fmt in formats.values() if isinstance(fmt, FormatError)]
    assert formats["model.layers.0.mlp.up_proj"].kind == variant  # type: ignore[union-attr]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: q\nsources: {q: q}\n")
    run_plan(plan_recipe(recipe), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert json.dumps(written).count("quant_method") == 1 == json.dumps(written).count('"quantization_config"')
