"""Experts of one layer in several formats: SGLang's FusedMoE, grouped by mixprec, with the arithmetic of a CPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Changed, publish, rank_of, run_python, server_args
from serving import quantize

sys.path.append(str(Path(__file__).parents[1] / "gpu"))
from layers import FORMATS, PREFIX, make_layer, mixed_config, reference, run

HIDDEN, INTERMEDIATE, TOP_K = 256, 128, 3


@pytest.fixture(autouse=True)
def cpu(sglang: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-ins for SGLang's kernels are in use."""
    from mixprec_runtime import experts, native
    from mixprec_runtime import reference as stand_ins

    for module in (experts, native, stand_ins):
        monkeypatch.setattr(module, "is_cpu", lambda: True)
    publish(server_args("dummy"))
    yield


def routed(tokens: int, experts: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations, experts that differ within a token, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:TOP_K] for _ in range(tokens)])
    return x, ids.to(torch.int32), torch.rand(tokens, TOP_K, generator=generator)


def layer_of(*groups: tuple[str, int], **options: Any) -> tuple[Any, Any]:
    sizes = {"hidden": HIDDEN, "intermediate": INTERMEDIATE, "top_k": TOP_K, "dtype": torch.float32}
    return make_layer(groups, **{**sizes, **options})


def numbers(layer: Any) -> list[list[int]]:
    rows: list[list[int]] = layer.group_numbers.tolist()
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
    # Were a group's experts in another order, or left out, it would be far off.
    swapped = {(7 - expert, shard): weight for (expert, shard), weight in weights.items()}
    assert not close(out, reference(x, ids, topk, swapped))


def test_all_formats_in_any_order() -> None:
    kinds = list(FORMATS)
    layer, weights = layer_of(*[(kind, 1) for kind in [*kinds, *reversed(kinds)]])
    assert len(layer.groups) == len(kinds)
    x, ids, topk = routed(64, 12)
    assert close(run(layer, x, ids, topk), reference(x, ids, topk, weights))


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
    from mixprec_runtime.routing import numbers_in_groups

    table = torch.tensor([[0, -1, 1, -1], [-1, 0, -1, -1]], dtype=torch.int32)
    ids = torch.tensor([[2, 1], [0, -1]])
    assert numbers_in_groups(ids, table).tolist() == [[[1, -1], [0, -1]], [[-1, 0], [-1, -1]]]


ALIGN = """
import torch
from mixprec_runtime.routing import align

generator = torch.Generator().manual_seed(0)
numbers = torch.full((25,), -1, dtype=torch.int32)
numbers[5:15] = torch.randperm(10, generator=generator)
for tokens, block in ((1, 8), (1, 16), (3, 8), (16, 8), (16, 16), (15, 64)):
    ids = torch.rand(tokens, 24, generator=generator).argsort(1)[:, :8].int()
    ids[0, :: tokens + 1] = -1
    out = torch.empty_like(ids)
    positions, experts, count = align(ids, numbers, out, block)
    due = numbers[ids.long()]
    assert torch.equal(out, due)
    padded, of_blocks = [], []
    for expert in due.unique().tolist():
        its = (due.flatten() == expert).nonzero().flatten().tolist()
        blocks = -(-len(its) // block)
        padded += its + [ids.numel()] * (blocks * block - len(its))
        of_blocks += [expert] * blocks
    assert count.tolist() == [len(padded)]
    assert positions[: len(padded)].tolist() == padded and experts[: len(of_blocks)].tolist() == of_blocks
"""


