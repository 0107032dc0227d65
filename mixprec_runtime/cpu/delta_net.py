"""Kernels of gated delta nets (linear attention of Qwen3.5 and Qwen3-Next) in plain torch, for SGLang's CPU engine.

On a CPU, SGLang takes these from sgl_kernel's library for processors with AMX. One that is installed is left alone.
States are those of SGLang's pool: ``conv_states [slots, channels, width - 1]`` and ``ssm_states [slots, heads, V, K]``,
float32; they are updated in place. ``H`` counts the heads of queries and keys, ``HV`` those of values.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["gated_norm", "gated_norm_of_next", "provide_kernels"]

Tensor = torch.Tensor

_GATES: Mapping[str, Callable[[Tensor], Tensor]] = {"swish": F.silu, "silu": F.silu, "sigmoid": torch.sigmoid}


def provide_kernels() -> None:
    """Defines the kernels where this process has none, before SGLang imports them by name."""
    try:
        importlib.import_module("sgl_kernel.mamba")
    except ImportError:
        module: Any = types.ModuleType("sgl_kernel.mamba")
        module.causal_conv1d_fn_cpu = convolve
        module.causal_conv1d_update_cpu = convolve_one
        module.chunk_gated_delta_rule_cpu = delta_rule
        sys.modules[module.__name__] = module
    operators: Any = torch.ops.sgl_kernel
    for kernel in (
        fused_gdn_gating_cpu,
        fused_sigmoid_gating_delta_rule_update_cpu,
        fused_qkvzba_split_reshape_cat_contiguous_cpu,
        fused_sigmoid_mul_cpu,
        fused_qk_gemma_rmsnorm_cpu,
        fused_qk_gemma_rmsnorm_with_gate_cpu,
    ):
        if not hasattr(operators, kernel.__name__):
            setattr(operators, kernel.__name__, kernel)


# The convolution in front of the net


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    conv_states: Tensor,
    has_initial_state: Tensor,
    cache_indices: Tensor,
    query_start_loc: Tensor,
    seq_lens_cpu: Any = None,
) -> Tensor:
    """The causal convolution ``[channels, T]`` of sequences that are joined in ``x [channels, T]``."""
    out = torch.zeros_like(x)
    bounds = query_start_loc.tolist()
    for number, (slot, known) in enumerate(zip(cache_indices.tolist(), has_initial_state.tolist(), strict=True)):
        if slot < 0:  # a row that pads the batch
            continue
        rows = slice(bounds[number], bounds[number + 1])
        before = conv_states[slot].to(x.dtype) if known else x.new_zeros(conv_states.shape[1:])
        window = torch.cat([before, x[:, rows]], 1)
        out[:, rows] = _activated(F.conv1d(window[None], weight[:, None], bias, groups=len(x))[0], activation)
        conv_states[slot] = window[:, window.shape[1] - before.shape[1] :].to(conv_states.dtype)
    return out


def convolve_one(
    x: Tensor, conv_states: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, *,
    conv_state_indices: Tensor,
) -> Tensor:  # fmt: skip
    """:func:`convolve` of one token a sequence, ``x [B, channels]``."""
    known = torch.ones(len(x), dtype=torch.bool)
    return convolve(
        x.t(), weight, bias, activation=activation, conv_states=conv_states, has_initial_state=known,
        cache_indices=conv_state_indices, query_start_loc=torch.arange(len(x) + 1),
    ).t()  # fmt: skip


def _activated(x: Tensor, activation: str | None) -> Tensor:
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(f"no activation {activation} after a convolution on the CPU")
    return x if activation is None else F.silu(x)


# The delta rule


def fused_gdn_gating_cpu(A_log: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of each token's decay, and how much of its value is written, both ``[1, T, HV]`` in float32."""
    decay = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    return decay[None], b.float().sigmoid()[None]


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor,
    initial_state_indices: Tensor,
    cu_seqlens: Tensor,
    use_qk_l2norm_in_kernel: bool,
    head_first: bool = False,
) -> tuple[Tensor, None, None]:
    """The output ``[1, T, HV, V]`` of the recurrence, token by token.

    ``q`` and ``k`` are ``[1, T, H, K]``, ``v`` is ``[1, T, HV, V]``, ``g`` and ``beta`` are those of
    :func:`fused_gdn_gating_cpu`. The two ``None`` are the last and the intermediate states, which SGLang does not read
    on a CPU without a prefix cache.
    """
    if head_first or not use_qk_l2norm_in_kernel:
        raise NotImplementedError("the delta rule on the CPU takes tokens first, and normalizes queries and keys")
    times = v.shape[2] // k.shape[2]
    queries, keys = (_normalized(x[0].float()).repeat_interleave(times, 1) for x in (q, k))
    queries = queries * q.shape[-1] ** -0.5
    values, decay, written = v[0].float(), g[0].float().exp(), beta[0].float()
    out = torch.zeros_like(values)
    bounds = cu_seqlens.tolist()
    for number, slot in enumerate(initial_state_indices.tolist()):
        if slot < 0:  # a row that pads the batch
            continue
        state = initial_state[slot].float()
        for token in range(bounds[number], bounds[number + 1]):
            state = state * decay[token, :, None, None]
            recalled = (state * keys[token, :, None]).sum(-1)
            change = (values[token] - recalled) * written[token, :, None]
            state = state + change[..., None] * keys[token, :, None]
            out[token] = (state * queries[token, :, None]).sum(-1)
        initial_state[slot] = state.to(initial_state.dtype)
    return out.to(v.dtype)[None], None, None


