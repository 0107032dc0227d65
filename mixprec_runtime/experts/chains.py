"""Computes a layer of several formats as one fused MoE, with SGLang's kernels for each format.

SGLang's fused MoE works on a row for each token and each of its experts: it sorts rows by expert, multiplies by gate
and up, activates, multiplies by down, and sums the rows of each token. Run once for each group, with ids of -1 for
other groups, only the products skip rows: sorting, activation and sum are repeated for all rows. Here each group has a
*chain*, its two products, which write the group's rows into buffers that all groups share; the rest is done once.
Kernels and their arguments are those of SGLang's two runners for one GPU (moe_runner/triton_utils/fused_moe.py,
fused_moe_triton/fused_marlin_moe.py in 0.5.17).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton.language as tl
from sglang.srt.layers.moe.moe_runner.marlin import MarlinMoeQuantInfo
from sglang.srt.layers.moe.moe_runner.triton import TritonMoeQuantInfo
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

from .. import launch
from . import routing
from .routing import Route

__all__ = ["Chain", "Chains", "activates", "of", "run"]


# Up to so many rows (tokens times top-k), tiles are chosen for few rows.
_FEW = 64


@dataclass(frozen=True)
class Chain(ABC):
    """The products of one group.

    Attributes:
        info: the group's weights and scales, as SGLang's method for the format passes them to its runner.
        experts: the number of experts in the group.
        of: the number of experts of the layer on this rank. Kernels are chosen for these, since the tokens are those of
            all groups.
    """

    info: Any
    experts: int
    of: int

    @property
    @abstractmethod
    def columns(self) -> int:
        """Width of the intermediate activations."""

    @abstractmethod
    def tiles(self, x: torch.Tensor, top_k: int) -> dict[str, Any]:
        """Tile sizes of the kernels for the input ``x [tokens, hidden]``; ``BLOCK_SIZE_M`` is the rows in a block."""

    @abstractmethod
    def up(self, x: torch.Tensor, out: torch.Tensor, route: Route, topk: Any, tiles: dict[str, Any]) -> None:
        """Gate and up: from ``x [tokens, hidden]`` to the group's rows of ``out [tokens * top_k, 2 * columns]``."""

    @abstractmethod
    def down(self, x: torch.Tensor, out: torch.Tensor, route: Route, topk: Any, tiles: dict[str, Any]) -> None:
        """Down, times the router's weights: from the group's rows of ``x [tokens * top_k, columns]`` to those of
        ``out [tokens * top_k, hidden]``."""