def test_few_ids_are_numbered_and_sorted_at_once() -> None:
    """As SGLang's moe_align_block_size documents its result; the Triton kernel is interpreted here."""
    done = run_python(ALIGN, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


SUM = """
import torch
from mixprec_runtime.routing import Unsummed, sum_rows

generator = torch.Generator().manual_seed(0)
for groups, tokens, top_k, hidden in ((1, 1, 8, 300), (2, 5, 3, 64), (3, 2, 8, 700), (4, 130, 6, 520)):
    numbers = torch.full((groups, 13), -1, dtype=torch.int32)
    home = torch.randint(groups + 1, (12,), generator=generator)  # some experts are another rank's
    for expert, group in enumerate(home.tolist()):
        if group < groups:
            numbers[group, expert] = expert
    ids = torch.rand(tokens, 12, generator=generator).argsort(1)[:, :top_k].int()
    ids[-1, 0] = -1
    rows = torch.randn(groups, tokens, top_k, hidden, generator=generator)
    mine = numbers[:, ids.long()] >= 0
    rows[~mine] = torch.nan  # what memory held before
    for factors in ([2.5] * groups, [2.5, *[1.0] * (groups - 1)]):
        given = []
        for one, factor in zip(rows, factors):
            given.append(Unsummed())
            given[-1].rows, given[-1].factor = one, factor
        due = (rows.double().nan_to_num() * torch.tensor(factors).double()[:, None, None, None]).sum((0, 2))
        torch.testing.assert_close(sum_rows(given, ids, numbers).double(), due, atol=1e-5, rtol=1e-5)
"""


def test_rows_are_summed_from_the_group_they_are_of() -> None:
    done = run_python(SUM, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


UNSUMMED = """
import torch
from sglang.srt.layers.moe.fused_moe_triton import fused_marlin_moe
from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe
from mixprec_runtime.routing import Unsummed

names = ("moe_sum_reduce", "moe_sum_reduce_triton", "moe_sum_reduce_torch_compile")
found = [(module, name) for module in (fused_marlin_moe, fused_moe) for name in names if hasattr(module, name)]
assert {module for module, _ in found} == {fused_moe} or len(found) > 3
before = [getattr(*place) for place in found]
rows, out = torch.ones(2, 3, 4), torch.zeros(2, 4)
for place in found:
    with Unsummed() as kept:
        getattr(*place)(rows, out, 2.0)
    assert kept.rows is rows and kept.factor == 2.0 and not out.any()
assert [getattr(*place) for place in found] == before
"""


def test_sglangs_runners_keep_what_they_would_sum() -> None:
    done = run_python(UNSUMMED)
    assert done.returncode == 0, done.stderr


def test_the_sum_of_many_groups_is_rounded_once() -> None:
    from mixprec_runtime.routing import add_up

    # In BF16, 256 + 1 is 256 again: twice.
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
    kinds = ["fp8_block", "gptq_int4", "gptq_int4", "bf16", "fp8_channel", "gptq_int4", "gptq_int8", "fp8_tensor"]
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
    groups = [("fp8_block", 2), ("gptq_int4", 2), ("bf16", 1), ("fp8_channel", 2), ("fp8_tensor", 1)]
    whole, _ = layer_of(*groups, intermediate=256)
    x, ids, topk = routed(32, 8)
    total = torch.zeros_like(x)
    for rank in range(2):
        with rank_of(rank, 2):
            layer, _ = layer_of(*groups, intermediate=256)
        total += run(layer, x, ids, topk)
    torch.testing.assert_close(total, run(whole, x, ids, topk), rtol=1e-4, atol=1e-4)


# Doors


def open_door(layer: Any, name: str, tensor: torch.Tensor, shard: str, expert: int) -> None:
    door = layer._parameters[name]
    door.weight_loader(door, tensor, f"experts.{name}", shard_id=shard, expert_id=expert)


def test_a_door_leads_to_one_expert_of_one_group() -> None:
    layer = bare_layer(mixed("fp8_block", "gptq_int4", "fp8_block", "gptq_int4"), 4)
    for group in layer.groups:
        for parameter in group.parameters():
            parameter.data.zero_()
    tensors, _ = quantize(torch.randn(INTERMEDIATE, HIDDEN), "gptq_int4")
    open_door(layer, "w13_qweight", tensors["qweight"], "w3", 3)
    marlin = layer.groups[1].w13_qweight
    assert torch.equal(marlin[1, :, INTERMEDIATE:], tensors["qweight"])
    assert not marlin[0].any() and not marlin[1, :, :INTERMEDIATE].any()
    assert not any(parameter.float().any() for parameter in layer.groups[0].parameters())


@pytest.mark.parametrize(("expert", "name", "kind"), [(0, "w13_qweight", "fp8_block"), (1, "w2_weight", "gptq_int4")])
def test_a_tensor_of_another_format_stops_the_load(expert: int, name: str, kind: str) -> None:
    layer = bare_layer(mixed("fp8_block", "gptq_int4"), 2)
    with pytest.raises(ValueError, match=rf"{PREFIX}\.{expert} is declared {kind}.*{name}"):
        open_door(layer, name, torch.zeros(1), "w2" if name.startswith("w2") else "w1", expert)


def test_doors_close_after_loading() -> None:
    layer, _ = layer_of(("bf16", 1), ("fp8_block", 2))
    assert not dict(layer.named_parameters(recurse=False))
    assert {name.split(".")[0] for name, _ in layer.named_parameters()} == {"groups"}


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_fused_shared_experts": 1}, "start SGLang with --disable-shared-experts-fusion"),
        ({"apply_router_weight_on_input": True}, "do not go with apply_router_weight_on_input"),
        ({"no_combine": True}, "do not go with no_combine"),
        ({"with_bias": True}, "do not go with biases"),
    ],
)
def test_layers_that_groups_cannot_be(options: dict[str, Any], message: str) -> None:
    experts = 2 + options.get("num_fused_shared_experts", 0)
    with pytest.raises(ValueError, match=f"{PREFIX}: experts in several formats.*{message}"):
        bare_layer(mixed("fp8_block", "gptq_int4"), experts, **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"moe_runner_backend": "triton"}, "--moe-runner-backend triton is one kernel for all formats"),
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
    assert launch.mixed_problems(args) == []
    assert all(hasattr(args, name) for name in arguments), "SGLang has renamed it"
    monkeypatch.setattr(launch, "_server_args", lambda: Changed(args, **arguments))
    with pytest.raises(RuntimeError, match=message):
        bare_layer(mixed("fp8_block", "gptq_int4"), 2)
    bare_layer(mixed("gptq_int4", "gptq_int4"), 2)
