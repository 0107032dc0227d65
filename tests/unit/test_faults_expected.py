"""What the planner takes along is what strict loading asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.write import LLAMA, Config, Tensors, write_tiny

from mixprec_build.families.expected import is_buffer, is_for_drafts, left_out_of_builds
from mixprec_build.output.build import plan_recipe


@pytest.mark.parametrize(
    "word", ["k_proj.k_scale", "v_proj.v_scale", "kv_scale", "attn.k_scale", "q_proj.input_scale_ub"]
)
def test_scales_of_the_cache_are_left_out_with_a_line(tmp_path: Path, word: str) -> None:
    def edit(tensors: Tensors, config: Config) -> None:
        for layer in range(LLAMA.layers):
            tensors[f"model.layers.{layer}.self_attn.{word}"] = np.ones((), np.float32)

    write_tiny(tmp_path / "fp8", LLAMA, "fp8_tensor", edit=edit)
    write_tiny(tmp_path / "bf16", LLAMA, "bf16")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: fp8\nsources: {q: fp8, bf16: bf16}\ndefault: q\nweights: {'*.mlp.*': bf16}\n")
    plan = plan_recipe(recipe)
    assert not [name for name in plan.modules if name.endswith(word)]
    (left,) = [left for left in plan.left_out if "KV cache" in left.reason or "upper bound" in left.reason]
    assert left.tensors == LLAMA.layers and left.source == "q"


@pytest.mark.parametrize(
    ("name", "drafts"),
    [
        ("mtp.layers.0.mlp.up_proj.weight", True),
        ("mtp.fc.weight", True),
        ("model.mtp.layers.0.input_layernorm.weight", True),
        ("model.layers.0.mlp.up_proj.weight", False),
        ("model.embed_tokens.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_layers_for_drafts_are_known_by_their_names(name: str, drafts: bool) -> None:
    assert is_for_drafts(name) is drafts
    assert left_out_of_builds(name) is None and not is_buffer(name)
