"""Replaces SGLang's kernels on machines without a GPU, for trying mixprec and for its tests.

SGLang's own methods create and load weights, as on a GPU. After loading, weights are dequantized by the formats'
reference arithmetic, to be multiplied in the model's dtype by activations that are not quantized.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from sglang.srt.layers.quantization import marlin_utils, modelopt_quant
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.utils import is_cpu
from torch.nn import Parameter

from mixprec_build.formats.base import Format

from . import delta_net

__all__ = ["announce", "pretend_hopper", "replace_model_kernels", "split_experts", "stand_in", "unquantized_experts"]


AsStored = Callable[[Any, dict[str, torch.Tensor], "list[int] | None"], tuple[Format, dict[str, torch.Tensor]]]
"""The method ``Served.as_stored``."""

_EIGHT_BITS = {torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn, torch.float8_e8m0fnu: ml_dtypes.float8_e8m0fnu}
"""Floats that torch cannot pass to numpy, with numpy's dtypes of their bytes."""

_ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu2": lambda x: F.relu(x).square(),
}


def announce(logger: logging.Logger) -> None:
    """Warns in the log that this server is for trying and testing only."""
    logger.warning(
        "mixprec: NO GPU. Weights are dequantized and multiplied by a reference implementation on the CPU: slow, "
        "uncompressed in memory, and not bit-equal to SGLang's GPU kernels. For trying and testing only."
    )


@contextmanager
def pretend_hopper() -> Iterator[None]:
    """On a CPU, has SGLang's configs for Marlin find a GPU of compute capability 9.0 while the context lasts."""
    if is_cpu():
        capability: Any = lambda *_: (9, 0)  # noqa: E731
        with (
            patch.object(marlin_utils, "get_device_capability", capability),
            patch.object(modelopt_quant, "get_device_capability", capability),
            patch.object(modelopt_quant, "is_cuda", lambda: True),
            # It pads and copies on a GPU; Marlin does not read what it makes.
            patch.object(modelopt_quant, "swizzle_blockscale", lambda scale: scale.new_empty(0)),
        ):
            yield
    else:
        yield


def stand_in(method: QuantizeMethodBase, fmt: Format, as_stored: AsStored, *, experts: bool) -> None:
    """Replaces the arithmetic of ``method`` and its processing after loading."""
    create = method.create_weights

    def create_weights(layer: Any, *args: Any, **kwargs: Any) -> None:
        if experts:
            layer.params_dtype = kwargs["params_dtype"]  # as linear layers do; 0.5.15's FusedMoE does not
        with pretend_hopper():
            create(layer, *args, **kwargs)

    method.create_weights = create_weights
    if experts:
        # 0.5.23 asks which runner was made; None is for methods without one.
        method.get_moe_runner_backend = lambda layer: None
        method.runner = None
        method.process_weights_after_loading = lambda layer: _dequantize_experts(layer, fmt, as_stored)
        method.create_moe_runner = lambda layer, config: setattr(method, "moe_runner_config", config)
        method.apply = _apply_experts
    else:
        method.process_weights_after_loading = lambda layer: _dequantize_linear(layer, fmt, as_stored)
        method.apply = lambda layer, x, bias=None: F.linear(x, layer.weight, bias)


def replace_model_kernels(model: torch.nn.Module) -> None:
    """Replaces Triton kernels that SGLang's models call also on a CPU: those of Qwen2-MoE and models built on it
    (``models/qwen2_moe.py:591`` of 0.5.17), and of norms behind gated delta nets, kernels without AMX. Llama 4's
    attention takes rotary embedding to change q and k in place (``models/llama4.py:336``), as on a GPU."""
    shared: set[Any] = {m.rotary_emb for m in model.modules() if type(m).__name__ == "Llama4Attention"}
    for rotary in shared - {None}:
        rotary.register_forward_hook(_in_place)
    for name, kernel, own in (
        ("sglang.srt.models.qwen2_moe", "fused_gate_sigmoid_mul_add", _add_gated),
        ("sglang.kernels.ops.attention.fla.layernorm_gated", "layernorm_fn", delta_net.gated_norm),
        ("sglang.kernels.ops.attention.fla.fused_norm_gate", "rms_norm_gated", delta_net.gated_norm_of_next),
        # In 0.5.15
        ("sglang.srt.layers.attention.fla.layernorm_gated", "layernorm_fn", delta_net.gated_norm),
        ("sglang.srt.layers.attention.fla.fused_norm_gate", "rms_norm_gated", delta_net.gated_norm_of_next),
    ):
        module = sys.modules.get(name)
        if module is not None:
            setattr(module, kernel, own)