def _normalized(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def fused_sigmoid_gating_delta_rule_update_cpu(
    A_log: Tensor,
    dt_bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state_source: Tensor,
    initial_state_indices: Tensor,
    cu_seqlens: Tensor,
    use_qk_l2norm_in_kernel: bool,
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
) -> Tensor:
    """:func:`delta_rule` of one token a sequence, with its gates."""
    g, beta = fused_gdn_gating_cpu(A_log, a, b, dt_bias)
    return delta_rule(
        q, k, v, g, beta, initial_state=initial_state_source, initial_state_indices=initial_state_indices,
        cu_seqlens=cu_seqlens, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )[0]  # fmt: skip


# What models compute around it


def fused_qkvzba_split_reshape_cat_contiguous_cpu(
    mixed_qkvz: Tensor, mixed_ba: Tensor, heads_qk: int, heads_v: int, size_qk: int, size_v: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[T, 2 H K + HV V]``, the gate ``z [T, HV, V]``, and ``b`` and ``a``, ``[T, HV]``."""
    values = heads_v * size_v
    qkv, z = mixed_qkvz[:, :-values], mixed_qkvz[:, -values:]
    b, a = mixed_ba[:, :heads_v], mixed_ba[:, heads_v:]
    return qkv.contiguous(), z.reshape(-1, heads_v, size_v), b.contiguous(), a.contiguous()


def fused_sigmoid_mul_cpu(attn_output: Tensor, gate: Tensor, inplace: bool = True) -> Tensor:
    """The output of attention ``[T, H V]``, by the sigmoid of its gate; 0.5.23 reads it from ``attn_output`` itself."""
    product = attn_output * gate.reshape(attn_output.shape).float().sigmoid().to(attn_output.dtype)
    return attn_output.copy_(product) if inplace else product


def fused_qk_gemma_rmsnorm_cpu(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, head_dim: int
) -> tuple[Tensor, Tensor]:
    """Queries and keys with each head normalized, ``[T H, head_dim]``."""
    return _gemma_norm(q.reshape(-1, head_dim), q_weight, eps), _gemma_norm(k.reshape(-1, head_dim), k_weight, eps)


def fused_qk_gemma_rmsnorm_with_gate_cpu(
    q_gate: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, head_dim: int, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`fused_qk_gemma_rmsnorm_cpu`, and the gates that stand behind each head of the queries."""
    q, gate = q_gate.reshape(-1, num_heads, 2 * head_dim).chunk(2, -1)
    queries, keys = fused_qk_gemma_rmsnorm_cpu(q, k, q_weight, k_weight, eps, head_dim)
    # Of one token it would be a view with gaps, which SGLang views again.
    return queries, keys, gate.reshape(-1, head_dim).contiguous()


def _gemma_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (_root_mean_square_norm(x, eps) * (1 + weight.float())).to(x.dtype)


def _root_mean_square_norm(x: Tensor, eps: float) -> Tensor:
    full = x.float()
    return full * torch.rsqrt((full * full).mean(-1, keepdim=True) + eps)


def gated_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    activation: str = "swish",
) -> Tensor:
    """``layernorm_fn`` of SGLang's ``fla/layernorm_gated.py``, for the norm behind a gated delta net."""
    if z is None or bias is not None or group_size is not None or not (norm_before_gate and is_rms_norm):
        raise NotImplementedError("the gated norm on the CPU is the root mean square, by a gate and without groups")
    return (_root_mean_square_norm(x, eps) * weight.float() * _GATES[activation](z.float())).to(x.dtype)


def gated_norm_of_next(
    x: Tensor, g: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "swish",
    residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False, eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """``rms_norm_gated`` of SGLang's ``fla/fused_norm_gate.py``, which Qwen3-Next calls."""
    if residual is not None or prenorm:
        raise NotImplementedError("the gated norm on the CPU takes no residual")
    return gated_norm(x, weight, bias, g, eps, is_rms_norm=True, activation=activation)
