"""Experts of one layer in several formats: groups of SGLang's FusedMoE, with the CPU's reference arithmetic."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from itertools import combinations, permutations
from typing import Any

import pytest
import torch
from support.serving import quantize
from support.sglang.harness import Changed, publish, rank_of, run_python, server_args
from support.sglang.layers import (
    ACTIVATIONS,
    FORMATS,
    PREFIX,
    PROJECTIONS,
    limited_inputs,
    make_layer,
    mixed_config,
    reference,
    run,
    skip_unless_activated,
)

HIDDEN, INTERMEDIATE, TOP_K = 256, 128, 3


@pytest.fixture(autouse=True)
def cpu(sglang: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replaces SGLang's kernels by the CPU's reference."""
    from mixprec_runtime import native
    from mixprec_runtime.cpu import reference as stand_ins
    from mixprec_runtime.experts import method as experts

    for module in (experts, native, stand_ins):
        monkeypatch.setattr(module, "is_cpu", lambda: True)
    publish(server_args("dummy"))
    yield


def routed(tokens: int, experts: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations, routed ids (different ones for a token), and their weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:TOP_K] for _ in range(tokens)])
    return x, ids.to(torch.int32), torch.rand(tokens, TOP_K, generator=generator)


def layer_of(*groups: tuple[str, int], **options: Any) -> tuple[Any, Any]:
    sizes = {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "top_k": TOP_K, "dtype": torch.float32}
    return make_layer(groups, **{**sizes, **options})


def numbers(layer: Any) -> list[list[int]]:
    rows: list[list[int]] = layer.up_numbers.tolist()
    assert layer.down_numbers.tolist() == rows
    return rows


