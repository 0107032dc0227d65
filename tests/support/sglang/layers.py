"""Single FusedMoE layers of SGLang's, made by mixprec without a model or server.

start_sglang()
layer, weights = make_layer([("fp8_block", 16), ("gptq_int4", 112)], hidden=2048, intermediate=768)
run(layer, x, ids, topk_weights)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from mixprec_build.checkpoint.declaration import Declaration
from mixprec_build.formats.awq import Awq
from mixprec_build.formats.dense import Dense
from mixprec_build.formats.fp8 import Fp8
from mixprec_build.formats.gptq import Gptq
from mixprec_build.formats.int8 import Int8
from mixprec_build.formats.mxfp4 import Mxfp4
from mixprec_build.formats.nvfp4 import Nvfp4
from mixprec_build.formats.packed import Packed
from mixprec_build.formats.w4afp8 import W4afp8
from mixprec_build.patterns.pattern import Pattern
from mixprec_runtime.loading.ledger import default_dtype
from support.serving import quantize

__all__ = [
    "ACTIVATIONS",
    "DEVICE",
    "FORMATS",
    "PREFIX",
    "PROJECTIONS",
    "limited_inputs",
    "make_layer",
    "mixed_config",
    "reference",
    "run",
    "silu_gate",
    "situ",
    "skip_unless_activated",
    "start_sglang",
    "swiglu",
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = {
    "bf16": Dense("BF16"),
    "fp8_block": Fp8("block", "dynamic", (128, 128)),
    "fp8_e8m0_32": Fp8("block", "dynamic", (32, 32), scale_fmt="ue8m0"),
    "fp8_channel": Fp8("channel"),
    "fp8_tensor": Fp8("tensor"),
    "int8_channel": Int8("channel"),
    "int8_block": Int8("block", "dynamic", (128, 128)),
    "gptq_int4": Gptq(4, 128, True, False, "gptq"),
    "gptq_int8": Gptq(8, 128, True, False, "gptq"),
    "awq_int4": Awq(128),
    "ct_int4": Packed(4, 128, True, False),
    "ct_int8": Packed(8, -1, True, False),
    "nvfp4": Nvfp4("modelopt", "static"),
    "ct_nvfp4": Nvfp4("compressed-tensors", "static"),
    "mxfp4": Mxfp4(),
    "ct_mxfp4": Mxfp4("weight_packed"),
    "deepseek_mxfp4": Mxfp4("weight", "I8", "scale", "F8_E8M0"),
    "w4afp8": W4afp8(),
}
PROJECTIONS = [kind for kind, fmt in FORMATS.items() if not fmt.experts_whole]
"""Formats that gate and up, or down, of an expert may be in alone."""
PREFIX = "model.layers.0.mlp.experts"
Weights = dict[tuple[int, str], torch.Tensor]
Activation = Callable[[torch.Tensor, "torch.Tensor | None"], torch.Tensor]
"""Gate and up (None where experts have no gate, and the first is up) -> what down multiplies."""
_SHARDS = ("w1", "w3", "w2")


def start_sglang(port: int = 29511) -> None:
    """Sets up what a layer needs: server arguments, and process groups of one rank."""
    import sglang.srt.server_args as arguments
    from sglang.srt.distributed import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.moe import initialize_moe_config

    args = arguments.ServerArgs(model_path="dummy", device=DEVICE)
    arguments.set_global_server_args_for_scheduler(args)
    init_distributed_environment(
        world_size=1,
        rank=0,
        local_rank=0,
        distributed_init_method=f"tcp://127.0.0.1:{port}",
        backend="nccl" if DEVICE == "cuda" else "gloo",
    )
    initialize_model_parallel(1)
    initialize_moe_config(args)


def make_layer(
    groups: Sequence[tuple[str, int]],
    *,
    hidden: int,
    intermediate: int,
    top_k: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    config: Any = None,
    seed: int = 0,
    **options: Any,
) -> tuple[torch.nn.Module, Weights]:
    """A loaded layer whose experts have these formats, in this order, and their dequantized weights in float32.

    ``config``: SGLang's own quantization config, for a layer without mixprec. ``options`` are of FusedMoE; with
    ``is_gated=False``, experts have ``w1`` and ``w2`` only.
    """
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    from mixprec_runtime.config import MixPrecConfig
    from mixprec_runtime.formats.registry import served

    # "fp8_block/gptq_int4": gate and up in the first format, down in the second.
    kinds = [kind for kind, count in groups for _ in range(count)]
    if config is None:
        config = mixed_config(MixPrecConfig, kinds)
    with torch.device(DEVICE), default_dtype(dtype):
        layer = FusedMoE(
            num_experts=len(kinds),
            hidden_size=hidden,
            intermediate_size=intermediate,
            layer_id=0,
            top_k=top_k,
            params_dtype=dtype,
            quant_config=config,
            prefix=PREFIX,
            inplace=False,
            **options,
        )
    weights: Weights = {}
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for expert, kind in enumerate(kinds):
        for shard, n, k in (("w1", intermediate, hidden), ("w3", intermediate, hidden), ("w2", hidden, intermediate)):
            if shard == "w3" and not options.get("is_gated", True):
                continue
            weight = torch.randn(n, k, generator=generator, device=DEVICE) / k**0.5
            ups, _, downs = kind.partition("/")
            of_part = (downs or ups) if shard == "w2" else ups
            tensors, weights[expert, shard] = quantize(weight, of_part)
            fmt = FORMATS[of_part]
            for leaf, tensor in tensors.items():
                name = f"{'w2' if shard == 'w2' else 'w13'}_{fmt.sglang_name(leaf)}"
                parameter, loaded = dict(layer.named_parameters())[name], served(fmt).as_loaded(fmt, leaf, tensor)
                parameter.weight_loader(parameter, loaded, f"experts.{name}", shard_id=shard, expert_id=expert)
    for module in list(layer.modules()):
        method = getattr(module, "quant_method", None)
        if method is not None:
            method.process_weights_after_loading(module)
    return layer, weights


def mixed_config(config: Any, kinds: Sequence[str]) -> Any:
    parts = ("gate_proj", "up_proj", "down_proj")
    rules = tuple(
        (Pattern(f"{PREFIX}.{expert}.{part}"), kind.split("/")[-1 if part == "down_proj" else 0])
        for expert, kind in enumerate(kinds)
        for part in parts
    )
    used = dict.fromkeys(["bf16", *(kind for _, kind in rules)])
    made = config(Declaration({kind: FORMATS[kind] for kind in used}, rules, "bf16"))
    made.bind([f"{PREFIX}.{expert}.{part}" for expert in range(len(kinds)) for part in parts])
    return made


def run(layer: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    topk = StandardTopKOutput(topk_weights=weights, topk_ids=ids, router_logits=x[:, :1])
    out = layer.quant_method.apply(layer, StandardDispatchOutput(x, None, topk))
    return out.hidden_states


def silu_gate(gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    """The activation of most models."""
    assert up is not None
    return torch.nn.functional.silu(gate) * up


def reference(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    dense: Weights,
    activate: Activation = silu_gate,
    *,
    weighted_inputs: bool = False,
) -> torch.Tensor:
    """The layer in float64.

    ``weighted_inputs``: the router's weights are those of inputs, not of outputs.
    """
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in ids.unique().tolist():
        if expert < 0:
            continue
        token, choice = (ids == expert).nonzero(as_tuple=True)
        h, weight = x[token].double(), weights[token, choice, None].double()
        if weighted_inputs:
            h, weight = h * weight, torch.ones_like(weight)
        w1, w3, w2 = (dense[expert, shard].double() if (expert, shard) in dense else None for shard in _SHARDS)
        assert w1 is not None and w2 is not None
        y = activate(h @ w1.t(), None if w3 is None else h @ w3.t()) @ w2.t()
        out.index_add_(0, token, y * weight)
    return out


def _limited(gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    assert up is not None
    return torch.nn.functional.silu(gate).clamp(max=0.5) * up.clamp(-0.5, 0.5)


def swiglu(alpha: float, limit: float) -> Activation:
    """That of gpt-oss and MiniMax-M3."""

    def activate(gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
        assert up is not None
        gate = gate.clamp(max=limit)
        return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1)

    return activate


def limited_inputs(limit: float) -> Activation:
    """DeepSeek-V4's activation."""

    def activate(gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
        assert up is not None
        return torch.nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)

    return activate


