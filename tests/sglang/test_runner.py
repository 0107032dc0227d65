"""``--moe-runner-backend``: given to the layers that take it; the others keep their own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from support.serving import QWEN3_MOE
from support.sglang.harness import build, groups_of, make, sources

pytestmark = pytest.mark.usefixtures("sglang")

SHAPE = QWEN3_MOE.of(hidden=256, heads=4, kv_heads=2, layers=5)
VARIANTS = ("bf16", "fp8_block", "fp8_channel", "gptq_int4")
LAYERS = {
    "model.layers.0.mlp.experts.*": "fp8_block",
    "model.layers.1.mlp.experts.*": "gptq_int4",
    "model.layers.2.mlp.experts.*": "fp8_block",
    "model.layers.2.mlp.experts.{1,3}.*": "gptq_int4",
    "model.layers.3.mlp.experts.*": "fp8_channel",
}
"""The last one is in BF16."""
OWN = {0: {"triton"}, 1: {"marlin"}, 2: {"triton", "marlin"}, 3: {"triton"}, 4: {"triton"}}
"""Layer -> the runners of its experts, if none is asked for."""


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    out = folder / "runners"
    if not out.exists():
        build(sources(folder, SHAPE, VARIANTS), LAYERS, out)
    return out


@pytest.fixture
def deep_gemm() -> Iterator[None]:
    """Has SGLang find DeepGEMM and its GPU."""
    from sglang.srt.layers import deep_gemm_wrapper
    from sglang.srt.layers.deep_gemm_wrapper import configurer

    with (
        patch.object(deep_gemm_wrapper, "ENABLE_JIT_DEEPGEMM", True),
        patch.object(configurer, "ENABLE_JIT_DEEPGEMM", True),
    ):
        yield


def runners(model: torch.nn.Module) -> dict[int, set[str]]:
    """Layer -> the runners of its experts."""
    layers = enumerate(model.get_submodule("model.layers"))
    return {number: {_runner(group) for group in groups_of(layer.mlp.experts)} for number, layer in layers}


def _runner(layer: Any) -> str:
    made = getattr(layer.quant_method, "runner", None) or layer.scheme.kernel.runner
    return str(made.runner_backend.value)


@pytest.mark.parametrize("runner", ["auto", "triton", "marlin"])
def test_a_runner_that_layers_have_anyway_changes_none(checkpoint: Path, runner: str) -> None:
    model, _ = make(checkpoint, moe_runner_backend=runner)
    assert runners(model) == OWN


def test_only_layers_in_block_fp8_get_deep_gemm(
    checkpoint: Path, deep_gemm: None, caplog: pytest.LogCaptureFixture
) -> None:
    from sglang.srt.layers.moe import get_moe_runner_backend

    caplog.set_level(logging.INFO, logger="mixprec_runtime.experts.runner")
    model, _ = make(checkpoint, moe_runner_backend="deep_gemm")
    assert runners(model) == {**OWN, 0: {"deep_gemm"}}
    assert get_moe_runner_backend().is_auto(), "other code of SGLang's must not find it"
    (line,) = [record.getMessage() for record in caplog.records if "--moe-runner-backend" in record.getMessage()]
    assert line == (
        "mixprec: --moe-runner-backend deep_gemm: model.layers.0.mlp.experts; others keep their own: "
        "model.layers.1.mlp.experts are gptq_int4, model.layers.2.mlp.experts are fp8_block and gptq_int4, "
        "model.layers.3.mlp.experts are fp8_channel, model.layers.4.mlp.experts are bf16"
    )


def test_weights_are_prepared_for_the_runner_of_their_layer(checkpoint: Path, deep_gemm: None) -> None:
    """SGLang asks once more after loading, when it brings scales into the form that DeepGEMM's runner takes."""
    from sglang.srt.layers.quantization import fp8

    asked: set[bool] = set()

    def note(*_: Any, use_deepgemm_runner: bool, **__: Any) -> None:
        asked.add(use_deepgemm_runner)

    model, _ = make(checkpoint, moe_runner_backend="deep_gemm")
    with patch.object(fp8, "requant_block_scale_ue8m0_for_deepgemm", note):
        experts: Any = [layer.mlp.experts for layer in model.get_submodule("model.layers")]
        experts[0].quant_method.process_weights_after_loading(experts[0])
        assert asked == {True}
        asked.clear()
        group = next(group for group in experts[2].groups if "Fp8" in type(group.quant_method).__name__)
        group.quant_method.process_weights_after_loading(group)
        assert asked == {False}


def test_a_runner_that_no_layer_takes_is_refused_by_their_names(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    without = {**LAYERS, "model.layers.0.mlp.experts.*": "gptq_int4"}
    out = build(sources(folder, SHAPE, VARIANTS), without, tmp_path / "out")
    with pytest.raises(RuntimeError) as told:
        make(out, moe_runner_backend="deep_gemm")
    assert str(told.value) == (
        "this checkpoint cannot be served with these arguments: --moe-runner-backend deep_gemm is for layers whose "
        "experts are all in FP8 with blocks of 128 x 128, and this checkpoint has none: "
        "model.layers.{0..1}.mlp.experts are gptq_int4, model.layers.2.mlp.experts are fp8_block and gptq_int4, "
        "model.layers.3.mlp.experts are fp8_channel, model.layers.4.mlp.experts are bf16; build one with such layers, "
        "or leave it out, and each gets its own"
    )
    with pytest.raises(RuntimeError, match="deep_gemm needs a GPU of compute capability"):
        make(checkpoint, moe_runner_backend="deep_gemm")


def test_what_the_runner_would_ignore_is_refused(checkpoint: Path, deep_gemm: None) -> None:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    init = FusedMoE.__init__

    def weighted(layer: Any, *args: Any, **kwargs: Any) -> None:
        init(layer, *args, **{**kwargs, "apply_router_weight_on_input": True})

    with (
        patch.object(FusedMoE, "__init__", weighted),
        pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: .* does not go with apply_router_weight_on_input"),
    ):
        make(checkpoint, moe_runner_backend="deep_gemm")


@pytest.mark.parametrize(
    ("target", "own", "found"),
    [
        ("deep_gemm", None, "deep_gemm"),
        ("auto", "deep_gemm", "deep_gemm"),
        ("triton", "auto", "auto"),
        ("auto", None, "auto"),
    ],
)
def test_a_draft_has_a_runner_of_its_own(deep_gemm: None, target: str, own: str | None, found: str) -> None:
    from sglang.srt.layers.moe.utils import get_moe_runner_backend, speculative_moe_backend_context
    from support.sglang.harness import publish, server_args

    from mixprec_build.formats.fp8 import Fp8
    from mixprec_build.formats.gptq import Gptq
    from mixprec_runtime.experts import runner

    block = Fp8("block", block=(128, 128))
    publish(server_args("dummy", moe_runner_backend=target, speculative_moe_runner_backend=own))
    try:
        with speculative_moe_backend_context():
            assert runner.settle({"model.layers.2.mlp.experts": [block]}, draft=True) == found
        with speculative_moe_backend_context():
            assert get_moe_runner_backend().is_auto()
        packed = {"model.layers.2.mlp.experts": [Gptq(4, 128, True, False, "gptq")]}
        if own == "deep_gemm":
            with pytest.raises(RuntimeError, match="experts are gptq_int4"):
                runner.settle(packed, draft=True)
        else:  # a draft need not take what was asked for the model
            runner.settle(packed, draft=True)
    finally:
        publish(server_args("dummy"))
