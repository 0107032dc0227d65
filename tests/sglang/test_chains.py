"""The chains of a mixed layer, with SGLang's GEMMs replaced by what they are documented to compute.

Shows, with each version of SGLang, that GEMMs are called with the right arguments, that rows get to the right places,
and which layers chains support. tests/gpu/test_experts.py has SGLang's own GEMMs.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.sglang.harness import publish, server_args
from support.sglang.layers import make_layer

import mixprec_runtime.cpu.engine

HIDDEN, COLUMNS, TOP_K = 64, 32, 3
SIZES = (5, 3)


# Triton reads this when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="test_with_tritons_interpreter runs it")
pytestmark = pytest.mark.usefixtures("sglang")


@pytest.mark.skipif(INTERPRETED, reason="it is")
def test_with_tritons_interpreter() -> None:
    """Runs the tests that need the kernels for sorting and summing."""
    environment = {**mixprec_runtime.cpu.engine.environment(), "TRITON_INTERPRET": "1"}
    options = ["-o", "filterwarnings=default", "-p", "no:cacheprovider", "-k", "rows_go"]
    command = [sys.executable, "-m", "pytest", *options, __file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0 and "\n32 passed" in done.stdout, done.stdout[-6000:]


class Method:
    """A method that passes its ``info`` to its runner, as SGLang's methods do."""

    def __init__(self, backend: str, info: Any):
        from sglang.srt.layers.moe import MoeRunnerConfig
        from sglang.srt.layers.moe.moe_runner import MoeRunner
        from sglang.srt.layers.moe.utils import MoeRunnerBackend

        self.info, self.runner = info, MoeRunner(MoeRunnerBackend(backend), MoeRunnerConfig())

    def apply(self, layer: Any, dispatch_output: Any) -> Any:
        return self.runner.run(dispatch_output, self.info)