class TritonChain(Chain):
    """BF16, FP8 and Int8 with quantized activations."""

    @property
    def columns(self) -> int:
        return int(self.info.w13_weight.shape[1]) // 2

    def tiles(self, x: torch.Tensor, top_k: int) -> dict[str, Any]:
        from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

        info = self.info
        kind = fused_moe.get_config_dtype_str(
            dtype=x.dtype, use_fp8_w8a8=info.use_fp8_w8a8, use_int8_w8a8=info.use_int8_w8a8
        )
        # Tuned tiles, too, are looked up by the experts of a layer.
        found: dict[str, Any] = fused_moe.try_get_optimal_moe_config(
            (self.of, *info.w13_weight.shape[1:]),
            (self.of, *info.w2_weight.shape[1:]),
            top_k,
            kind,
            len(x),
            block_shape=info.block_shape,
            per_channel_quant=info.per_channel_quant,
        )
        # In 0.5.23, SGLang's caller takes this key out before it calls the kernel (triton_utils/fused_moe.py:487).
        tiles = {key: value for key, value in found.items() if key != "USE_TMA"}
        if len(x) * top_k <= _FEW and not launch.deterministic():
            # With few rows there are few blocks: narrow tiles and more stages keep more loads in flight. At 256 bytes
            # of a row, the stages fit into the shared memory of all supported GPUs.
            inputs = min(tiles["BLOCK_SIZE_K"], 256 // info.w13_weight.element_size())
            narrow = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": inputs, "GROUP_SIZE_M": 1}
            return {**tiles, **narrow, "num_warps": 4, "num_stages": 5}
        return tiles

    def up(self, x: torch.Tensor, out: torch.Tensor, route: Route, topk: Any, tiles: dict[str, Any]) -> None:
        info = self.info
        scales = info.a13_scale, info.w13_scale
        self._product(x, info.w13_weight, scales, out, route, topk, topk.topk_ids.shape[1], False, tiles)

    def down(self, x: torch.Tensor, out: torch.Tensor, route: Route, topk: Any, tiles: dict[str, Any]) -> None:
        info = self.info
        self._product(x, info.w2_weight, (info.a2_scale, info.w2_scale), out, route, topk, 1, True, tiles)

    def _product(
        self, x: torch.Tensor, weight: torch.Tensor, scales: tuple[Any, Any], out: torch.Tensor, route: Route,
        topk: Any, top_k: int, weighted: bool, tiles: dict[str, Any],
    ) -> None:  # fmt: skip
        from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

        info = self.info
        fused_moe.invoke_fused_moe_kernel(
            x, weight, None, out, *scales, None, topk.topk_weights, topk.topk_ids,
            route.positions, route.experts, route.count, weighted, top_k, tiles,
            compute_type=tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16,
            use_fp8_w8a8=info.use_fp8_w8a8, use_int8_w8a8=info.use_int8_w8a8, use_int8_w8a16=False,
            use_int4_w4a16=False, per_channel_quant=info.per_channel_quant, block_shape=info.block_shape,
            filter_expert=False,
        )  # fmt: skip


class MarlinChain(Chain):
    """GPTQ, AWQ, packed compressed-tensors, NVFP4 and MXFP4."""

    @property
    def columns(self) -> int:
        return int(self.info.w2_qweight.shape[1]) * 16

    def tiles(self, x: torch.Tensor, top_k: int) -> dict[str, Any]:
        """As fused_marlin_moe.py:231, for all of the layer's experts."""
        for rows in (8, 16, 32, 48, 64):
            if len(x) * top_k / self.of / rows < 0.9:
                break
        return {"BLOCK_SIZE_M": rows}

    def up(self, x: torch.Tensor, out: torch.Tensor, route: Route, topk: Any, tiles: dict[str, Any]) -> None:
        info = self.info
        weights = info.w13_qweight, info.w13_scales, info.w13_global_scale, info.w13_qzeros
        orders = info.w13_g_idx, info.w13_g_idx_sort_indices
        self._product(x, weights, orders, out, route, topk, topk.topk_ids.shape[1], False)

    def down(self, x: torch.Tensor, out: torch.Tensor, route: Route, topk: Any, tiles: dict[str, Any]) -> None:
        info = self.info
        weights = info.w2_qweight, info.w2_scales, info.w2_global_scale, info.w2_qzeros
        self._product(x, weights, (info.w2_g_idx, info.w2_g_idx_sort_indices), out, route, topk, 1, True)

    def _product(
        self, x: torch.Tensor, weights: tuple[Any, ...], orders: tuple[Any, Any], out: torch.Tensor, route: Route,
        topk: Any, top_k: int, weighted: bool,
    ) -> None:  # fmt: skip
        from sglang.srt.layers.moe.fused_moe_triton import fused_marlin_moe

        weight, scales, of_all, zeros = weights
        fused_marlin_moe.moe_wna16_marlin_gemm(
            x, out, weight, None, scales, of_all, zeros, *orders,
            route.locks, route.positions, route.experts, route.count, topk.topk_weights,
            moe_block_size=route.block, top_k=top_k, mul_topk_weights=weighted, is_ep=False,
            b_q_type=fused_marlin_moe.get_scalar_type(self.info.weight_bits, zeros is not None, scales, of_all),
            size_m=len(x), size_n=out.shape[-1], size_k=x.shape[1], is_k_full=self.info.is_k_full,
            use_atomic_add=_adds_atomically(x.dtype, x.device) and not _of_powers_of_two(scales),
            use_fp32_reduce=True, is_zp_float=False,
        )  # fmt: skip


def _of_powers_of_two(scales: torch.Tensor) -> bool:
    """Whether weights are in MXFP4, which SGLang's runner multiplies by BF16 only and adds up without atomics."""
    return scales.dtype == torch.float8_e8m0fnu


@lru_cache
def _adds_atomically(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype == torch.half or torch.cuda.get_device_capability(device)[0] >= 9


class Chains(NamedTuple):
    """The chains of a layer that multiply by gate and up, and those that multiply by down.

    Both are the same list where each expert has one format.
    """

    ups: list[Chain]
    downs: list[Chain]

    @property
    def split(self) -> bool:
        return self.ups is not self.downs


def of(layer: Any, dispatch_output: Any) -> Chains:
    """The chains of a layer's groups; empty where a group's kernels or the activation are not supported."""
    made = [(group.projection, chain) for group in layer.groups if (chain := _chain(layer, group, dispatch_output))]
    ups = downs = [chain for projection, chain in made if projection != "w2"]
    if any(projection for projection, _ in made):
        downs = [chain for projection, chain in made if projection != "w13"]
    known = len(made) == len(layer.groups) and max(len(ups), len(downs)) <= routing.MOST_GROUPS
    return Chains(ups, downs) if known and activates(layer.moe_runner_config) else Chains([], [])


def activates(config: Any) -> bool:
    """Whether chains support the activation of a runner's config: gated SiLU of inputs as they are.

    Of limits, it may have DeepSeek-V4's (``swiglu_limit``), and no others.
    """
    limits = config.gemm1_alpha, config.gemm1_clamp_limit
    plain = limits == (None, None) and not config.apply_router_weight_on_input
    return config.activation == "silu" and bool(config.is_gated) and plain


def _chain(layer: Any, group: Any, dispatch_output: Any) -> Chain | None:
    experts, of = group.num_local_experts, layer.num_local_experts
    info = _quant_info(group, dispatch_output)
    if isinstance(info, MarlinMoeQuantInfo):
        unfit = _of_powers_of_two(info.w13_scales) and dispatch_output.hidden_states.dtype != torch.bfloat16
        unfit = unfit or info.w13_bias is not None or info.w2_bias is not None
        return None if unfit else MarlinChain(info, experts, of)
    if isinstance(info, TritonMoeQuantInfo):
        unfit = info.b13, info.b2, info.w13_zp, info.w2_zp
        others = info.use_mxfp8, info.use_int8_w8a16, info.use_int4_w4a16
        # Later versions can interleave gate and up, for a kernel that also activates.
        supported = not any(others) and not getattr(info, "fuse_swiglu_interleaved", False)
        return TritonChain(info, experts, of) if supported and all(one is None for one in unfit) else None
    return None


def _quant_info(group: Any, dispatch_output: Any) -> Any:
    """The ``quant_info`` that the group's method passes to its runner; None where it has no such runner."""
    method, scheme = group.quant_method, getattr(group, "scheme", None)
    holders = (method, scheme, getattr(scheme, "kernel", None))
    runner = next((found for holder in holders if (found := getattr(holder, "runner", None)) is not None), None)
    if runner is None:
        return None
    passed: list[Any] = []

    def keep(dispatch_output: Any, quant_info: Any, config: Any) -> StandardCombineInput:
        passed.append(quant_info)
        return StandardCombineInput(hidden_states=dispatch_output.hidden_states)

    with patch.object(runner, "fused_func", keep):
        method.apply(group, dispatch_output)
    return passed[0] if passed else None


def run(layer: Any, x: torch.Tensor, topk: Any) -> torch.Tensor:
    """The layer's output for ``x``, both ``[tokens, hidden]``, by ``layer.chains``, which must not be empty."""
    from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import silu_and_mul

    each: Chains = layer.chains
    ids = topk.topk_ids
    tokens, top_k = ids.shape
    rows, columns = tokens * top_k, each.ups[0].columns
    ups = downs = _routed(each.ups, x, ids, layer.up_numbers)
    if each.split:
        downs = _routed(each.downs, x, ids, layer.down_numbers)
    up, activated = x.new_empty((rows, 2 * columns)), x.new_empty((rows, columns))
    limit = layer.moe_runner_config.swiglu_limit
    # The kernel for a chain's own rows has no limit, and torch's would write the rows of chains beside it.
    at_once = each.split or limit is not None

    def activate_all() -> None:
        if limit is not None:
            up[:, :columns].clamp_(max=limit)
            up[:, columns:].clamp_(-limit, limit)
        silu_and_mul(up, activated)

    if torch.cuda.is_current_stream_capturing():
        down = x.new_empty((rows, x.shape[1]))

        def run_chain(chain: Chain, route: Route, tiles: dict[str, Any]) -> None:
            chain.up(x, up, route, topk, tiles)
            silu_and_mul(up, activated, expert_ids=route.numbers, expert_step=1)
            chain.down(activated, down, route, topk, tiles)

        if at_once:
            _side_by_side([partial(chain.up, x, up, route, topk, tiles) for chain, route, tiles in ups])
            activate_all()
            _side_by_side([partial(chain.down, activated, down, route, topk, tiles) for chain, route, tiles in downs])
        else:
            _side_by_side([partial(run_chain, *one) for one in ups])
    else:
        for chain, route, tiles in ups:
            chain.up(x, up, route, topk, tiles)
        activate_all()
        del up  # large with many tokens
        down = x.new_empty((rows, x.shape[1]))
        for chain, route, tiles in downs:
            chain.down(activated, down, route, topk, tiles)
    factor = layer.moe_runner_config.routed_scaling_factor or 1.0
    return routing.sum_rows(down.view(tokens, top_k, -1), ids, factor)


def _routed(
    each: Sequence[Chain], x: torch.Tensor, ids: torch.Tensor, numbers: torch.Tensor
) -> list[tuple[Chain, Route, dict[str, Any]]]:
    """Each chain with its rows and its tile sizes."""
    tiles = [chain.tiles(x, ids.shape[1]) for chain in each]
    sizes, blocks = [chain.experts for chain in each], [one["BLOCK_SIZE_M"] for one in tiles]
    return list(zip(each, routing.sort(ids, numbers, sizes, blocks), tiles, strict=True))


def _side_by_side(runs: Sequence[Callable[[], None]]) -> None:
    """Runs on parallel streams of a CUDA graph, since with few tokens each leaves most of the GPU idle."""
    main = torch.cuda.current_stream()
    beside = [_side_stream(number) for number in range(1, len(runs))]
    for run, stream in zip(runs[1:], beside, strict=True):
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            run()
    runs[0]()
    for stream in beside:
        main.wait_stream(stream)


@lru_cache
def _side_stream(number: int) -> torch.cuda.Stream:
    """A stream that all layers share, since they run one after the other."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]