# Scales of GPTQ are stored in FP16, and `quantize` rounds them to BF16 where the layer keeps them.
def close(out: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((out - expected).abs().max() < 0.01 * expected.abs().max())


@pytest.mark.parametrize(("first", "second"), list(combinations(FORMATS, 2)))
def test_two_formats_compute_what_the_experts_stand_for(first: str, second: str) -> None:
    layer, weights = layer_of((first, 3), (second, 5))
    assert type(layer.quant_method).__name__ == "MixedExpertsMethod"
    x, ids, topk = routed(64, 8)
    out = run(layer, x, ids, topk)
    assert close(out, reference(x, ids, topk, weights))
    # With experts in another order the result is far off.
    swapped = {(7 - expert, shard): weight for (expert, shard), weight in weights.items()}
    assert not close(out, reference(x, ids, topk, swapped))


@pytest.mark.parametrize(("up", "down"), list(permutations(PROJECTIONS, 2)))
def test_gate_and_up_may_be_in_another_format_than_down(up: str, down: str) -> None:
    layer, weights = layer_of((f"{up}/{down}", 3), (up, 2), (f"{down}/{up}", 3))
    assert len(layer.groups) == 4
    x, ids, topk = routed(64, 8)
    ids[3] = -1
    assert close(run(layer, x, ids, topk), reference(x, ids, topk, weights))


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_a_group_of_one_projection_takes_no_memory_for_the_other(kind: str) -> None:
    """The memory before weights are loaded, and after they are processed."""
    other = "bf16" if kind != "bf16" else "fp8_block"
    both, one = bare_layer(mixed(kind, other), 2), bare_layer(mixed(f"{kind}/{other}", other), 2)
    up = {n: p.shape for n, p in both.groups[0].named_parameters() if n.startswith("w13_")}
    assert {n: p.shape for n, p in one.groups[0].named_parameters()} == up
    unseen = [value for name, value in vars(one.groups[0]).items() if name.startswith("w2_") and value is not None]
    assert unseen and sum(value.untyped_storage().nbytes() for value in unseen) < 100
    loaded, _ = layer_of((f"{kind}/{other}", 2), (other, 2))
    assert {name for name, _ in loaded.groups[0].named_parameters()} == {"w13_weight"}
    assert loaded.groups[0].w2_weight.shape == (2, HIDDEN, INTERMEDIATE)
    assert loaded.groups[0].w2_weight.untyped_storage().nbytes() < 100


NO_TRITON = {kind for kind, fmt in FORMATS.items() if fmt.experts_run_on != "Triton"}
ON_CUTLASS = {kind for kind, fmt in FORMATS.items() if fmt.experts_run_on == "CUTLASS"}
GATED = {kind for kind, fmt in FORMATS.items() if fmt.gated_experts_only}
# Each quantized format beside BF16, and beside one other.
PAIRS = [("bf16", kind) for kind in FORMATS if kind != "bf16"] + [("fp8_block", "gptq_int4"), ("nvfp4", "fp8_tensor")]


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_other_activations_and_experts_without_a_gate(first: str, second: str, name: str) -> None:
    skip_unless_activated(name)
    case = ACTIVATIONS[name]
    gated = case.options.get("is_gated", True)
    unfit = ON_CUTLASS | (set() if case.marlin else NO_TRITON) | (set() if gated else GATED)
    unfit |= {kind for kind, fmt in FORMATS.items() if case.name in fmt.expert_activations_refused}
    if unfit & {first, second}:
        with pytest.raises(ValueError, match=rf"{PREFIX}\.\w+ \(\w+\): (Marlin|SGLang's (kernel|method))"):
            layer_of((first, 3), (second, 5), **case.options)
        return
    layer, weights = layer_of((first, 3), (second, 5), **case.options)
    assert {group.w13_weight.shape[1] for group in layer.groups} == {INTERMEDIATE * (2 if gated else 1)}
    x, ids, topk = routed(64, 8)
    ids[3] = -1
    due = reference(x, ids, topk, weights, case.activate, weighted_inputs=case.weighted_inputs)
    assert close(run(layer, x, ids, topk), due)
    if not case.weighted_inputs:
        assert not close(due, reference(x, ids, topk, weights, weighted_inputs=True, activate=case.activate))


LIMITED = [
    ("bf16", "fp8_block"),
    ("deepseek_mxfp4", "fp8_block"),
    ("gptq_int4/fp8_block", "deepseek_mxfp4"),
    ("nvfp4",),
]


@pytest.mark.parametrize("kinds", LIMITED)
def test_outputs_of_gate_and_up_have_deepseek_v4s_limit(kinds: tuple[str, ...]) -> None:
    layer, weights = layer_of(*((kind, 8 // len(kinds)) for kind in kinds), swiglu_limit=0.5)
    assert {group.moe_runner_config.swiglu_limit for group in getattr(layer, "groups", [layer])} == {0.5}
    x, ids, topk = routed(64, 8)
    assert close(run(layer, x, ids, topk), reference(x, ids, topk, weights, limited_inputs(0.5)))
    assert not close(run(layer, x, ids, topk), reference(x, ids, topk, weights))


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind not in GATED])
def test_a_native_layer_without_a_gate(kind: str) -> None:
    """All experts in one format, by SGLang's own method."""
    case = ACTIVATIONS["relu2"]
    layer, weights = layer_of((kind, 8), **case.options)
    assert type(layer.quant_method).__name__ != "MixedExpertsMethod"
    assert layer.w13_weight.shape == (8, INTERMEDIATE, HIDDEN)
    x, ids, topk = routed(64, 8)
    assert close(run(layer, x, ids, topk), reference(x, ids, topk, weights, case.activate))


def test_ranks_without_a_gate_add_up_to_the_layer() -> None:
    """Under tensor parallelism, and under expert parallelism."""
    case = ACTIVATIONS["relu2"]
    groups = [("fp8_block", 2), ("bf16", 2), ("fp8_channel", 2), ("fp8_tensor", 2)]
    x, ids, topk = routed(32, 8)
    for ep in (1, 2):
        total = torch.zeros_like(x)
        for rank in range(2):
            with rank_of(rank, 2, ep):
                layer, weights = layer_of(*groups, intermediate=256, **case.options)
            local = ids if ep == 1 else torch.where(ids // 4 == rank, ids % 4, -1).to(torch.int32)
            total += run(layer, x, local, topk)
        assert close(total, reference(x, ids, topk, weights, case.activate))


def test_all_formats_in_any_order() -> None:
    kinds = list(FORMATS)
    layer, weights = layer_of(*[(kind, 1) for kind in [*kinds, *reversed(kinds)]])
    assert len(layer.groups) == len(kinds)
    x, ids, topk = routed(64, 12)
    assert close(run(layer, x, ids, topk), reference(x, ids, topk, weights))


@pytest.mark.parametrize("groups", [[("fp8_block", 3), ("gptq_int4", 5)], [("fp8_block/gptq_int4", 3), ("bf16", 5)]])
def test_a_layer_is_one_operation_to_torch_compile(groups: list[tuple[str, int]]) -> None:
    layer, _ = layer_of(*groups)
    x, ids, topk = routed(16, 8)
    operations = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        operations.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(lambda *given: run(layer, *given) + 1, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x, ids, topk), run(layer, x, ids, topk) + 1)
    operation = torch.ops.mixprec.mixed_experts.default
    assert operations == [operation, operator.add]
    torch.library.opcheck(operation, (x, topk, ids, PREFIX))


def test_groups_keep_their_kernels_under_torch_compile() -> None:
    """SGLang would replace kernels by code that torch.compile can trace, which does not skip ids of -1."""
    from sglang.srt.compilation.torch_compile_decoration import _to_torch

    layer, weights = layer_of(("bf16", 3), ("gptq_int4", 5))
    model = torch.nn.ModuleList([layer])
    native = layer.groups[0].quant_method
    before = native._forward_method
    _to_torch(model, reverse=False, num_tokens=1)
    assert native._forward_method == before
    x, ids, topk = routed(1, 8)
    assert close(run(layer, x, ids, topk), reference(x, ids, topk, weights))
    _to_torch(model, reverse=True, num_tokens=1)
    assert native._forward_method == before


def test_experts_are_numbered_within_their_group() -> None:
    layer, _ = layer_of(("gptq_int4", 1), ("fp8_block", 2), ("gptq_int4", 2), ("bf16", 1))
    assert numbers(layer) == [
        [0, -1, -1, 1, 2, -1, -1],
        [-1, 0, 1, -1, -1, -1, -1],
        [-1, -1, -1, -1, -1, 0, -1],
    ]


def test_bf16_and_fp16_experts_are_one_group() -> None:
    from mixprec_build.formats.dense import Dense
    from mixprec_runtime.config import MixPrecConfig

    assert Dense("F16").fuses_as == FORMATS["bf16"].fuses_as
    config = mixed_config(MixPrecConfig, ["bf16", "fp8_block", "bf16"])
    config._experts[PREFIX][2] = dict.fromkeys(config._experts[PREFIX][2], Dense("F16"))
    layer = bare_layer(config, 3)
    assert numbers(layer) == [[0, -1, 1, -1], [-1, 0, -1, -1]]


def test_ids_become_those_of_each_group() -> None:
    from mixprec_runtime.experts.routing import numbers_in_groups

    table = torch.tensor([[0, -1, 1, -1], [-1, 0, -1, -1]], dtype=torch.int32)
    ids = torch.tensor([[2, 1], [0, -1]])
    assert numbers_in_groups(ids, table).tolist() == [[[1, -1], [0, -1]], [[-1, 0], [-1, -1]]]


SORT = """
import torch
from mixprec_runtime.experts.routing import sort

generator = torch.Generator().manual_seed(0)
shapes = [(1, 8, 24), (3, 8, 24), (16, 8, 24), (15, 6, 40), (17, 8, 24), (300, 8, 40), (600, 8, 24), (4500, 8, 24)]
for tokens, top_k, experts in shapes:
    for blocks in ((8, 64, 16), (16, 16, 128), (64, 48, 16)):
        group_of = torch.randint(4, (experts,), generator=generator)  # 3: another rank's
        numbers = torch.full((3, experts + 1), -1, dtype=torch.int32)
        sizes = []
        for group in range(3):
            mine = (group_of == group).nonzero().flatten()
            numbers[group, mine] = torch.randperm(len(mine), generator=generator).int()
            sizes.append(len(mine))
        ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k].int()
        ids[group_of[ids] == 3] = -1
        if tokens == 300:
            ids = ids[:1].expand(300, -1)  # all to the same few
        for group, route in enumerate(sort(ids, numbers, sizes, blocks)):
            due = numbers[group, ids.long()].flatten()
            assert torch.equal(route.numbers, due) and route.block == blocks[group]
            assert not route.locks.any()
            count, where = route.count.item(), route.positions
            assert len(where) % route.block == 0 and count <= len(where)
            at = 0
            for expert in sorted(set(due.tolist()) - {-1}):
                its = (due == expert).nonzero().flatten().tolist()
                padded = -(-len(its) // route.block) * route.block
                assert sorted(where[at : at + len(its)].tolist()) == its
                assert (where[at + len(its) : at + padded] == ids.numel()).all()
                assert (route.experts[at // route.block : (at + padded) // route.block] == expert).all()
                at += padded
            assert count == at
"""


def test_ids_are_numbered_and_sorted_for_all_groups_at_once() -> None:
    """Compares with the documentation of SGLang's moe_align_block_size, in Triton's interpreter."""
    done = run_python(SORT, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


COMPILE = """
import inspect
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mixprec_runtime.experts import routing

dtypes = {"rows": "*bf16", "factor": "fp32"}
for kernel in (routing._sort_few, routing._sort_some, routing._count, routing._lay_out, routing._scatter, routing._sum):
    names = list(inspect.signature(kernel.fn).parameters)
    fixed = {name: 8 if name == "TOP_K" else 128 for name in names if name.isupper()}
    tensors = {"ids", "numbers", "out", "positions", "experts", "counts", "locks", "free", "found"}
    types = {name: dtypes.get(name, "*i32" if name in tensors else "i32") for name in names}
    if kernel is routing._sum:
        types["out"] = "*bf16"
    signature = types | dict.fromkeys(fixed, "constexpr")
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in fixed.items()})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
"""


def test_the_kernels_compile_for_hopper() -> None:
    """Compiles the kernels, since Triton's interpreter accepts code that its compiler does not."""
    done = run_python(COMPILE)
    assert done.returncode == 0, done.stderr


SUM = """
import torch
from mixprec_runtime.experts.routing import sum_rows

generator = torch.Generator().manual_seed(0)
for tokens, top_k, hidden in ((1, 8, 300), (5, 3, 64), (2, 8, 700), (130, 6, 520)):
    ids = torch.randint(-1, 12, (tokens, top_k), generator=generator)
    rows = torch.randn(tokens, top_k, hidden, generator=generator)
    rows[ids < 0] = torch.nan  # what memory held before
    due = rows.double().nan_to_num().sum(1) * 2.5
    torch.testing.assert_close(sum_rows(rows, ids, 2.5).double(), due, atol=1e-5, rtol=1e-5)
"""


def test_rows_of_experts_elsewhere_are_not_summed() -> None:
    done = run_python(SUM, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


def test_the_sum_of_many_groups_is_rounded_once() -> None:
    from mixprec_runtime.experts.routing import add_up

    # In BF16, 256 + 1 is rounded to 256.
    parts = [torch.full((4,), value, dtype=torch.bfloat16) for value in (256.0, 1.0, 1.0)]
    assert add_up(parts).tolist() == [258.0] * 4
    assert add_up(parts).dtype == torch.bfloat16
    assert add_up(parts[:1]).tolist() == [256.0] * 4


# Routing


@pytest.mark.parametrize("second", ["fp8_block", "gptq_int4"])
def test_no_tokens(second: str) -> None:
    layer, _ = layer_of(("bf16", 4), (second, 4))
    x, ids, topk = routed(1, 8)
    assert run(layer, x[:0], ids[:0], topk[:0]).shape == (0, HIDDEN)


def test_experts_of_other_ranks_are_left_out() -> None:
    layer, weights = layer_of(("fp8_block", 4), ("gptq_int4", 4))
    x, ids, topk = routed(32, 8)
    ids[::2, 0] = ids[5] = -1
    out = run(layer, x, ids, topk)
    assert close(out, reference(x, ids, topk, weights))
    assert out[5].abs().max() == 0


def test_a_token_may_go_to_one_group_only() -> None:
    layer, weights = layer_of(("fp8_block", 4), ("gptq_int4", 4))
    x, ids, topk = routed(8, 4)
    assert close(run(layer, x, ids, topk), reference(x, ids, topk, weights))


# Ranks


def bare_layer(config: Any, experts: int, **options: Any) -> Any:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    return FusedMoE(
        num_experts=experts,
        hidden_size=HIDDEN,
        intermediate_size=options.pop("intermediate", INTERMEDIATE),
        layer_id=0,
        top_k=TOP_K,
        params_dtype=torch.float32,
        quant_config=config,
        prefix=PREFIX,
        **options,
    )


def mixed(*kinds: str) -> Any:
    from mixprec_runtime.config import MixPrecConfig

    return mixed_config(MixPrecConfig, kinds)


def test_a_rank_holds_its_experts_formats_only() -> None:
    config = mixed("fp8_block", "gptq_int4", "gptq_int4", "bf16", "bf16", "gptq_int4")
    with rank_of(1, 2, 2):
        layer = bare_layer(config, 6)
    assert [group.quant_config.get_name() for group in layer.groups] == ["unquant", "gptq_marlin"]
    assert [group.num_local_experts for group in layer.groups] == [2, 1]
    assert numbers(layer) == [[0, 1, -1, -1], [-1, -1, 0, -1]]
    assert all((group.moe_ep_size, group.moe_ep_rank) == (1, 0) for group in layer.groups)


def test_ranks_add_up_to_the_layer() -> None:
    kinds = ["fp8_block", "gptq_int4", "gptq_int4/bf16", "bf16", "fp8_channel", "gptq_int4", "gptq_int8", "fp8_tensor"]
    whole, weights = layer_of(*[(kind, 1) for kind in kinds])
    x, ids, topk = routed(32, 8)
    total = torch.zeros_like(x)
    for rank in range(2):
        with rank_of(rank, 2, 2):
            layer, _ = layer_of(*[(kind, 1) for kind in kinds])
        local = torch.where(ids // 4 == rank, ids % 4, -1).to(torch.int32)
        total += run(layer, x, local, topk)
    torch.testing.assert_close(total, run(whole, x, ids, topk))
    assert close(total, reference(x, ids, topk, weights))


def test_tensor_parallel_ranks_add_up_to_the_layer() -> None:
    groups = [("fp8_block", 2), ("gptq_int4/fp8_block", 2), ("bf16", 1), ("fp8_channel", 2), ("fp8_tensor", 1)]
    whole, _ = layer_of(*groups, intermediate=256)
    x, ids, topk = routed(32, 8)
    total = torch.zeros_like(x)
    for rank in range(2):
        with rank_of(rank, 2):
            layer, _ = layer_of(*groups, intermediate=256)
        total += run(layer, x, ids, topk)
    torch.testing.assert_close(total, run(whole, x, ids, topk), rtol=1e-4, atol=1e-4)


# Placeholder parameters


def load_placeholder(layer: Any, name: str, tensor: torch.Tensor, shard: str, expert: int) -> None:
    door = layer._parameters[name]
    door.weight_loader(door, tensor, f"experts.{name}", shard_id=shard, expert_id=expert)


def test_a_placeholder_loads_one_expert_of_one_group() -> None:
    layer = bare_layer(mixed("fp8_block", "gptq_int4", "fp8_block", "gptq_int4"), 4)
    for group in layer.groups:
        for parameter in group.parameters():
            parameter.data.zero_()
    tensors, _ = quantize(torch.randn(INTERMEDIATE, HIDDEN), "gptq_int4")
    load_placeholder(layer, "w13_qweight", tensors["qweight"], "w3", 3)
    marlin = layer.groups[1].w13_qweight
    assert torch.equal(marlin[1, :, INTERMEDIATE:], tensors["qweight"])
    assert not marlin[0].any() and not marlin[1, :, :INTERMEDIATE].any()
    assert not any(parameter.float().any() for parameter in layer.groups[0].parameters())


@pytest.mark.parametrize(("expert", "name", "kind"), [(0, "w13_qweight", "fp8_block"), (1, "w2_weight", "gptq_int4")])
def test_a_tensor_of_another_format_stops_the_load(expert: int, name: str, kind: str) -> None:
    layer = bare_layer(mixed("fp8_block", "gptq_int4"), 2)
    with pytest.raises(ValueError, match=rf"{PREFIX}\.{expert} is declared {kind}.*{name}"):
        load_placeholder(layer, name, torch.zeros(1), "w2" if name.startswith("w2") else "w1", expert)


def test_placeholders_are_removed_after_loading() -> None:
    layer, _ = layer_of(("bf16", 1), ("fp8_block", 2))
    assert not dict(layer.named_parameters(recurse=False))
    assert {name.split(".")[0] for name, _ in layer.named_parameters()} == {"groups"}


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_fused_shared_experts": 1}, "start SGLang with --disable-shared-experts-fusion"),
        ({"no_combine": True}, "do not go with no_combine"),
    ],
)
def test_layers_that_groups_cannot_be(options: dict[str, Any], message: str) -> None:
    experts = 2 + options.get("num_fused_shared_experts", 0)
    with pytest.raises(ValueError, match=f"{PREFIX}: experts in several formats.*{message}"):
        bare_layer(mixed("fp8_block", "gptq_int4"), experts, **options)


def test_experts_with_biases_are_in_formats_that_have_them() -> None:
    with pytest.raises(
        ValueError, match=r"\(fp8_block\): mixprec serves experts with biases in MXFP4 and unquantized only"
    ):
        bare_layer(mixed("fp8_block", "bf16"), 2, gemm1_alpha=1.7, gemm1_clamp_limit=7.0, with_bias=True)


def test_layers_that_split_experts_cannot_be_in() -> None:
    with pytest.raises(ValueError, match=rf"{PREFIX}: experts whose gate and up.*with its activation \(gelu\)"):
        bare_layer(mixed("fp8_block/bf16", "bf16"), 2, activation="gelu")
    with pytest.raises(ValueError, match=r"with its activation \(relu2 without a gate\)"):
        bare_layer(mixed("fp8_block/bf16", "bf16"), 2, activation="relu2", is_gated=False)
    with pytest.raises(
        ValueError, match=r"cannot be in w4afp8, which SGLang has no kernels for one projection of; build"
    ):
        bare_layer(mixed("w4afp8/bf16", "bf16"), 2)
    kinds = PROJECTIONS[:9]
    with pytest.raises(
        ValueError, match="cannot be in more than 8 formats; build the checkpoint with the three in one format"
    ):
        bare_layer(mixed(*[f"{kind}/{kinds[0]}" for kind in kinds]), 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"enable_eplb": True}, "--enable-eplb"),
        ({"ep_num_redundant_experts": 2}, "--ep-num-redundant-experts"),
        ({"init_expert_location": "somewhere.json"}, "--init-expert-location"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"lora_paths": ["somewhere"]}, "--lora-paths"),
    ],
)
def test_arguments_that_groups_do_not_go_with(
    arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixprec_runtime import launch

    args = server_args("dummy")
    assert launch.mixed_problems(args, ["model.layers.0.mlp.experts"]) == []
    assert all(hasattr(args, name) for name in arguments), "SGLang has renamed it"
    monkeypatch.setattr(launch, "server_args", lambda: Changed(args, **arguments))
    with pytest.raises(RuntimeError, match=message):
        bare_layer(mixed("fp8_block", "gptq_int4"), 2)
    bare_layer(mixed("gptq_int4", "gptq_int4"), 2)
