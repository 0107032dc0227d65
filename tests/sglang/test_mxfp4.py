"""MXFP4 experts in SGLang's class for Marlin: what is repacked, multiplied and activated; what is refused by name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.serving import quantize
from support.sglang.harness import publish, server_args
from support.sglang.hopper import hopper
from support.sglang.layers import (
    ACTIVATIONS,
    FORMATS,
    PREFIX,
    mixed_config,
    reference,
    silu_gate,
    skip_unless_activated,
)

pytestmark = pytest.mark.usefixtures("stage")

EXPERTS, HIDDEN, INTERMEDIATE = 2, 256, 192
KINDS = ("mxfp4", "ct_mxfp4", "deepseek_mxfp4")


@pytest.fixture
def stage(sglang: None) -> None:
    publish(server_args("dummy"))


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has SGLang find Hopper, and leave weights in their order where it repacks them."""
    from sglang.srt.layers.quantization import marlin_utils_fp4, mxfp4_marlin_moe

    def repack(b_q_weight: torch.Tensor, perm: torch.Tensor, size_k: int, size_n: int, num_bits: int) -> torch.Tensor:
        assert b_q_weight.shape == (size_k // 8, size_n) and num_bits == 4 and not perm.numel()
        return b_q_weight.clone().view(size_k // 16, 2 * size_n)  # the shape of what the kernel returns

    monkeypatch.setattr(marlin_utils_fp4, "gptq_marlin_repack", repack, raising=False)
    monkeypatch.setattr(marlin_utils_fp4, "marlin_make_workspace", lambda *_: None)
    with hopper(mxfp4_marlin_moe):
        yield


def experts_of(*kinds: str, **options: Any) -> Any:
    """A layer with experts in these formats, or in the one format."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    from mixprec_runtime.config import MixPrecConfig

    each = list(kinds) if len(kinds) > 1 else [*kinds] * EXPERTS
    sizes = {"num_experts": len(each), "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "top_k": 2}
    config = mixed_config(MixPrecConfig, each)
    return FusedMoE(layer_id=0, params_dtype=torch.bfloat16, quant_config=config, prefix=PREFIX, **{**sizes, **options})


def load(layer: Any, *kinds: str) -> dict[tuple[int, str], dict[str, torch.Tensor]]:
    generator, stored = torch.Generator().manual_seed(0), {}
    for expert in range(layer.num_experts):
        kind = kinds[expert % len(kinds)]
        for shard in ("w1", "w3", "w2"):
            n, k = (HIDDEN, INTERMEDIATE) if shard == "w2" else (INTERMEDIATE, HIDDEN)
            # Scales of many sizes, in no order.
            spread = torch.rand(n, 1, generator=generator) * 20 - 10
            tensors, _ = quantize(torch.randn(n, k, generator=generator) * spread.exp2(), kind)
            stored[expert, shard] = tensors
            for leaf, tensor in tensors.items():
                name = f"{'w2' if shard == 'w2' else 'w13'}_{FORMATS[kind].sglang_name(leaf)}"
                parameter = layer._parameters[name]
                parameter.weight_loader(parameter, tensor, f"experts.{name}", shard_id=shard, expert_id=expert)
    return stored


ALPHAS = {name: case.options for name, case in ACTIVATIONS.items() if "gemm1_alpha" in case.options}
"""MiniMax-M3's activation and Kimi-K3's."""


@pytest.mark.parametrize(
    ("kind", "options"),
    [(kind, {}) for kind in KINDS] + [("ct_mxfp4", options) for options in ALPHAS.values()],
    ids=[*KINDS, *ALPHAS],
)
def test_marlin_gets_the_bytes_of_every_layout(kind: str, options: dict[str, Any], kernels: None) -> None:
    """Rows of gate and up are two halves, whatever the activation."""
    skip_unless_activated(options.get("activation", "silu"))
    layer = experts_of(kind, **options)
    assert type(layer.quant_method).__name__ == "Mxfp4MarlinMoEMethod"
    fmt: Any = FORMATS[kind]
    names = {
        "weight",
        fmt.values,
        fmt.sglang_name(fmt.scales),
    }  # "weight" also where it is another name, for Kimi-K3's class
    assert layer._parameters.keys() == {f"{w}_{leaf}" for w in ("w13", "w2") for leaf in names}
    stored = load(layer, kind)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer._parameters.keys() == {"w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale"}
    for weight, shards in (("w13", ("w1", "w3")), ("w2", ("w2",))):
        values, scales = layer._parameters[f"{weight}_weight"], layer._parameters[f"{weight}_weight_scale"]
        assert values.dtype == torch.int32 and scales.dtype == torch.float8_e8m0fnu
        for expert in range(EXPERTS):
            codes = torch.cat([stored[expert, shard][fmt.values].view(torch.uint8) for shard in shards])
            assert torch.equal(values[expert].view(-1, len(codes)), codes.contiguous().view(torch.int32).t())
            powers = torch.cat([stored[expert, shard][fmt.scales].view(torch.uint8) for shard in shards])
            assert torch.equal(scales[expert].view(torch.uint8), permuted(powers.t().contiguous()))


def permuted(scales: torch.Tensor) -> torch.Tensor:
    """Scales ``[groups, N]`` in Marlin's order."""
    from sglang.srt.layers.quantization.marlin_utils import marlin_permute_scales

    groups, n = scales.shape
    return marlin_permute_scales(scales, 32 * groups, n, 32).view(-1, 4)[:, [0, 2, 1, 3]].reshape(groups, n)


def dense_of(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The weight ``[N, K]`` in float64, of values that ``kernels`` left in order and scales in Marlin's."""
    codes = values.view(-1, scales.shape[1]).t().contiguous().view(torch.uint8)
    powers = torch.empty(scales.shape, dtype=torch.uint8)
    order = permuted(torch.arange(powers.numel()).view(scales.shape))
    powers.view(-1)[order.flatten()] = scales.view(torch.uint8).flatten()
    fmt: Any = FORMATS["mxfp4"]
    stored = {"weight": codes.numpy(), "weight_scale": powers.t().contiguous().numpy()}
    return torch.from_numpy(fmt.dequantize(stored)).double()


@pytest.fixture
def runner(kernels: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """SGLang's own runner and ``fused_marlin_moe``, of which only kernels are replaced, by what they stand for.

    Yields the activations that ran.
    """
    from sglang.srt.layers.moe import fused_moe_triton
    from sglang.srt.layers.moe.fused_moe_triton import fused_marlin_moe as stock
    from sglang.srt.layers.quantization import marlin_utils

    ran: list[str] = []
    file = copied(stock)
    monkeypatch.setattr(stock, "fused_marlin_moe", file.fused_marlin_moe)

    def align(ids: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return ids, ids, ids

    def product(
        x: torch.Tensor, out: torch.Tensor, weight: torch.Tensor, _: Any, scales: torch.Tensor, *rest: Any,
        top_k: int, mul_topk_weights: bool, is_ep: bool, **__: Any,
    ) -> torch.Tensor:  # fmt: skip
        ids, topk_weights = rest[5].flatten(), rest[8].flatten()
        assert is_ep or (ids >= 0).all()  # without a map, the kernel reads before the weights for -1
        for row, expert in enumerate(ids.tolist()):
            if expert >= 0:
                value = dense_of(weight[expert], scales[expert]) @ x[row // top_k].double()
                out[row] = (value * topk_weights[row] if mul_topk_weights else value).to(out.dtype)
            elif mul_topk_weights:
                out[row] = 0
        return out

    def oai(x: torch.Tensor, alpha: float, beta: float, limit: float, out: torch.Tensor) -> None:
        ran.append("swiglu with alpha and limit")
        gate, up = x.double().chunk(2, -1)
        gate = gate.clamp(max=limit)
        out.copy_(gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + beta))

    def situ(out: torch.Tensor, x: torch.Tensor, situ_beta: float, linear_beta: float) -> None:
        ran.append("situ")
        gate, up = x.double().chunk(2, -1)
        up = linear_beta * torch.tanh(up / linear_beta)
        out.copy_(situ_beta * torch.tanh(gate / situ_beta) * torch.sigmoid(gate) * up)

    def silu(x: torch.Tensor, out: torch.Tensor) -> None:
        ran.append("silu")
        gate, up = x.double().chunk(2, -1)
        out.copy_(torch.nn.functional.silu(gate) * up)

    def add_up(rows: torch.Tensor, out: torch.Tensor, *_: Any) -> None:
        out.copy_(rows.double().sum(1))

    monkeypatch.setattr(fused_moe_triton, "moe_align_block_size", align)
    monkeypatch.setattr(marlin_utils, "marlin_make_workspace", lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(file, "get_scalar_type", lambda *_: None)
    for name, stand_in in (
        ("moe_wna16_marlin_gemm", product),
        ("silu_and_mul", silu),
        ("moe_sum_reduce", add_up),
        ("situ_and_mul", situ),
        ("swiglu_oai_split", oai),
        ("swiglu_gpt_oss_sigmoid_alpha_contiguous", lambda out, x, alpha, limit: oai(x, alpha, 1.0, limit, out)),
    ):
        monkeypatch.setattr(file, name, stand_in, raising=False)
    try:
        from sglang.kernels.ops.moe import moe_topk_sum
    except ImportError:  # before 0.5.17
        pass
    else:
        monkeypatch.setattr(moe_topk_sum, "moe_topk_sum", add_up)
    yield ran


def copied(file: ModuleType) -> ModuleType:
    """A copy of the module, whose functions are not operations of torch, which SGLang registers for CUDA only."""
    from sglang.srt.utils import custom_op

    spec = importlib.util.spec_from_file_location(f"{file.__name__}_of_a_test", str(file.__file__))
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    with patch.object(custom_op, "register_custom_op", lambda **_: lambda function: function):
        spec.loader.exec_module(copy)
    return copy


def routed(tokens: int, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.bfloat16)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :2].to(torch.int32)
    return x, ids, torch.rand(tokens, 2, generator=generator)


@pytest.mark.parametrize("kinds", [("ct_mxfp4",), ("ct_mxfp4", "mxfp4", "deepseek_mxfp4")], ids="+".join)
@pytest.mark.parametrize("name", ["silu", *ALPHAS])
def test_experts_are_activated_by_sglangs_runner_as_their_models_are(
    name: str, kinds: tuple[str, ...], runner: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone in their layer, and in groups of it; Kimi-K3's class offers memory for the layer's output."""
    from sglang.srt.layers.moe.fused_moe_triton import fused_marlin_moe
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    from mixprec_runtime.experts import chains

    skip_unless_activated(name)
    layer = experts_of(*kinds, **ALPHAS.get(name, {}))
    stored = load(layer, *kinds)
    for part in (*getattr(layer, "groups", ()), layer):
        part.quant_method.process_weights_after_loading(part)
    monkeypatch.setattr(chains, "of", lambda *_: chains.Chains([], []))  # with SiLU, they are computed together
    x, ids, weights = routed(5, layer.num_experts)
    given = StandardDispatchOutput(x, None, StandardTopKOutput(weights, ids, weights))
    offered = nullcontext()
    if hasattr(fused_marlin_moe, "zero_copy_context"):
        offered = fused_marlin_moe.zero_copy_context.set_moe_output(torch.empty_like(x))
    with offered:
        out = layer.quant_method.apply(layer, given).hidden_states
    dense = {}
    for (expert, shard), tensors in stored.items():
        fmt: Any = FORMATS[kinds[expert % len(kinds)]]
        found = {leaf: tensor.view(torch.uint8).numpy() for leaf, tensor in tensors.items()}
        dense[expert, shard] = torch.from_numpy(fmt.dequantize(found))
    due = reference(x, ids, weights, dense, ACTIVATIONS[name].activate if name in ALPHAS else silu_gate)
    assert ((out.double() - due).norm() / due.norm()).item() < 0.012
    assert runner == [name] * len(kinds)


@pytest.mark.parametrize(("in_router", "group"), [(False, False), (True, False), (True, True)])
def test_routed_scaling_is_applied_once(in_router: bool, group: bool, kernels: None) -> None:
    """SGLang's runner leaves it out for MXFP4 (fused_marlin_moe.py:418), whatever the router did."""
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardCombineInput, StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    layer = experts_of("ct_mxfp4", routed_scaling_factor=2.5)
    load(layer, "ct_mxfp4")
    layer.quant_method.process_weights_after_loading(layer)
    layer.should_fuse_routed_scaling_factor_in_topk = in_router
    if group:
        layer.virtual_rank = True
    passed = []

    def run(dispatch_output: Any, quant_info: Any, *_: Any, **__: Any) -> Any:
        passed.append(dispatch_output.topk_output.topk_weights)
        return StandardCombineInput(hidden_states=dispatch_output.hidden_states)

    layer.quant_method.runner = SimpleNamespace(run=run)
    x, weights = torch.zeros(3, HIDDEN, dtype=torch.bfloat16), torch.rand(3, 2)
    topk = StandardTopKOutput(weights, torch.zeros(3, 2, dtype=torch.int32), weights)
    layer.quant_method.apply(layer, StandardDispatchOutput(x, None, topk))
    assert torch.equal(passed[0], weights if in_router and not group else weights * 2.5)


def test_deepseeks_blocks_do_not_multiply_by_the_factor_again() -> None:
    """They do for SGLang's own class, whose runner has not."""
    from sglang.srt.layers.quantization.mxfp4_marlin_moe import Mxfp4MarlinMoEMethod
    from sglang.srt.models import deepseek_v2

    ours = experts_of("ct_mxfp4", routed_scaling_factor=2.5)
    stock = SimpleNamespace(
        quant_method=Mxfp4MarlinMoEMethod(None, ""), should_fuse_routed_scaling_factor_in_topk=False
    )
    routed, shared = torch.full((2, HIDDEN), 2.0), torch.full((2, HIDDEN), 3.0)
    for layer, factor in ((ours, 1.0), (stock, 2.5), (experts_of("ct_mxfp4"), 1.0)):
        add = deepseek_v2.maybe_fuse_routed_scale_and_shared_add
        assert torch.equal(add(layer, routed.clone(), shared.clone(), 2.5), factor * routed + shared)
        assert torch.equal(add(layer, routed.clone(), None, 2.5), factor * routed)


def test_sglangs_class_would_pad_what_cannot_be_loaded() -> None:
    """Shown on the class alone: 0.5.17 pads to 128 columns, and to 256 inputs, which its loader then cannot fill."""
    from sglang.srt.layers.quantization import mxfp4_marlin_moe

    layer: Any = torch.nn.Module()
    layer.hidden_size = 384
    sizes = {"num_experts": 1, "hidden_size": 384, "intermediate_size_per_partition": 192}
    method = mxfp4_marlin_moe.Mxfp4MarlinMoEMethod(None, "")
    method.create_weights(layer, params_dtype=torch.bfloat16, **sizes)
    assert layer.w13_weight.shape[2] == 256  # of 192
    ours = experts_of("mxfp4", hidden_size=384)
    assert ours.w13_weight.shape == (EXPERTS, 2 * INTERMEDIATE, 192)


@pytest.mark.parametrize(("hidden", "intermediate"), [(320, 128), (256, 96)])
def test_experts_that_marlin_has_no_kernel_for_are_refused(hidden: int, intermediate: int) -> None:
    with pytest.raises(ValueError, match=rf"experts \(mxfp4\): Marlin has no kernel .* {hidden} and {intermediate} "):
        experts_of("mxfp4", hidden_size=hidden, intermediate_size=intermediate)


def test_linears_are_refused_by_name() -> None:
    from sglang.srt.layers.linear import ReplicatedLinear

    from mixprec_runtime.native import NativeFormat

    with pytest.raises(ValueError, match=r"o_proj: SGLang has no kernel for linears in MXFP4"):
        ReplicatedLinear(256, 256, bias=False, quant_config=NativeFormat(FORMATS["mxfp4"]), prefix="o_proj")


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_gpus_are_refused_by_name(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    from mixprec_runtime.native import NativeFormat

    native, layer = NativeFormat(FORMATS["mxfp4"]), experts_of("mxfp4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    with pytest.raises(ValueError, match=r"experts: on this GPU SGLang runs MXFP4 on no kernel"):
        native.get_quant_method(layer, PREFIX)


def test_memory_counts_two_weights_a_byte() -> None:
    from mixprec_runtime.formats.registry import served

    for kind in KINDS:
        fmt: Any = FORMATS[kind]
        layer = experts_of(kind)
        values = {n: served(fmt).values_in(n, p, fmt) for n, p in layer.named_parameters()}
        assert sum(values.values()) == EXPERTS * 3 * HIDDEN * INTERMEDIATE
        assert all(not count for name, count in values.items() if "scale" in name)
