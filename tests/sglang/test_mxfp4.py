"""MXFP4 experts in SGLang's class for Marlin: what is repacked, what is multiplied, and what is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.serving import quantize
from support.sglang.harness import publish, server_args
from support.sglang.hopper import hopper
from support.sglang.layers import FORMATS, PREFIX, mixed_config

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
        return b_q_weight.clone()

    monkeypatch.setattr(marlin_utils_fp4, "gptq_marlin_repack", repack, raising=False)
    monkeypatch.setattr(marlin_utils_fp4, "marlin_make_workspace", lambda *_: None)
    with hopper(mxfp4_marlin_moe):
        yield


def experts_of(kind: str, **options: Any) -> Any:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    from mixprec_runtime.config import MixPrecConfig

    sizes = {"num_experts": EXPERTS, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "top_k": 2}
    config = mixed_config(MixPrecConfig, [kind] * EXPERTS)
    return FusedMoE(layer_id=0, params_dtype=torch.bfloat16, quant_config=config, prefix=PREFIX, **{**sizes, **options})


def load(layer: Any, kind: str) -> dict[tuple[int, str], dict[str, torch.Tensor]]:
    generator, stored = torch.Generator().manual_seed(0), {}
    for expert in range(EXPERTS):
        for shard in ("w1", "w3", "w2"):
            n, k = (HIDDEN, INTERMEDIATE) if shard == "w2" else (INTERMEDIATE, HIDDEN)
            # Scales of many sizes, in no order.
            spread = torch.rand(n, 1, generator=generator) * 20 - 10
            tensors, _ = quantize(torch.randn(n, k, generator=generator) * spread.exp2(), kind)
            stored[expert, shard] = tensors
            for leaf, tensor in tensors.items():
                name = f"{'w2' if shard == 'w2' else 'w13'}_{leaf}"
                parameter = layer._parameters[name]
                parameter.weight_loader(parameter, tensor, f"experts.{name}", shard_id=shard, expert_id=expert)
    return stored


@pytest.mark.parametrize("kind", KINDS)
def test_marlin_gets_the_bytes_of_every_layout(kind: str, kernels: None) -> None:
    from sglang.srt.layers.quantization.marlin_utils import marlin_permute_scales

    layer = experts_of(kind)
    assert type(layer.quant_method).__name__ == "Mxfp4MarlinMoEMethod"
    fmt: Any = FORMATS[kind]
    assert layer._parameters.keys() == {f"{w}_{leaf}" for w in ("w13", "w2") for leaf in (fmt.values, fmt.scales)}
    stored = load(layer, kind)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer._parameters.keys() == {"w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale"}
    for weight, shards in (("w13", ("w1", "w3")), ("w2", ("w2",))):
        values, scales = layer._parameters[f"{weight}_weight"], layer._parameters[f"{weight}_weight_scale"]
        assert values.dtype == torch.int32 and scales.dtype == torch.float8_e8m0fnu
        for expert in range(EXPERTS):
            codes = torch.cat([stored[expert, shard][fmt.values].view(torch.uint8) for shard in shards])
            assert torch.equal(values[expert], codes.contiguous().view(torch.int32).t())
            powers = torch.cat([stored[expert, shard][fmt.scales].view(torch.uint8) for shard in shards])
            n, groups = powers.shape
            due = marlin_permute_scales(powers.t().contiguous(), 32 * groups, n, 32)
            due = due.view(-1, 4)[:, [0, 2, 1, 3]].reshape(groups, n)
            assert torch.equal(scales[expert].view(torch.uint8), due)


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
        assert all(not count for name, count in values.items() if fmt.scales in name.split("_", 1)[1:])
