"""Activations with constants, of MiniMax-M3's and Kimi-K3's experts, in every format: what SGLang's own method for the
format passes to its kernels, and what is refused when the layer is made, and by the plan."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.sglang.harness import publish, server_args
from support.sglang.layers import ACTIVATIONS, FORMATS, PREFIX, mixed_config, skip_unless_activated

from mixprec_build.families.kimi import KIMI_K3
from mixprec_build.families.minimax import MINIMAX_M3
from mixprec_build.formats.base import Format

EXPERTS, HIDDEN, INTERMEDIATE = 4, 256, 128
FAMILIES = {"swiglu with alpha and limit": MINIMAX_M3, "situ": KIMI_K3}
# test_mxfp4.py runs SGLang's runner for MXFP4; that of unquantized experts asks first whether there is a GPU.
KINDS = [kind for kind, fmt in FORMATS.items() if fmt.quantized and fmt.name != "MXFP4"]


@pytest.fixture(autouse=True)
def hopper(sglang: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has SGLang's methods find a GPU, which they then leave as they are."""
    from mixprec_runtime.cpu import reference

    publish(server_args("dummy"))
    monkeypatch.setattr(reference, "is_cpu", lambda: True)
    with reference.pretend_hopper():
        yield


def planned(fmt: Format, name: str) -> bool:
    """Whether a plan takes experts in ``fmt``."""
    activation = FAMILIES[name].activation
    fits = activation.limit_on(fmt.experts_run_on) is None
    return fits and activation.name not in fmt.expert_activations_refused


def experts_in(*kinds: str, **options: Any) -> Any:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    from mixprec_runtime.config import MixPrecConfig

    each = [kind for kind in kinds for _ in range(EXPERTS // len(kinds))]
    sizes = {"num_experts": EXPERTS, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "top_k": 2}
    config = mixed_config(MixPrecConfig, each)
    return FusedMoE(layer_id=0, params_dtype=torch.bfloat16, quant_config=config, prefix=PREFIX, **sizes, **options)


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The activation, alpha and limit of each call of Marlin's fused MoE, or of another runner."""
    from sglang.srt.layers.moe.fused_moe_triton import fused_marlin_moe
    from sglang.srt.layers.moe.moe_runner import MoeRunner
    from sglang.srt.layers.quantization import marlin_utils

    found: list[tuple[Any, ...]] = []
    run = MoeRunner.run

    def marlin(hidden_states: torch.Tensor, *_: Any, **given: Any) -> torch.Tensor:
        found.append((given.get("activation", "silu"), given.get("gemm1_alpha"), given.get("clamp_limit")))
        return hidden_states

    def run_or_tell(self: Any, dispatch_output: Any, *given: Any, **named: Any) -> Any:
        if self.runner_backend.is_marlin():
            return run(self, dispatch_output, *given, **named)
        found.append((self.config.activation, self.config.gemm1_alpha, self.config.gemm1_clamp_limit))
        return dispatch_output

    monkeypatch.setattr(fused_marlin_moe, "fused_marlin_moe", marlin)
    monkeypatch.setattr(marlin_utils, "marlin_make_workspace", lambda *_, **__: None)
    monkeypatch.setattr(MoeRunner, "run", run_or_tell)
    return found


def loaded(layer: Any) -> Any:
    """The layer with something for each weight that its method makes only after loading."""

    class Loaded(type(layer)):  # type: ignore[misc]
        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                if name.startswith(("w13_", "w2_")):
                    return torch.ones(1)
                raise

    layer.__class__ = Loaded
    return layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_format_passes_an_activation_on_or_is_refused(kind: str, name: str, passed: list[tuple[Any, ...]]) -> None:
    """In a layer of its own, and in one with unquantized experts."""
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    skip_unless_activated(name)
    options = ACTIVATIONS[name].options
    if not planned(FORMATS[kind], name):
        for kinds in ((kind,), ("bf16", kind)):
            with pytest.raises(
                ValueError, match=rf"{PREFIX}[\w.]* \({kind}\): SGLang's .* (has no situ|gated SiLU only)"
            ):
                experts_in(*kinds, **options)
        return
    layer = loaded(experts_in(kind, **options))
    assert experts_in("bf16", kind, **options).groups
    x, weights = torch.zeros(3, HIDDEN, dtype=torch.bfloat16), torch.rand(3, 2)
    topk = StandardTopKOutput(weights, torch.zeros(3, 2, dtype=torch.int32), weights)
    layer.quant_method.apply(layer, StandardDispatchOutput(x, None, topk))
    due = ACTIVATIONS[name].name, options["gemm1_alpha"], options["gemm1_clamp_limit"]
    assert passed == [due]


def test_a_plan_refuses_what_sglangs_method_for_nvfp4_does() -> None:
    """Of what Marlin runs."""
    from sglang.srt.layers.quantization.modelopt_quant import _SUPPORTED_ACT_STRS

    on_marlin = {case.name for case in ACTIVATIONS.values() if case.marlin}
    for kind in ("nvfp4", "ct_nvfp4"):
        assert on_marlin - {*_SUPPORTED_ACT_STRS} == FORMATS[kind].expert_activations_refused
