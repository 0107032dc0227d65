"""``--moe-a2a-backend deepep``: which class and config each layer gets. The exchange itself needs several GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.serving import DEEPSEEK, QWEN3_MOE
from support.sglang.harness import build, make, rank_of, serve, server_args, sources

pytestmark = pytest.mark.usefixtures("sglang")

SHAPE = QWEN3_MOE.of(hidden=256, heads=4, kv_heads=2, layers=3)
VARIANTS = ("bf16", "fp8_block", "fp8_channel", "gptq_int4")


@pytest.fixture
def deep_gemm() -> Iterator[None]:
    """Has SGLang find DeepGEMM, and make no buffers for an exchange."""
    from sglang.srt.layers import deep_gemm_wrapper
    from sglang.srt.layers.deep_gemm_wrapper import configurer
    from sglang.srt.layers.moe.fused_moe_triton import layer

    with ExitStack() as stack:
        for module in (deep_gemm_wrapper, configurer):
            stack.enter_context(patch.object(module, "ENABLE_JIT_DEEPGEMM", True))
        stack.enter_context(patch.object(layer, "create_moe_dispatcher", lambda *_, **__: dispatcher()))
        yield


def dispatcher() -> Any:
    """Takes what methods say of their rows."""
    made = SimpleNamespace(quant_config={})
    made.set_quant_config = lambda values: made.quant_config.update(values)
    return made


def built(folder: Path, name: str, lines: dict[str, str], shape: Any = SHAPE) -> Path:
    out = folder / f"deepep_{name}"
    if not out.exists():
        build(sources(folder, shape, VARIANTS), lines, out)
    return out


@pytest.fixture(scope="module")
def uniform(folder: Path) -> Path:
    """Experts of the first two layers in block FP8, of the last in BF16."""
    lines = {"model.layers.*.self_attn.*": "gptq_int4", "model.layers.{0,1}.mlp.experts.*": "fp8_block"}
    return built(folder, "uniform", lines)


def test_each_layer_is_of_sglangs_class_with_the_config_of_its_format(uniform: Path, deep_gemm: None) -> None:
    from sglang.srt.layers.moe.ep_moe.layer import DeepEPMoE
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    with rank_of(1, 2, 2):
        model, _ = make(uniform, moe_a2a_backend="deepep")
    due = {0: "Fp8MoEMethod", 1: "Fp8MoEMethod", 2: "UnquantizedFusedMoEMethod"}
    for number, layer in enumerate(model.get_submodule("model.layers")):
        experts: Any = layer.mlp.experts
        assert type(experts) is DeepEPMoE
        assert type(experts.quant_method).__name__ == due[number]
        assert experts.deprecate_flag, "DeepEPMoE would run code that asserts"
        assert experts.quant_method.runner.runner_backend.is_deep_gemm()
        assert isinstance(experts.quant_config, Fp8Config) == (number < 2)
        assert (experts.quant_config is None) == (number == 2)
        assert type(layer.self_attn.qkv_proj.quant_method).__name__ == "GPTQMarlinLinearMethod"
    assert DeepEPMoE.__init__.__module__ == "sglang.srt.layers.moe.ep_moe.layer", "it is left as it was"


def test_rows_of_experts_in_bf16_are_sent_in_bf16(uniform: Path, deep_gemm: None) -> None:
    with rank_of(0, 2, 2):
        model, _ = make(uniform, moe_a2a_backend="deepep")
    experts: Any = model.get_submodule("model.layers.2.mlp.experts")
    experts.quant_method.process_weights_after_loading(experts)
    assert experts.dispatcher.quant_config == {"dispatcher_output_dtype": "bf16"}


@pytest.mark.parametrize("load_format", ["auto", "safetensors"])
def test_weights_load_as_without(uniform: Path, deep_gemm: None, load_format: str) -> None:
    for rank in range(2):
        with rank_of(rank, 2, 2):
            due = dict(serve(uniform).named_parameters())
            held = dict(serve(uniform, load_format=load_format, moe_a2a_backend="deepep").named_parameters())
        assert due.keys() == held.keys()
        for name, tensor in held.items():
            assert torch.equal(tensor.view(torch.uint8), due[name].view(torch.uint8)), name


def test_shared_experts_that_each_rank_has_are_loaded(folder: Path, deep_gemm: None) -> None:
    """DeepSeek's, of which each rank has all with DeepEP, and a part without."""
    lines = {"model.layers.*.mlp.experts.*": "fp8_block", "model.layers.*.mlp.shared_experts.*": "fp8_block"}
    out = built(folder, "deepseek", lines, DEEPSEEK.of(layers=2))
    with rank_of(1, 2, 2):
        parts, whole = serve(out), serve(out, moe_a2a_backend="deepep")
    name = "model.layers.1.mlp.shared_experts.down_proj.weight"
    part, held = parts.get_parameter(name), whole.get_parameter(name)
    assert part.numel() * 2 == held.numel()
    assert torch.equal(held.chunk(2, dim=min(range(2), key=part.shape.__getitem__))[1].float(), part.float())


