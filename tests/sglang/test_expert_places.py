"""Experts at other places than in the checkpoint: ``--init-expert-location``, redundant experts, EPLB."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.serving import QWEN3_MOE
from support.sglang.harness import build, change_tensors, experts_at, make, parameters_of, rank_of, serve, sources

pytestmark = pytest.mark.usefixtures("sglang")

SHAPE = QWEN3_MOE.of(hidden=256, heads=4, kv_heads=2)
VARIANTS = ("bf16", "fp8_block", "gptq_int4")
REVERSED = [7, 6, 5, 4, 3, 2, 1, 0]
REDUNDANT = [3, 6, 5, 4, 1, 2, 3, 0, 7, 5]
"""Ten places: experts 3 and 5 have one on each of two ranks."""
MOVED = (
    "bf16", "fp8_block", "fp8_channel", "int8_channel", "int8_block", "gptq_int4", "gptq_int4_act", "gptq_int8",
    "awq_int4", "ct_int4", "ct_int8",
)  # fmt: skip
"""The formats of experts that are moved, each in a layer of its own."""
BEFORE = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]


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


@pytest.mark.parametrize("places", [REVERSED, REDUNDANT])
def test_each_rank_loads_the_experts_of_its_places(uniform: Path, places: list[int]) -> None:
    due, each = serve(uniform), len(places) // 2
    for rank in range(2):
        with rank_of(rank, 2, 2), experts_at([places] * SHAPE.layers):
            model = serve(uniform, ep_num_redundant_experts=len(places) - SHAPE.experts)
        for layer in range(SHAPE.layers):
            path = f"model.layers.{layer}.mlp.experts"
            held = parameters_of(model.get_submodule(path))
            for name, tensor in parameters_of(due.get_submodule(path)).items():
                if "sort_indices" not in name:  # made later
                    assert torch.equal(held[name], tensor[places[rank * each : (rank + 1) * each]]), (path, name)


@pytest.mark.parametrize("places", [REVERSED, REDUNDANT])
def test_an_expert_is_missed_where_it_has_a_place(uniform: Path, tmp_path: Path, places: list[int]) -> None:
    gone = "model.layers.1.mlp.experts.6.down_proj.scales"
    damaged = without(uniform, gone, tmp_path / "damaged")
    redundant = len(places) - SHAPE.experts
    with rank_of(1, 2, 2), experts_at([places] * SHAPE.layers):
        serve(damaged, ep_num_redundant_experts=redundant)
    with (
        rank_of(0, 2, 2),
        experts_at([places] * SHAPE.layers),
        pytest.raises(RuntimeError, match=rf"{gone}.*not in its files"),
    ):
        serve(damaged, ep_num_redundant_experts=redundant)


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


@pytest.fixture(scope="module")
def each_format(folder: Path) -> Path:
    """A checkpoint with a layer of experts in each format of :data:`MOVED`."""
    out = folder / "a_format_each_layer"
    if not out.exists():
        lines = {f"model.layers.{n}.mlp.experts.*": kind for n, kind in enumerate(MOVED) if kind != "bf16"}
        build(sources(folder, SHAPE.of(layers=len(MOVED)), MOVED), lines, out)
    return out


@pytest.fixture
def repacked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replaces Marlin's repacking, which needs a GPU, by another order of each expert's words."""
    from sglang.srt.hardware_backend.gpu.quantization import awq_kernels, gptq_kernels
    from sglang.srt.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16_moe as scheme

    def repack(words: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return words.roll(1, -1)

    for module, name in (
        (gptq_kernels, "gptq_marlin_moe_repack"),
        (awq_kernels, "awq_marlin_moe_repack"),
        (scheme, "gptq_marlin_moe_repack"),
    ):
        monkeypatch.setattr(module, name, repack)
    monkeypatch.setattr(scheme, "marlin_make_workspace", lambda *_: None)
    yield


def processed(checkpoint: Path, places: list[int]) -> Any:
    """A model with experts at ``places`` of one rank, as kernels take it."""
    layers = len(MOVED)
    with experts_at([places] * layers):
        model: Any = serve(checkpoint, ep_num_redundant_experts=len(places) - SHAPE.experts)
    for layer in model.model.layers:
        layer.mlp.experts.quant_method.process_weights_after_loading(layer.mlp.experts)
    return model


def move(model: Any, before: list[int], after: list[int]) -> None:
    """Has SGLang move the experts of all layers as its EPLB does, on one rank."""
    from sglang.srt.eplb import expert_location_updater

    def at(places: list[int]) -> Any:
        return SimpleNamespace(
            physical_to_logical_map_cpu=torch.tensor([places] * len(MOVED)), num_local_physical_experts=len(places)
        )

    expert_location_updater._update_expert_weights_raw(
        routed_experts_weights_of_layer=model.routed_experts_weights_of_layer,
        old_expert_location_metadata=at(before),
        new_expert_location_metadata=at(after),
        update_layer_ids=list(range(len(MOVED))),
        nnodes=1,
        rank=0,
    )


def test_moved_experts_are_those_of_a_load_at_the_new_places(each_format: Path, repacked: None) -> None:
    """Every parameter of every format, as kernels take it, bit for bit; layers of all formats in one call."""
    moved, due = processed(each_format, BEFORE), processed(each_format, REDUNDANT)
    move(moved, BEFORE, REDUNDANT)
    for kind, layer, wanted in zip(MOVED, moved.model.layers, due.model.layers, strict=True):
        found, expected = parameters_of(layer.mlp.experts), parameters_of(wanted.mlp.experts)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), (kind, name)


@pytest.mark.parametrize("kind", ["w4afp8", "fp8_tensor", "nvfp4", "mxfp4"])
def test_formats_that_do_not_move_are_named(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    from support.sglang.harness import Changed, server_args
    from support.sglang.layers import FORMATS

    from mixprec_runtime import hooks, launch

    layers = {"model.layers.3.mlp.experts": (FORMATS[kind],), "model.layers.4.mlp.experts": (FORMATS["gptq_int4"],)}
    config: Any = SimpleNamespace(expert_layers=layers)
    launch.check_moved_experts(hooks._unmoved(config))
    monkeypatch.setattr(launch, "server_args", lambda: Changed(server_args("dummy"), enable_eplb=True))
    said = rf"--enable-eplb .*{kind} experts of model\.layers\.3\.\S+ (have|share|were) "
    with pytest.raises(RuntimeError, match=said):
        launch.check_moved_experts(hooks._unmoved(config))
