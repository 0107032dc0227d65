"""Experts that are loaded at other places than in the checkpoint: ``--init-expert-location``, redundant experts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import TINY
from support.serving import QWEN3_MOE
from support.sglang.families import family_mix
from support.sglang.harness import build, change_tensors, experts_at, make, parameters_of, rank_of, serve, sources

pytestmark = pytest.mark.usefixtures("sglang")

SHAPE = QWEN3_MOE.of(hidden=256, heads=4, kv_heads=2)
VARIANTS = ("bf16", "fp8_block", "gptq_int4")
REVERSED = [7, 6, 5, 4, 3, 2, 1, 0]
REDUNDANT = [3, 6, 5, 4, 1, 2, 3, 0, 7, 5]
"""Ten places: experts 3 and 5 have one on each of two ranks."""


@pytest.fixture(scope="module")
def uniform(folder: Path) -> Path:
    """A checkpoint with one format for each layer's experts."""
    out = folder / "uniform_layers"
    if not out.exists():
        lines = {"model.layers.0.mlp.experts.*": "fp8_block", "model.layers.1.mlp.experts.*": "gptq_int4"}
        build(sources(folder, SHAPE, VARIANTS), lines, out)
    return out


def without(checkpoint: Path, gone: str, out: Path) -> Path:
    """A copy of a checkpoint whose files lack one tensor."""
    shutil.copytree(checkpoint, out)
    change_tensors(out, lambda tensors: tensors.pop(gone))
    return out


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
@pytest.mark.parametrize("places", [REVERSED, REDUNDANT])
def test_each_rank_loads_the_experts_of_its_places(uniform: Path, places: list[int], load_format: str) -> None:
    due, each = serve(uniform), len(places) // 2
    for rank in range(2):
        with rank_of(rank, 2, 2), experts_at([places] * SHAPE.layers):
            model = serve(uniform, ep_num_redundant_experts=len(places) - SHAPE.experts, load_format=load_format)
        for layer in range(SHAPE.layers):
            path = f"model.layers.{layer}.mlp.experts"
            held = parameters_of(model.get_submodule(path))
            for name, tensor in parameters_of(due.get_submodule(path)).items():
                if "sort_indices" not in name:  # made later
                    assert torch.equal(held[name], tensor[places[rank * each : (rank + 1) * each]]), (path, name)


def test_a_class_that_loads_no_single_experts_gets_them_at_their_places(folder: Path) -> None:
    """Step-3.5's; gpt-oss is beside its releases in test_gpt_oss.py."""
    mix = family_mix(folder, "step3p5", lines={"*.experts.*": "int4", "*.layers.*.mlp.experts.{0..7}.*": "int4"})
    options, places = TINY["step3p5"].options, [[*REVERSED[layer:], *REVERSED[:layer]] for layer in range(5)]
    due = serve(mix, **options)
    with experts_at(places):
        model = serve(mix, **options)
    loaded = {name: tensor for name, tensor in due.named_parameters() if tensor.numel() and "indices" not in name}
    assert any(".experts." in name for name in loaded)
    for name, tensor in loaded.items():
        layer = re.search(r"layers\.(\d+)\.\w+\.experts\.", name)
        assert torch.equal(model.get_parameter(name), tensor[places[int(layer[1])]] if layer else tensor), name


@pytest.mark.parametrize("places", [REVERSED, REDUNDANT])
def test_an_expert_is_missed_where_it_has_a_place(uniform: Path, tmp_path: Path, places: list[int]) -> None:
    """By SGLang's loader; mixprec's compares all headers."""
    gone = "model.layers.1.mlp.experts.6.down_proj.scales"
    damaged = without(uniform, gone, tmp_path / "damaged")
    options: Any = {"ep_num_redundant_experts": len(places) - SHAPE.experts, "load_format": "safetensors"}
    with rank_of(1, 2, 2), experts_at([places] * SHAPE.layers):
        serve(damaged, **options)
    with (
        rank_of(0, 2, 2),
        experts_at([places] * SHAPE.layers),
        pytest.raises(RuntimeError, match=rf"{gone}.*not in its files"),
    ):
        serve(damaged, **options)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"enable_eplb": True, "tp_size": 2, "ep_size": 2}, "--enable-eplb moves experts to each other's places"),
        ({"ep_num_redundant_experts": 2}, "--ep-num-redundant-experts 2 needs places that any expert fits"),
        (
            {"init_expert_location": "file.json"},
            "--init-expert-location file.json puts experts into each other's places",
        ),
    ],
)
def test_layers_of_several_formats_are_named(folder: Path, arguments: dict[str, Any], why: str) -> None:
    out = folder / "one_mixed_layer"
    if not out.exists():
        build(sources(folder, SHAPE, VARIANTS), {"model.layers.1.mlp.experts.{0,1}.*": "fp8_block"}, out)
    with pytest.raises(RuntimeError) as told:
        make(out, **arguments)
    assert (
        f"{why}, and experts of model.layers.1.mlp.experts differ in format; leave it out, or build all experts of "
        "each of these layers in one format" in str(told.value)
    )