def test_layers_without_kernels_are_refused_by_name(folder: Path, deep_gemm: None) -> None:
    lines = {
        "model.layers.0.mlp.experts.*": "fp8_block",
        "model.layers.1.mlp.experts.*": "gptq_int4",
        "model.layers.2.mlp.experts.*": "fp8_block",
        "model.layers.2.mlp.experts.3.*": "bf16",
    }
    with pytest.raises(RuntimeError) as told:
        make(built(folder, "unfit", lines), moe_a2a_backend="deepep")
    assert str(told.value) == (
        "this checkpoint cannot be served with these arguments: --moe-a2a-backend deepep has kernels for layers whose "
        "experts are all in FP8 with blocks of 128 x 128, or all in BF16, and model.layers.1.mlp.experts are "
        "gptq_int4, model.layers.2.mlp.experts are bf16 and fp8_block; build these layers so, or leave it out (for a "
        "draft, with --speculative-moe-a2a-backend none)"
    )


def test_what_deepep_needs_is_asked_for(uniform: Path, deep_gemm: None) -> None:
    from sglang.srt.layers.deep_gemm_wrapper import configurer

    with pytest.raises(RuntimeError, match="--moe-runner-backend triton takes no rows from --moe-a2a-backend deepep"):
        make(uniform, moe_a2a_backend="deepep", moe_runner_backend="triton")
    with (
        patch.object(configurer, "ENABLE_JIT_DEEPGEMM", False),
        pytest.raises(RuntimeError, match="--moe-a2a-backend deepep needs DeepGEMM: a GPU of"),
    ):
        make(uniform, moe_a2a_backend="deepep")


def test_experts_that_deepep_would_lose_stop_the_server(uniform: Path, deep_gemm: None) -> None:
    """In FP16, which SGLang's class has no runner for."""
    with rank_of(0, 2, 2), pytest.raises(ValueError, match=r"layers\.2\.mlp\.experts: SGLang has no kernels for"):
        make(uniform, "float16", moe_a2a_backend="deepep")


def test_what_deep_gemm_would_ignore_is_refused(uniform: Path, deep_gemm: None) -> None:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    init = FusedMoE.__init__

    def limited(layer: Any, *args: Any, **kwargs: Any) -> None:
        init(layer, *args, **{**kwargs, "gemm1_clamp_limit": 7.0})

    with (
        rank_of(0, 2, 2),
        patch.object(FusedMoE, "__init__", limited),
        pytest.raises(
            ValueError, match=r"layers\.0\.mlp\.experts: --moe-a2a-backend deepep does not go with gemm1_clamp_"
        ),
    ):
        make(uniform, moe_a2a_backend="deepep")


def test_experts_are_not_counted_where_each_rank_routes_its_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from mixprec_runtime import launch

    monkeypatch.setattr(launch, "server_args", lambda: server_args("dummy", moe_a2a_backend="deepep"))
    with pytest.raises(RuntimeError, match="with --moe-a2a-backend deepep each routes its own"):
        launch.check_counted_experts()