def _in_place(_: Any, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Writes what rotary embedding makes of q and k into them."""
    for before, after in zip(inputs[1:], outputs, strict=True):
        before.copy_(after)


def _add_gated(x: torch.Tensor, gate: torch.Tensor, shared: torch.Tensor, total: torch.Tensor) -> None:
    """Adds the output of shared experts to that of routed ones, ``total [T, H]``, each token's by its gate ``[H]``."""
    weight = torch.sigmoid(x.float() @ gate.float()).unsqueeze(1)
    total.copy_(total.float() + weight * shared.float())


def unquantized_experts(own: UnquantizedFusedMoEMethod | None = None) -> FusedMoEMethodBase:
    """SGLang's method for dense experts, or ``own``, with the reference arithmetic, which skips ids of -1."""
    method = own or UnquantizedFusedMoEMethod()
    method.apply = _apply_experts
    return method


def _dequantize_linear(layer: Any, fmt: Format, as_stored: AsStored) -> None:
    """Replaces all parameters of a layer but the bias by a dense ``weight [N, K]``."""
    stored = {
        leaf: parameter.data
        for leaf, parameter in layer._parameters.items()
        if leaf != "bias" and parameter is not None and parameter.numel()
    }
    weight = _dequantize(*as_stored(fmt, stored, getattr(layer, "logical_widths", None)))
    for leaf in [leaf for leaf in layer._parameters if leaf != "bias"]:
        del layer._parameters[leaf]
    layer.register_parameter("weight", Parameter(weight.to(layer.params_dtype), requires_grad=False))


def _dequantize_experts(layer: Any, fmt: Format, as_stored: AsStored) -> None:
    """Replaces ``w13_*`` and ``w2_*`` ``[E, ...]`` by dense ``w13_weight [E, 2I, H]`` and ``w2_weight [E, H, I]``.

    ``w13`` is ``[E, I, H]`` where experts have no gate.
    """
    for weight, parts in (("w13", 2 if layer.moe_runner_config.is_gated else 1), ("w2", 1)):
        names = [name for name in layer._parameters if name.startswith(f"{weight}_") and name != f"{weight}_bias"]
        stored = {
            name.removeprefix(f"{weight}_"): parameter.data
            for name in names
            if (parameter := layer._parameters[name]) is not None and parameter.numel()
        }
        stored = {
            leaf: tensor.transpose(1, 2) if fmt.transposed_in_experts(leaf) else tensor
            for leaf, tensor in stored.items()
        }
        widths = None
        if "weight" in stored:
            widths = [stored["weight"].shape[1] // parts] * parts
        dense = torch.stack(
            [
                _dequantize(*as_stored(fmt, {leaf: tensor[expert] for leaf, tensor in stored.items()}, widths))
                for expert in range(layer.num_local_experts)
            ]
        )
        for name in names:
            del layer._parameters[name]
        layer.register_parameter(f"{weight}_weight", Parameter(dense.to(layer.params_dtype), requires_grad=False))


def _dequantize(fmt: Format, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The weight ``[N, K]``, float32, of modules that are joined along their outputs."""
    return torch.from_numpy(fmt.dequantize({leaf: _numpy(tensor) for leaf, tensor in tensors.items()}).copy())


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype in _EIGHT_BITS:
        return tensor.contiguous().view(torch.uint8).numpy().view(_EIGHT_BITS[tensor.dtype])
    return tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()


def _apply_experts(layer: Any, dispatch_output: Any) -> Any:
    """``apply`` of a FusedMoE in plain torch. Ids outside ``[0, num_local_experts)`` are skipped."""
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    out = _multiply(layer, dispatch_output, lambda expert: (layer.w13_weight[expert], layer.w2_weight[expert]))
    return StandardCombineInput(hidden_states=out)


def split_experts(layer: Any, dispatch_output: Any) -> torch.Tensor:
    """The output ``[tokens, hidden]`` of a layer that has experts with gate and up in another group than down."""

    def weight(expert: int, name: str, numbers: torch.Tensor) -> torch.Tensor:
        groups = [group for group in layer.groups if group.projection in ("", name)]
        places = zip(groups, numbers[:, expert].tolist(), strict=True)
        group, number = next(place for place in places if place[1] >= 0)
        found: torch.Tensor = getattr(group, f"{name}_weight")[number]
        return found

    def both(expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        return weight(expert, "w13", layer.up_numbers), weight(expert, "w2", layer.down_numbers)

    return _multiply(layer, dispatch_output, both)


def _multiply(
    layer: Any, dispatch_output: Any, weights_of: Callable[[int], tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """The weighted sum of experts, ``[tokens, hidden]``; ``weights_of(expert)`` returns ``[2I, H]`` and ``[H, I]``.

    The first is ``[I, H]`` where experts have no gate.

    ``routed_scaling_factor`` is not applied: on a CPU, models multiply by it themselves (deepseek_v2.py:1011).
    """
    x = dispatch_output.hidden_states
    weights, ids = dispatch_output.topk_output.topk_weights, dispatch_output.topk_output.topk_ids
    config, biases = layer.moe_runner_config, _biases(layer)
    total = torch.zeros(x.shape, dtype=torch.float32)
    for expert in range(layer.num_local_experts):
        token, choice = (ids == expert).nonzero(as_tuple=True)
        if token.numel():
            w13, w2 = weights_of(expert)
            inputs, weight = x[token], weights[token, choice, None]
            if config.apply_router_weight_on_input:
                inputs, weight = inputs * weight.to(x.dtype), torch.ones_like(weight)
            b13, b2 = (None if bias is None else bias[expert].to(x.dtype) for bias in biases)
            out = F.linear(_activated(F.linear(inputs, w13, b13), config), w2, b2)
            total.index_add_(0, token, out.float() * weight.float())
    return total.to(x.dtype)


def _biases(layer: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Those of ``w13`` and ``w2`` of all experts; the latter of the first rank only, since ranks' outputs are added."""
    found = layer._parameters
    w13, w2 = (found.get(f"{weight}_bias", found.get(f"{weight}_weight_bias")) for weight in ("w13", "w2"))
    return w13, None if getattr(layer, "moe_tp_rank", 0) else w2


def _activated(rows: torch.Tensor, config: Any) -> torch.Tensor:
    """``rows [T, 2I]``, or ``[T, I]`` where experts have no gate, activated to ``[T, I]`` as SGLang's Triton runner
    does (``moe_runner/triton_utils/fused_moe.py`` of 0.5.17)."""
    alpha, limit = config.gemm1_alpha, config.gemm1_clamp_limit
    if config.activation == "situ":  # Kimi-K3's, in float32, with betas as alpha and limit
        gate, up = rows.float().chunk(2, dim=-1)
        beta = 4.0 if alpha is None else alpha
        gate = beta * torch.tanh(gate / beta) * torch.sigmoid(gate)
        up = up if limit is None else limit * torch.tanh(up / limit)
        return (gate * up).to(rows.dtype)
    activation = _ACTIVATIONS[config.activation]
    if not config.is_gated:
        return activation(rows)
    alternate = alpha is not None and config.gate_up_interleaved
    gate, up = (rows[..., ::2], rows[..., 1::2]) if alternate else rows.chunk(2, dim=-1)
    if config.swiglu_limit is not None:
        gate, up = gate.clamp(max=config.swiglu_limit), up.clamp(-config.swiglu_limit, config.swiglu_limit)
    if limit is not None:
        up = up.clamp(-limit, limit)
    if alpha is not None:
        gate = gate.clamp(max=limit)
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    gate = activation(gate)
    return (gate if limit is None else gate.clamp(max=limit)) * up