def situ(beta: float, linear_beta: float) -> Activation:
    """That of Kimi-K3."""

    def activate(gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
        assert up is not None
        return beta * torch.tanh(gate / beta) * torch.sigmoid(gate) * linear_beta * torch.tanh(up / linear_beta)

    return activate


def _gelu(gate: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    return torch.nn.functional.gelu(gate) * (1 if up is None else up)


def skip_unless_activated(name: str) -> None:
    """Skips a test where the installed SGLang lacks an activation: SiTU came with 0.5.17, as did Kimi-K3's class."""
    import pytest  # which benchmarks do without
    from sglang.srt.layers.moe.fused_moe_triton import fused_marlin_moe

    if name == "situ" and not hasattr(fused_marlin_moe, "situ_and_mul"):
        pytest.skip("this SGLang has no SiTU for experts")


class OtherActivation(NamedTuple):
    """An activation that is not gated SiLU, of experts that are computed format by format."""

    options: Mapping[str, Any]
    """Of FusedMoE."""
    activate: Activation
    weighted_inputs: bool = False
    marlin: bool = True
    """Whether Marlin computes it."""

    @property
    def name(self) -> str:
        """SGLang's name of it."""
        return str(self.options.get("activation", "silu"))


ACTIVATIONS: Mapping[str, OtherActivation] = {
    "relu2": OtherActivation({"activation": "relu2", "is_gated": False}, lambda up, _: torch.relu(up).square()),
    "silu without a gate": OtherActivation(
        {"activation": "silu", "is_gated": False}, lambda up, _: torch.nn.functional.silu(up)
    ),
    "gelu": OtherActivation({"activation": "gelu"}, _gelu, marlin=False),
    "swiglu with alpha and limit": OtherActivation(
        {"gemm1_alpha": 1.7, "gemm1_clamp_limit": 0.5, "gate_up_interleaved": False}, swiglu(1.7, 0.5)
    ),
    "situ": OtherActivation(
        {"activation": "situ", "gemm1_alpha": 1.5, "gemm1_clamp_limit": 0.7, "gate_up_interleaved": False},
        situ(1.5, 0.7),
    ),
    "silu with a limit": OtherActivation({"gemm1_clamp_limit": 0.5}, _limited, marlin=False),
    "weighted inputs": OtherActivation(
        {"apply_router_weight_on_input": True}, silu_gate, weighted_inputs=True, marlin=False
    ),
}