def weights(experts: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(experts, 2 * COLUMNS, HIDDEN, generator=generator)
    return up, torch.randn(experts, HIDDEN, COLUMNS, generator=generator)


def layer_of(triton: Any, marlin: Any, **config: Any) -> Any:
    """A layer of 9 experts on this rank: one in no group, the others alternating between two groups."""
    from sglang.srt.layers.moe import MoeRunnerConfig

    numbers = torch.full((2, 10), -1, dtype=torch.int32)
    numbers[0, torch.tensor([0, 2, 4, 6, 7])] = torch.arange(5, dtype=torch.int32)
    numbers[1, torch.tensor([1, 3, 5])] = torch.arange(3, dtype=torch.int32)
    kernel = SimpleNamespace(runner=Method("marlin", marlin).runner)
    groups = [
        SimpleNamespace(num_local_experts=5, projection="", quant_method=Method("triton", triton)),
        SimpleNamespace(num_local_experts=3, projection="", quant_method=None, scheme=SimpleNamespace(kernel=kernel)),
    ]
    groups[1].quant_method = SimpleNamespace(apply=lambda layer, given: kernel.runner.run(given, marlin))
    made = MoeRunnerConfig(activation="silu", is_gated=True, routed_scaling_factor=2.5, **config)
    return SimpleNamespace(
        groups=groups, num_local_experts=9, moe_runner_config=made, up_numbers=numbers, down_numbers=numbers
    )


def infos() -> tuple[Any, Any, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The ``quant_info`` of two methods, and the weights of both groups.

    Packed weights have shapes only: the stand-in kernel looks weights up.
    """
    from sglang.srt.layers.moe.moe_runner.marlin import MarlinMoeQuantInfo
    from sglang.srt.layers.moe.moe_runner.triton import TritonMoeQuantInfo

    dense = [weights(size, seed) for seed, size in enumerate(SIZES)]
    packed = torch.zeros(3, HIDDEN // 16, 4 * COLUMNS), torch.zeros(3, COLUMNS // 16, 2 * HIDDEN)
    scales = torch.ones(3, 1, 2 * COLUMNS), torch.ones(3, 1, HIDDEN)
    marlin = MarlinMoeQuantInfo(
        w13_qweight=packed[0], w2_qweight=packed[1], w13_scales=scales[0], w2_scales=scales[1],
        w13_g_idx_sort_indices=None, w2_g_idx_sort_indices=None, weight_bits=4,
    )  # fmt: skip
    return TritonMoeQuantInfo(w13_weight=dense[0][0], w2_weight=dense[0][1]), marlin, dense


def dispatched(tokens: int) -> Any:
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    ids = torch.rand(tokens, 8, generator=generator).argsort(1)[:, :TOP_K].int()
    ids[0, 0] = -1
    return StandardDispatchOutput(
        x, None, StandardTopKOutput(torch.rand(ids.shape, generator=generator), ids, x[:, :1])
    )


def product(given: Any, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, block: int, top_k: int) -> None:
    """``given``: positions, experts and count of a route, and the router's weights if rows are multiplied by them."""
    positions, experts, count, weighted = given
    rows = out.view(-1, weight.shape[1])
    for start in range(0, int(count), block):
        mine = positions[start : start + block].long()
        mine = mine[mine < len(rows)]
        value = x[mine // top_k] @ weight[experts[start // block]].t()
        rows[mine] = value if weighted is None else value * weighted.flatten()[mine, None]


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, torch.Tensor]], None]:
    """Returns a function that installs stand-in kernels; its ``packed`` has the weights of Marlin's, by address."""
    from sglang.srt.layers.moe.fused_moe_triton import fused_marlin_moe
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    from mixprec_runtime.experts import chains

    def like(original: Any, run: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def stand_in(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return run(bound.arguments)

        return stand_in

    def gemm(a: dict[str, Any]) -> None:
        assert not a["filter_expert"] and not any(a[flag] for flag in a if flag.startswith("use_"))
        weighted = a["topk_weights"] if a["mul_routed_weight"] else None
        given = a["sorted_token_ids"], a["expert_ids"], a["num_tokens_post_padded"], weighted
        product(given, a["A"], a["B"], a["C"], a["config"]["BLOCK_SIZE_M"], a["top_k"])

    def place(packed: dict[int, torch.Tensor]) -> None:
        def marlin(a: dict[str, Any]) -> None:
            weight = packed[a["b_q_weight"].data_ptr()]
            assert (a["size_m"], a["size_k"]) == tuple(a["a"].shape) and a["size_n"] == weight.shape[1]
            assert not a["is_ep"] and not a["workspace"].any()
            weighted = a["topk_weights"] if a["mul_topk_weights"] else None
            given = a["sorted_token_ids"], a["expert_ids"], a["num_tokens_post_padded"], weighted
            product(given, a["a"], weight, a["c_or_none"], a["moe_block_size"], a["top_k"])

        def activate(a: dict[str, Any]) -> None:
            gate, up = a["input"].chunk(2, -1)
            there = slice(None) if a["expert_ids"] is None else a["expert_ids"] >= 0
            a["out"][there] = (F.silu(gate) * up)[there]

        try:
            from sglang.kernels.ops.activation.activation import silu_and_mul
            from sglang.kernels.ops.moe.moe_wna16_marlin import moe_wna16_marlin_gemm
        except ImportError:  # 0.5.15
            from sglang.jit_kernel.activation import silu_and_mul
            from sglang.jit_kernel.moe_wna16_marlin import moe_wna16_marlin_gemm
        tiles = like(fused_moe.try_get_optimal_moe_config, lambda a: {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_K": 64})
        monkeypatch.setattr(fused_moe, "try_get_optimal_moe_config", tiles)
        monkeypatch.setattr(fused_moe, "invoke_fused_moe_kernel", like(fused_moe.invoke_fused_moe_kernel, gemm))
        monkeypatch.setattr(fused_moe, "silu_and_mul", like(silu_and_mul, activate), raising=False)
        monkeypatch.setattr(
            fused_marlin_moe, "moe_wna16_marlin_gemm", like(moe_wna16_marlin_gemm, marlin), raising=False
        )
        monkeypatch.setattr(fused_marlin_moe, "get_scalar_type", lambda bits, zeros, scales, of_all: (bits, zeros))
        monkeypatch.setattr(chains, "_adds_atomically", lambda *_: True)

    return place


@interpreted
@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("capturing", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 60, 1500])
def test_rows_go_through_the_chain_of_their_group(
    tokens: int, capturing: bool, split: bool, limit: float | None, kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``split``: all gates and ups of the first group, all downs of the second, and three experts of five in each."""
    from mixprec_runtime.experts import chains

    triton, marlin, dense = infos()
    kernels({marlin.w13_qweight.data_ptr(): dense[1][0], marlin.w2_qweight.data_ptr(): dense[1][1]})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(chains, "_side_by_side", lambda runs: [run() for run in reversed(runs)])
    layer, given = layer_of(triton, marlin, swiglu_limit=limit), dispatched(tokens)
    if split:
        layer.groups[0].projection, layer.groups[1].projection = "w13", "w2"
        layer.up_numbers = layer.down_numbers = layer.up_numbers[1:]
        given.topk_output.topk_ids[(given.topk_output.topk_ids % 2 == 0) | (given.topk_output.topk_ids > 5)] = -1
    layer.chains = chains.of(layer, given)
    kinds = [chains.TritonChain, chains.MarlinChain]
    each = layer.chains
    assert [type(c) for c in each.ups] + [type(c) for c in each.downs] == (kinds if split else kinds * 2)
    assert each.split is split
    out = chains.run(layer, given.hidden_states, given.topk_output)
    due = torch.zeros_like(given.hidden_states, dtype=torch.float64)
    x, topk = given.hidden_states.double(), given.topk_output
    pairs = [(dense[0][0], dense[1][1])] if split else dense
    for group, (up, down) in enumerate(pairs):
        for expert, number in enumerate(layer.up_numbers[group].tolist()):
            token, choice = ((topk.topk_ids == expert) & torch.tensor(number >= 0)).nonzero(as_tuple=True)
            gate, value = (x[token] @ up[number].double().t()).chunk(2, -1)
            if limit is not None:
                gate, value = gate.clamp(max=limit), value.clamp(-limit, limit)
            part = (F.silu(gate) * value) @ down[number].double().t()
            due.index_add_(0, token, 2.5 * part * topk.topk_weights[token, choice, None].double())
    torch.testing.assert_close(out.double(), due, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "config"),
    [
        ({"b13": torch.zeros(1)}, {}),
        ({"use_int4_w4a16": True}, {}),
        ({"use_mxfp8": True}, {}),
        ({}, {"gemm1_alpha": 1.7, "gemm1_clamp_limit": 7.0}),
    ],
)
def test_layers_that_chains_are_not_for(change: dict[str, Any], config: dict[str, Any]) -> None:
    from mixprec_runtime.experts import chains

    triton, marlin, _ = infos()
    given = dispatched(2)
    assert len(chains.of(layer_of(triton, marlin), given).ups) == 2
    assert chains.of(layer_of(replace(triton, **change), marlin, **config), given).ups == []
    assert chains.of(layer_of(triton, replace(marlin, w13_bias=torch.zeros(1))), given).ups == []


def test_tuned_tiles_suit_the_kernel_and_every_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads all files of tiles: their keys are parameters of the kernel, and with few ids the tiles of all stages but
    one fit into the smallest GPU's 99 KiB of shared memory."""
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    from mixprec_runtime import launch
    from mixprec_runtime.experts import chains

    publish(server_args("dummy"))
    kernel = inspect.unwrap(fused_moe.invoke_fused_moe_kernel).__globals__["fused_moe_kernel"]
    known = {*kernel.arg_names, "num_warps", "num_stages", "num_ctas"}
    entries = [
        entry
        for file in (Path(fused_moe.__file__).parent / "configs").rglob("E=*NVIDIA*.json")
        if "_down" not in file.name
        for entry in json.loads(file.read_text()).values()
        if isinstance(entry, dict)
    ]
    assert len(entries) > 1000
    triton, _, _ = infos()
    for weight in (triton.w13_weight.bfloat16(), triton.w13_weight.to(torch.float8_e4m3fn)):
        chain = chains.TritonChain(replace(triton, w13_weight=weight), 3, 5)
        for entry in entries:
            monkeypatch.setattr(fused_moe, "try_get_optimal_moe_config", lambda *_, found=entry, **__: found)
            for tokens in (4, 400):
                tiles = chain.tiles(torch.zeros(tokens, 8, dtype=torch.bfloat16), TOP_K)
                assert tiles.keys() <= known, entry
            few = chain.tiles(torch.zeros(4, 8, dtype=torch.bfloat16), TOP_K)
            held = (few["BLOCK_SIZE_M"] + few["BLOCK_SIZE_N"]) * few["BLOCK_SIZE_K"] * weight.element_size()
            assert held * (few["num_stages"] - 1) < 99 << 10, entry
    monkeypatch.setattr(launch, "deterministic", lambda: True)
    assert chain.tiles(torch.zeros(4, 8), TOP_K) == chain.tiles(torch.zeros(400, 8), TOP_K)


# Methods of other formats take other code paths on a CPU, or need a GPU.
ONE_PROJECTION = ["fp8_block", "fp8_channel", "int8_channel", "int8_block", "gptq_int4", "gptq_int8", "awq_int4"]


@pytest.mark.parametrize("kind", ONE_PROJECTION)
def test_sglangs_own_methods_pass_one_projection_to_chains(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own methods process a group of one projection, and pass the shapes of both on to chains.

    Only Marlin's repacking, which needs a GPU, is replaced.
    """
    from sglang.srt.hardware_backend.gpu.quantization import awq_kernels, gptq_kernels
    from sglang.srt.layers.quantization import marlin_utils

    from mixprec_runtime import native
    from mixprec_runtime.experts import chains
    from mixprec_runtime.experts import method as experts

    def repack(words: torch.Tensor, *sizes: Any, **named: Any) -> torch.Tensor:
        *_, k, n, bits = named.values() if named else sizes
        return torch.zeros((*words.shape[:-2], k // 16, n * bits // 2), dtype=torch.int32)

    publish(server_args("dummy"))
    for module in (experts, native):
        monkeypatch.setattr(module, "is_cpu", lambda: False)
    monkeypatch.setattr(gptq_kernels, "gptq_marlin_repack", repack)
    monkeypatch.setattr(awq_kernels, "awq_marlin_moe_repack", repack)
    monkeypatch.setattr(marlin_utils, "get_device_capability", lambda *_: (9, 0))
    other = "int8_channel" if kind != "int8_channel" else "fp8_channel"
    layer, _ = make_layer([(f"{kind}/{other}", 3), (kind, 2)], hidden=256, intermediate=128, top_k=TOP_K)
    assert [group.projection for group in layer.groups] == ["w13", "w2", "w2"]
    held = [{name.partition("_")[0] for name, _ in group.named_parameters()} for group in layer.groups]
    assert held == [{"w13"}, {"w2"}, {"w2"}]
    given = dispatched(4)._replace(hidden_states=torch.zeros(4, 256, dtype=torch.bfloat16))
    found = chains.of(layer, given)
    assert [chain.experts for chain in found.ups + found.downs] == [5, 2, 3]
    assert {chain.columns for chain in found.ups + found.downs} == {128}
    layer, _ = make_layer([(kind, 3), (other, 2)], hidden=256, intermediate=128, top_k=TOP_K)
    found = chains.of(layer, given)
    assert [chain.experts for chain in found.ups] == [3, 2] and not found.split
