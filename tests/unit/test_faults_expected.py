"""What the planner takes along is what strict loading asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.write import LLAMA, Config, Tensors, write_tiny

from mixprec_build.checkpoint.degree import Degree
from mixprec_build.families.cache_scales import cache_scale
from mixprec_build.families.expected import (
    is_buffer,
    is_expected,
    is_for_drafts,
    is_tied_head,
    layers_due,
    left_out_of_builds,
)
from mixprec_build.families.facts import ModelFacts
from mixprec_build.output.build import plan_recipe
from mixprec_build.ranks.splitter import Splitter


def write_sources(folder: Path, *words: str) -> Path:
    """FP8 with tensors of these names in each attention, and BF16 without; returns where a recipe goes."""

    def edit(tensors: Tensors, config: Config) -> None:
        for layer in range(LLAMA.layers):
            for word in words:
                tensors[f"model.layers.{layer}.self_attn.{word}"] = np.full((), 0.5, np.float32)

    write_tiny(folder / "fp8", LLAMA, "fp8_tensor", edit=edit)
    write_tiny(folder / "bf16", LLAMA, "bf16")
    return folder / "recipe.yaml"


NAMES = [
    (("k_proj.k_scale", "v_proj.v_scale"), ["k_scale", "v_scale"]),
    (("k_scale", "v_scale"), ["k_scale", "v_scale"]),
    (("attn.k_scale", "attn.v_scale"), ["k_scale", "v_scale"]),
    (("k_proj.output_scale", "v_proj.output_scale"), ["k_scale", "v_scale"]),
    (("kv_scale",), ["k_scale", "v_scale"]),
]


@pytest.mark.parametrize(("words", "parameters"), NAMES)
def test_scales_of_the_cache_come_with_their_attention(
    tmp_path: Path, words: tuple[str, ...], parameters: list[str]
) -> None:
    recipe = write_sources(tmp_path, *words)
    recipe.write_text("model: fp8\nsources: {q: fp8, bf16: bf16}\ndefault: q\nweights: {'*.mlp.*': bf16}\n")
    plan = plan_recipe(recipe)
    scales = {name for name in plan.modules if cache_scale(name) is not None}
    assert scales == {f"model.layers.{n}.self_attn.{word}" for n in range(LLAMA.layers) for word in words}
    stored = {name: (module.format, module.stored) for name, module in plan.modules.items()}
    splitter = Splitter(stored, plan.sources.model.facts, Degree(2))
    for rank in range(2):
        found = {p.name: (p.dtype, p.shape) for p in splitter.parameters(rank) if ".self_attn.attn." in p.name}
        assert found == {
            f"model.layers.{n}.self_attn.attn.{leaf}": ("F32", ()) for n in range(LLAMA.layers) for leaf in parameters
        }


def test_scales_of_the_cache_stay_with_their_source(tmp_path: Path) -> None:
    """Attention from elsewhere has none, and a note says so."""
    recipe = write_sources(tmp_path, "k_proj.k_scale", "v_proj.v_scale")
    recipe.write_text(
        "model: fp8\nsources: {q: fp8, bf16: bf16}\ndefault: q\nweights: {'model.layers.0.self_attn.*': bf16}\n"
    )
    plan = plan_recipe(recipe)
    assert not [name for name in plan.modules if name.startswith("model.layers.0.") and cache_scale(name)]
    assert [name for name in plan.modules if name.startswith("model.layers.1.") and cache_scale(name)]
    assert [note for note in plan.notes if "model.layers.0.self_attn: `q` has scales for an FP8 KV cache" in note]
    (left,) = [left for left in plan.left_out if "KV cache" in left.reason]
    assert left.tensors == 2 and left.source == "q"


@pytest.mark.parametrize("words", [("k_scale", "v_scale", "k_zero_point"), ("q_scale",), ("q_proj.input_scale_ub",)])
def test_what_sglang_has_no_place_for_is_left_out_with_a_line(tmp_path: Path, words: tuple[str, ...]) -> None:
    recipe = write_sources(tmp_path, *words)
    recipe.write_text("model: fp8\nsources: {q: fp8, bf16: bf16}\ndefault: q\nweights: {'*.mlp.*': bf16}\n")
    plan = plan_recipe(recipe)
    assert not [name for name in plan.modules if name.endswith(words)]
    (left,) = [left for left in plan.left_out if "KV cache" in left.reason or "upper bound" in left.reason]
    assert left.tensors == LLAMA.layers * len(words) and left.source == "q"


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


@pytest.mark.parametrize("tied", [False, True])
def test_one_rule_says_what_a_model_takes(tied: bool) -> None:
    """The planner, files for ranks and strict loading ask it."""
    facts = ModelFacts.of(
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "num_hidden_layers": 4,
            "tie_word_embeddings": tied,
        }
    )
    stage = range(2, 4)
    expected = {
        "model.embed_tokens.weight": (True, True),
        "lm_head.weight": (not tied, not tied),
        "model.norm.weight": (True, True),
        "model.layers.0.mlp.up_proj.weight": (True, False),
        "model.layers.3.mlp.up_proj.weight": (True, True),
        "model.layers.4.mlp.up_proj.weight": (False, False),  # a layer for drafts
        "mtp.fc.weight": (False, False),
        "model.layers.3.self_attn.rotary_emb.inv_freq": (False, False),
        "model.layers.3.self_attn.k_scale": (False, False),
        "visual.blocks.0.attn.qkv.weight": (True, True),
    }
    assert {n: (is_expected(n, facts), is_expected(n, facts, stage)) for n in expected} == expected
    assert layers_due(facts) == range(4) and is_tied_head("lm_head", facts) is tied


def test_a_family_that_ties_its_head_where_nothing_is_said() -> None:
    facts = ModelFacts.of({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"], "num_hidden_layers": 99_999})
    assert is_tied_head("lm_head.weight", facts) and layers_due(facts) is None
