"""Experts that SGLang's EPLB moves: every byte that kernels read of them, on one rank and between two."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from support.families import TINY
from support.gpt_oss import SMALL, tensors, write
from support.serving import QWEN3_MOE
from support.sglang.families import family_mix, skip_unless_made
from support.sglang.harness import (
    Changed,
    build,
    experts_at,
    make,
    parameters_of,
    rank_of,
    run_python,
    serve,
    server_args,
    sources,
)
from support.sglang.hopper import hopper
from support.sglang.layers import FORMATS
from support.sglang.movers import Task, update

from mixprec_build.formats.fp8 import Fp8

pytestmark = pytest.mark.usefixtures("sglang", "streams")

MOVED = (
    ("bf16", "fp8_block", "int8_channel", "gptq_int4", "awq_int4", "ct_int8", "nvfp4", "mxfp4"),
    ("fp8_channel", "fp8_tensor", "int8_block", "gptq_int4_act", "gptq_int8", "ct_int4", "ct_mxfp4", "ct_nvfp4"),
)
"""The formats of experts that are moved, each in a layer of its own, in two checkpoints."""
BEFORE = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
AFTER = [3, 6, 5, 4, 1, 2, 3, 0, 7, 5]
"""Ten places, five on each of two ranks: 0 and 1, then 3 and 5 are on both."""
SHAPE = QWEN3_MOE.of(hidden=256, heads=4, kv_heads=2, layers=len(MOVED[0]))


@pytest.fixture(scope="module", params=MOVED, ids=lambda kinds: kinds[0])
def kinds(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return request.param


def each_format(folder: Path, kinds: tuple[str, ...]) -> Path:
    """A checkpoint with a layer of experts in each format."""
    out = folder / f"a_format_each_layer-{kinds[0]}"
    if not out.exists():
        lines = {f"model.layers.{n}.mlp.experts.*": kind for n, kind in enumerate(kinds) if kind != "bf16"}
        build(sources(folder, SHAPE, dict.fromkeys(["bf16", *kinds])), lines, out)
    return out


@pytest.fixture
def repacked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replaces what a GPU does when weights are prepared: Marlin's repacking by another order of an expert's words."""
    from sglang.srt.hardware_backend.gpu.quantization import awq_kernels, gptq_kernels
    from sglang.srt.layers.quantization import fp8, marlin_utils_fp4, modelopt_quant, mxfp4_marlin_moe
    from sglang.srt.layers.quantization.compressed_tensors.schemes import compressed_tensors_wNa16_moe as scheme

    def repack(words: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return words.roll(1, -1)

    def repack_one(b_q_weight: torch.Tensor, **_: Any) -> torch.Tensor:
        return repack(b_q_weight)

    def quantize(values: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    for module, name, function in (
        (gptq_kernels, "gptq_marlin_moe_repack", repack),
        (awq_kernels, "awq_marlin_moe_repack", repack),
        (scheme, "gptq_marlin_moe_repack", repack),
        (scheme, "marlin_make_workspace", lambda *_: None),
        (marlin_utils_fp4, "gptq_marlin_repack", repack_one),
        (marlin_utils_fp4, "marlin_make_workspace", lambda *_: None),
        (modelopt_quant, "get_device_capability", lambda *_: (9, 0)),
        (modelopt_quant, "is_cuda", lambda: True),
        (modelopt_quant, "swizzle_blockscale", lambda scale: scale.new_empty(0)),
        (fp8, "scaled_fp8_quant", quantize),
    ):
        monkeypatch.setattr(module, name, function, raising=False)
    with hopper(mxfp4_marlin_moe):
        yield


def processed(checkpoint: Path, places: list[int], layers: int, **options: Any) -> Any:
    """A model with experts at ``places`` of all ranks, as kernels take it, and as a server is ready with it."""
    redundant = len(places) - len({*places})
    with experts_at([places] * layers):
        return ready(serve(checkpoint, ep_num_redundant_experts=redundant, **options))


def ready(model: Any) -> Any:
    """``model``, loaded, as a server has it that begins to answer."""
    from mixprec_runtime.experts import moves

    for layer in experts_of(model).values():
        layer.quant_method.process_weights_after_loading(layer)
    moves.take_present(model)
    return model


def experts_of(model: torch.nn.Module) -> dict[int, Any]:
    """The layers of experts, by their numbers."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    return {int(layer.layer_id): layer for layer in model.modules() if isinstance(layer, FusedMoE)}


def move(model: Any, before: list[int], after: list[int]) -> None:
    """Has SGLang move the experts of all layers as its EPLB does, on one rank."""
    update(Task(dict(model.routed_experts_weights_of_layer), before, after), 0, 1)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def tensors_below(found: Any, path: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors that code of SGLang and mixprec can read from an object: of attributes, and of closures."""
    if id(found) in seen:
        return
    seen.add(id(found))
    inner: dict[Any, Any] = {}
    if isinstance(found, torch.Tensor):
        yield path, found.detach()
    elif isinstance(found, dict):
        inner = found
    elif isinstance(found, list | tuple):
        inner = dict(enumerate(found))
    elif isinstance(found, FunctionType | MethodType | partial):
        inner = dict(enumerate(cell.cell_contents for cell in getattr(found, "__closure__", None) or ()))
        inner |= {name: getattr(found, name, None) for name in ("__self__", "func", "args", "keywords")}
    elif type(found).__module__.startswith(("sglang.", "mixprec_runtime.")):
        inner = getattr(found, "__dict__", {})
    for key, value in inner.items():
        yield from tensors_below(value, f"{path}.{key}", seen)


def assert_same(model: Any, due: Any) -> None:
    """Every tensor that belongs to every layer of experts, bit for bit."""
    wanted = experts_of(due)
    assert wanted
    for number, layer in experts_of(model).items():
        found, expected = (dict(tensors_below(one, "", set())) for one in (layer, wanted[number]))
        assert found.keys() == expected.keys() and parameters_of(layer)
        for name, tensor in expected.items():
            assert torch.equal(bits(found[name]), bits(tensor)), (number, name)


def test_moved_experts_are_those_of_a_load_at_the_new_places(
    folder: Path, kinds: tuple[str, ...], repacked: None
) -> None:
    """Every parameter of every format, as kernels take it, bit for bit; layers of all formats in one call."""
    checkpoint = each_format(folder, kinds)
    moved, due = (processed(checkpoint, places, SHAPE.layers) for places in (BEFORE, AFTER))
    move(moved, BEFORE, AFTER)
    assert_same(moved, due)


def test_two_ranks_move_experts_to_each_other(folder: Path, tmp_path: Path, repacked: None) -> None:
    """Two processes exchange the experts of all formats; each rank then has those of a load at its new places."""
    ranks, due = 2, []
    for rank in range(ranks):
        with rank_of(rank, ranks, ranks):
            before, after = (
                [processed(each_format(folder, kinds), places, SHAPE.layers) for kinds in MOVED]
                for places in (BEFORE, AFTER)
            )
        torch.save(
            [tuple(Task(dict(model.routed_experts_weights_of_layer), BEFORE, AFTER)) for model in before],
            tmp_path / f"{rank}.pt",
        )
        due.append([model.routed_experts_weights_of_layer for model in after])
    code = "import runpy; runpy.run_module('support.sglang.movers', run_name='__main__', alter_sys=True)"
    with ThreadPoolExecutor(ranks) as pool:
        running = [pool.submit(run_python, code, str(rank), str(ranks), str(tmp_path)) for rank in range(ranks)]
        for done in (future.result() for future in running):
            assert not done.returncode, done.stderr[-3000:]
    for rank, models in enumerate(due):
        for found, wanted in zip(torch.load(tmp_path / f"{rank}.moved.pt"), models, strict=True):
            assert found.keys() == dict(wanted).keys()
            for layer, expected in dict(wanted).items():
                for number, (tensor, other) in enumerate(zip(found[layer], expected, strict=True)):
                    assert torch.equal(bits(tensor), bits(other)), (rank, layer, number)


# Families

FAMILIES = ("qwen3_next", "qwen3_5_moe", "kimi_k2", "kimi_k25", "glm_moe_dsa", "mimo_v2", "bailing_moe")
"""Those of SGLang's classes that list their experts for EPLB, and are written otherwise than Qwen3's."""
UNLISTED = (
    "qwen2_moe", "qwen3_vl_moe", "glm4_moe", "minimax_m2", "step3p5", "ernie4_5_moe", "olmoe", "hunyuan", "phimoe",
)  # fmt: skip
"""Some of the others."""
TURNED = [1, 2, 3, 4, 5, 6, 7, 0]
_MOST_LAYERS = 5
IN_INT4 = {"*.experts.*": "int4", "*.layers.*.mlp.experts.{0..7}.*": "int4"}
"""All experts in one format, whatever the family's mix has."""


def of_family(folder: Path, name: str, places: list[int]) -> Any:
    skip_unless_made(name)
    options = TINY[name].options
    return processed(family_mix(folder, name, lines=IN_INT4), places, _MOST_LAYERS, **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_class_moves_the_weights_that_kernels_read(folder: Path, repacked: None, name: str) -> None:
    start = sorted(TURNED)
    moved, due = of_family(folder, name, start), of_family(folder, name, TURNED)
    move(moved, start, TURNED)
    assert_same(moved, due)


def test_a_list_from_before_weights_are_repacked_is_replaced(folder: Path, repacked: None) -> None:
    """Ling's class makes one when it loads (models/bailing_moe.py:1003): nothing reads the tensors in it."""
    from mixprec_runtime.experts import moves

    start, replaced = sorted(TURNED), moves.take_present
    with patch.object(moves, "take_present", lambda model: None):
        stale, due = of_family(folder, "bailing_moe", start), of_family(folder, "bailing_moe", TURNED)
    move(stale, start, TURNED)
    with pytest.raises(AssertionError):
        assert_same(stale, due)
    replaced(stale)
    move(stale, start, TURNED)
    assert_same(stale, due)


def test_biases_of_gpt_oss_move(tmp_path: Path, repacked: None) -> None:
    """A load at other places is that of a release with its experts in another order."""
    from mixprec_build.output.build import plan_recipe, run_plan

    before, after = [*range(SMALL.experts)], [1, 2, 3, 0]
    models = []
    for number, order in enumerate((before, after)):
        made = {name: array[order] if ".experts." in name else array for name, array in tensors().items()}
        release, recipe = write(tmp_path / f"release{number}", made), tmp_path / f"recipe{number}.yaml"
        recipe.write_text(f"model: {release}\n")
        run_plan(plan_recipe(recipe), recipe.with_suffix(""))
        models.append(ready(serve(recipe.with_suffix(""))))
    moved, due = models
    assert {"w13_weight_bias", "w2_weight_bias"} < parameters_of(experts_of(due)[0]).keys()
    move(moved, before, after)
    assert_same(moved, due)


def test_parameters_that_are_not_of_single_experts_are_named(folder: Path, repacked: None) -> None:
    from mixprec_runtime.experts import moves

    start = sorted(TURNED)
    model = of_family(folder, "bailing_moe", start)
    experts_of(model)[1].w13_input_scale = torch.nn.Parameter(torch.ones(1))
    with pytest.raises(
        RuntimeError, match=r"--enable-eplb .*layers\.1\.mlp\.experts\.w13_input_scale \[1\] is not .* 8 "
    ):
        moves.take_present(model)


def test_a_list_that_cannot_be_changed_is_refused() -> None:
    from mixprec_runtime.experts import moves

    class Model(torch.nn.Module):
        @property
        def routed_experts_weights_of_layer(self) -> dict[int, list[torch.Tensor]]:
            return {3: [torch.ones(2, 2)]}

    with pytest.raises(RuntimeError, match=r"other tensors than the weights of layers \[3\], .*class Model "):
        moves.take_present(Model())


EPLB = {"enable_eplb": True, "tp_size": 2, "ep_size": 2}


@pytest.mark.parametrize("name", UNLISTED)
def test_a_class_that_lists_no_experts_is_refused_before_weights_are_read(folder: Path, name: str) -> None:
    mix = family_mix(folder, name, lines=IN_INT4)
    kind = TINY[name].config["architectures"][0]
    with (
        rank_of(0, 2, 2),
        pytest.raises(RuntimeError, match=rf"--enable-eplb needs .*routed_experts_weights_of_layer, .*class {kind} "),
    ):
        make(mix, **TINY[name].options, **EPLB)


def test_a_file_of_places_is_refused_for_a_class_that_would_not_read_it(folder: Path, tmp_path: Path) -> None:
    mix = family_mix(folder, "olmoe", lines=IN_INT4)
    with pytest.raises(
        RuntimeError, match=r"--init-expert-location needs get_model_config_for_expert_location, .*Olmoe"
    ):
        make(mix, init_expert_location="file.json")


@pytest.mark.parametrize("options", [EPLB, {"init_expert_location": "file.json"}], ids=["eplb", "file"])
def test_both_are_refused_without_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """SGLang's routers ask for places where they run on a GPU (layers/moe/topk.py:1908); elsewhere they would not."""
    from mixprec_runtime.experts import moves

    monkeypatch.setattr(moves, "is_cpu", lambda: True)
    flag = "--enable-eplb" if options is EPLB else "--init-expert-location"
    with rank_of(0, 2, 2), pytest.raises(RuntimeError, match=rf"{flag} changes the places .* on a GPU only; leave it"):
        make(family_mix(folder, "kimi_k2", lines=IN_INT4), **options)


@pytest.mark.parametrize("moved", [True, False])
def test_a_server_that_is_ready_has_the_list(
    folder: Path, repacked: None, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    from mixprec_runtime import hooks, launch
    from mixprec_runtime.experts import moves

    with patch.object(moves, "take_present", lambda model: None):
        model = of_family(folder, "bailing_moe", sorted(TURNED))
    runner = SimpleNamespace(model=model, model_config=SimpleNamespace(quantization="mixprec"), device="cpu")
    for name in ("_check_repairs", "memory", "activity"):
        monkeypatch.setattr(hooks, name, Mock(drafts=list))
    monkeypatch.setattr(launch, "server_args", lambda: Changed(server_args("dummy"), enable_eplb=moved))
    hooks.ready(None, SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner)))
    listed = {t.data_ptr() for tensors in model.routed_experts_weights_of_layer.values() for t in tensors}
    assert ({layer.w13_qweight.data_ptr() for layer in experts_of(model).values()} <= listed) == moved


# Routers


@pytest.mark.parametrize("options", [EPLB, {"init_expert_location": "file.json"}], ids=["eplb", "file"])
@pytest.mark.parametrize("name", FAMILIES)
def test_routers_name_experts_by_their_places(folder: Path, name: str, options: dict[str, Any]) -> None:
    """Without DeepEP, too, where most of SGLang's classes before 0.5.23 do not ask for places."""
    from sglang.srt.eplb import expert_location_dispatch
    from sglang.srt.layers.moe import topk

    skip_unless_made(name)
    with rank_of(0, 2, 2):
        model, _ = make(family_mix(folder, name, lines=IN_INT4), **TINY[name].options, **options)
    layers = max(experts_of(model)) + 1
    # Each layer has places of its own.
    places = torch.stack([torch.tensor(TURNED).roll(layer) for layer in range(layers)])
    back = places.argsort(1)
    metadata = SimpleNamespace(
        logical_to_rank_dispatch_physical_map=back, logical_to_all_physical_map=back.unsqueeze(2),
        logical_to_all_physical_map_num_valid=torch.ones_like(back), num_physical_experts=len(TURNED),
    )  # fmt: skip
    given: list[Any] = []

    def select(hidden_states: torch.Tensor, *_: Any, **asked: Any) -> Any:
        given.append(asked["expert_location_dispatch_info"])
        return topk.StandardTopKOutput(hidden_states, hidden_states, hidden_states)

    x, ids = torch.zeros(4, 8), torch.randint(0, len(TURNED), (4, 2), generator=torch.Generator().manual_seed(0))
    experts = experts_of(model)
    blocks = [block for block in model.modules() if not {*experts.values()}.isdisjoint(block.children())]
    assert len(blocks) == len(experts)
    with (
        patch.object(expert_location_dispatch, "get_global_expert_location_metadata", lambda: metadata),
        patch.object(topk, "select_experts", select),
    ):
        for block, number in zip(blocks, experts, strict=True):
            (router,) = (child for child in block.children() if isinstance(child, topk.TopK))
            router(x, x)
            found = expert_location_dispatch.topk_ids_logical_to_physical(ids, given.pop())
            assert torch.equal(found, back[number][ids])
            assert torch.equal(places[number][found], ids)


def test_routers_of_drafts_are_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EPLB moves none of their experts."""
    from mixprec_runtime import launch
    from mixprec_runtime.experts import moves

    published, prepared = launch.server_args, Mock()
    monkeypatch.setattr(launch, "server_args", lambda: Changed(published(), speculative_algorithm="STANDALONE"))
    monkeypatch.setattr(moves, "prepare", prepared)
    model, _ = make(family_mix(folder, "olmoe", lines=IN_INT4))
    make(family_mix(folder, "olmoe", lines=IN_INT4), draft=True)
    assert [call.args for call in prepared.call_args_list] == [(model,)]


@pytest.mark.parametrize(
    ("version", "options", "refused"),
    [
        ("0.5.16", {"enable_eplb": True}, True),
        ("0.5.15.post1", {"init_expert_location": "file.json"}, True),
        ("0.5.16", {}, False),
        ("0.5.16", {"enable_eplb": True, "moe_a2a_backend": "deepep"}, False),
        ("0.5.17", {"enable_eplb": True}, False),
    ],
)
def test_copies_that_each_rank_chooses_by_itself_are_refused(
    monkeypatch: pytest.MonkeyPatch, version: str, options: dict[str, Any], refused: bool
) -> None:
    """Before 0.5.17, two ranks would both compute an expert that both have, and the sum would have it twice."""
    from mixprec_runtime import launch

    monkeypatch.setattr(launch, "installed", lambda: version)
    problems = launch.argument_problems(Changed(server_args("dummy"), ep_num_redundant_experts=2, **options))
    assert [problem.startswith("--ep-num-redundant-experts 2 makes copies") for problem in problems] == [True] * refused


# Formats

STATIC = Fp8("tensor", "static")


def test_formats_that_do_not_move_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixprec_runtime import hooks, launch

    for fmt in (FORMATS["w4afp8"], STATIC):
        layers = {"model.layers.3.mlp.experts": (fmt,), "model.layers.4.mlp.experts": (FORMATS["gptq_int4"],)}
        config: Any = SimpleNamespace(expert_layers=layers)
        launch.check_moved_experts(hooks._unmoved(config))
        with monkeypatch.context() as changed:
            changed.setattr(launch, "server_args", lambda: Changed(server_args("dummy"), enable_eplb=True))
            said = rf"--enable-eplb .*{fmt.kind} experts of model\.layers\.3\.\S+ share one scale of inputs"
            with pytest.raises(RuntimeError, match=said):
                launch.check_moved_experts(hooks._unmoved(config))


def test_every_other_format_of_experts_was_moved() -> None:
    from mixprec_runtime.formats.registry import served

    moved = {kind for kinds in MOVED for kind in kinds}
    for kind, fmt in FORMATS.items():
        assert (not served(fmt).unmovable(fmt)) == (kind != "w4afp8"), kind
    assert moved >= FORMATS.keys() - {"w4afp8", "fp8_e8m0_32", "deepseek_mxfp4"}
    assert served(STATIC).unmovable(STATIC)
