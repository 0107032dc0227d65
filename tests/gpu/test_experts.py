"""Layers whose experts differ in format against float64 arithmetic on the dequantized weights, on SGLang's kernels."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sglang.srt")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from support.sglang import layers  # noqa: E402

pytestmark = pytest.mark.gpu

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 512, 256, 24, 8
KINDS = (
    "bf16", "fp8_block", "fp8_channel", "fp8_tensor", "int8_channel", "int8_block", "gptq_int4", "gptq_int8",
    "awq_int4", "ct_int4", "ct_int8", "nvfp4", "ct_nvfp4", "ct_mxfp4",
)  # fmt: skip
TOKENS = (0, 1, 7, 64, 65, 4096)
# Activations are rounded to FP8 or Int8 for weights in these, and not for the others.
# SGLang cuts off what activations for Int8 blocks have behind the point, instead of rounding it.
ERRORS = {"fp8": 0.06, "int8_channel": 0.03, "int8_block": 0.05, "other": 0.012}


@pytest.fixture(scope="module", autouse=True)
def sglang() -> Iterator[None]:
    layers.start_sglang()
    yield


def combinations() -> list[tuple[str, ...]]:
    packed = [(kind, "awq_int4", "ct_int4") for kind in KINDS[:8]]
    packed += [
        (*pair, "nvfp4") for pair in itertools.combinations(("bf16", "fp8_block", "fp8_channel", "gptq_int4"), 2)
    ]
    # Scales that are powers of two, in small blocks
    packed += [(kind, "fp8_e8m0_32") for kind in ("bf16", "fp8_block", "gptq_int4", "nvfp4")]
    packed += [("deepseek_mxfp4", "fp8_block", "mxfp4/gptq_int4"), ("bf16", "deepseek_mxfp4/fp8_block", "mxfp4")]
    packed += [(*pair, "ct_mxfp4") for pair in itertools.combinations(("bf16", "fp8_block", "gptq_int4", "nvfp4"), 2)]
    # Each group a fused MoE of its own: W4AFP8's kernel shares no buffers
    packed += [(kind, "w4afp8") for kind in ("bf16", "fp8_block", "gptq_int4", "nvfp4")]
    packed += [("bf16", "fp8_block", "w4afp8"), ("w4afp8", "ct_mxfp4", "gptq_int4")]
    # "a/b": gate and up in a, down in b.
    parted = [(f"{up}/{down}", up) for up, down in itertools.permutations(KINDS, 2)]
    return [*itertools.combinations(KINDS, 2), *itertools.combinations(KINDS[:8], 3), *packed, *parted]


def routings(tokens: int, groups: int) -> dict[str, torch.Tensor]:
    """Routed ids ``[tokens, 8]``: what a router may come to, and what hurts."""
    each = EXPERTS // groups
    generator = torch.Generator().manual_seed(tokens)
    random = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    if not tokens:
        return {"none": random.to(torch.int32)}
    one_group = torch.arange(TOP_K) % each
    spread = torch.arange(TOP_K) * EXPERTS // TOP_K
    ids = {"random": random, "one group": one_group.repeat(tokens, 1), "all groups": spread.repeat(tokens, 1)}
    ids["last group"] = ids["one group"] + each * (groups - 1)
    foreign = random.clone()
    foreign[:, ::2] = -1
    ids["other ranks"] = foreign
    return {name: value.to(torch.int32) for name, value in ids.items()}


@pytest.mark.parametrize("kinds", combinations(), ids="+".join)
def test_a_mixed_layer_is_right(kinds: tuple[str, ...]) -> None:
    layer, dense = layers.make_layer(
        [(kind, EXPERTS // len(kinds)) for kind in kinds], hidden=HIDDEN, intermediate=INTERMEDIATE
    )
    each = [part for kind in kinds for part in kind.split("/")]
    limit = max(ERRORS.get("fp8" if "fp8" in kind else kind, ERRORS["other"]) for kind in each)
    for tokens in TOKENS:
        for name, ids in routings(tokens, len(kinds)).items():
            ids = ids.cuda()
            x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
            weights = torch.rand(tokens, TOP_K, device="cuda").softmax(-1)
            out = layers.run(layer, x, ids, weights)
            assert out.shape == x.shape and out.dtype == x.dtype
            if tokens:
                due = layers.reference(x, ids, weights, dense)
                error = ((out.double() - due).norm() / due.norm()).item()
                assert error < limit, f"{tokens} tokens, {name}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_split_in_two_of_one_format_is_the_layer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of one format: their sum differs from the native layer by one rounding of the sum. With one scale a
    tensor, groups quantize activations token by token, where the native layer has one scale for all tokens."""
    import mixprec_runtime.config as config
    from mixprec_runtime.experts.method import MixedExpertsMethod

    whole, _ = layers.make_layer([(kind, EXPERTS)], hidden=HIDDEN, intermediate=INTERMEDIATE)

    class Half:
        """Stands for the format: experts are grouped by equality, and each half equals itself only."""

        kind = "half"

    def split(self: config.MixPrecConfig, layer: object, prefix: str) -> object:
        halves = Half(), Half()
        formats = {expert: (halves[expert >= EXPERTS // 2],) * 2 for expert in range(EXPERTS)}
        return MixedExpertsMethod(formats, dict.fromkeys(halves, self.native[layers.FORMATS[kind]]), prefix)

    monkeypatch.setattr(config.MixPrecConfig, "_experts_method", split)
    halves, _ = layers.make_layer([(kind, EXPERTS)], hidden=HIDDEN, intermediate=INTERMEDIATE)
    assert len(halves.groups) == 2
    limit = 0.08 if kind == "fp8_tensor" else 0.015
    for tokens in TOKENS[1:]:
        ids = routings(tokens, 2)["random"].cuda()
        x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        weights = torch.rand(tokens, TOP_K, device="cuda").softmax(-1)
        a, b = layers.run(whole, x, ids, weights).double(), layers.run(halves, x, ids, weights).double()
        assert ((a - b).norm() / a.norm()).item() < limit
        # Tokens whose experts all lie in one half take the same path, up to the order of one sum.
        alone = routings(tokens, 2)["one group"].cuda()
        a, b = layers.run(whole, x, alone, weights), layers.run(halves, x, alone, weights)
        assert ((a.double() - b.double()).norm() / a.double().norm()).item() < limit


@pytest.mark.parametrize(
    "groups",
    [[("fp8_block", 8), ("gptq_int4", 16)], [("ct_mxfp4", 8), ("gptq_int4", 16)], [("ct_mxfp4", 24)]],
    ids=lambda groups: "+".join(kind for kind, _ in groups),
)
def test_routed_scaling_is_applied_once(groups: list[tuple[str, int]]) -> None:
    """By the runners of the groups, as by the native layer's; SGLang's for MXFP4 leaves it out."""
    sizes = {"hidden": HIDDEN, "intermediate": INTERMEDIATE}
    scaled, _ = layers.make_layer(groups, **sizes, routed_scaling_factor=2.5)
    plain, _ = layers.make_layer(groups, **sizes)
    x = torch.randn(33, HIDDEN, device="cuda", dtype=torch.bfloat16)
    ids, weights = routings(33, 2)["random"].cuda(), torch.rand(33, TOP_K, device="cuda").softmax(-1)
    a, b = layers.run(scaled, x, ids, weights).double(), layers.run(plain, x, ids, weights).double()
    assert ((a - 2.5 * b).norm() / a.norm()).item() < 0.01


def test_every_format_answers_the_same_again() -> None:
    """A kernel that reads what another warp is writing answers otherwise in one launch of ten or of a thousand."""
    names = [*KINDS, "fp8_block+gptq_int4+awq_int4+nvfp4", "awq_int4/gptq_int4+awq_int4"]
    repeatable = os.pathsep.join([str(Path(__file__).parent / "repeatable"), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-m", "support.sglang.repeated", json.dumps(names)],
        capture_output=True, text=True, timeout=550, env={**os.environ, "PYTHONPATH": repeatable},
    )  # fmt: skip
    assert not done.returncode, done.stderr[-4000:]
    answers: dict[str, tuple[int, float]] = json.loads(done.stdout.splitlines()[-1])
    print(
        "\n"
        + "\n".join(f"{name}: {differing} differ, error {error:.1e}" for name, (differing, error) in answers.items())
    )
    assert {name: differing for name, (differing, _) in answers.items() if differing} == {}


@pytest.mark.parametrize(("hidden", "intermediate"), [(512, 256), (1024, 512), (640, 384)])
def test_experts_in_w4afp8_are_sglangs(hidden: int, intermediate: int) -> None:
    """To the bit those of SGLang's own config, and near the dequantized weights."""
    from sglang.srt.layers.quantization.w4afp8 import W4AFp8Config

    sizes = {"hidden": hidden, "intermediate": intermediate}
    stock, _ = layers.make_layer([("w4afp8", EXPERTS)], config=W4AFp8Config(), **sizes)
    ours, dense = layers.make_layer([("w4afp8", EXPERTS)], **sizes)
    for tokens in TOKENS[1:]:
        ids = routings(tokens, 1)["random"].cuda()
        x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
        weights = torch.rand(tokens, TOP_K, device="cuda").softmax(-1)
        a, b = layers.run(ours, x, ids, weights), layers.run(stock, x, ids, weights)
        due = layers.reference(x, ids, weights, dense)
        error = ((a.double() - due).norm() / due.norm()).item()
        assert torch.equal(a, b) and error < ERRORS["fp8"], f"{tokens} tokens: {error:.4f}"


@pytest.mark.parametrize("kind", ["mxfp4", "ct_mxfp4", "deepseek_mxfp4"])
@pytest.mark.parametrize(("hidden", "intermediate"), [(512, 256), (384, 192), (2048, 768)])
def test_experts_in_mxfp4_are_right(kind: str, hidden: int, intermediate: int) -> None:
    """Alone in their layer, also where SGLang's class would pad them: against float64, and ids of other ranks."""
    layer, dense = layers.make_layer([(kind, EXPERTS)], hidden=hidden, intermediate=intermediate)
    for tokens in (1, 64, 1024):
        ids = routings(tokens, 1)["random"].cuda()
        x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
        weights = torch.rand(tokens, TOP_K, device="cuda").softmax(-1)
        due = layers.reference(x, ids, weights, dense)
        error = ((layers.run(layer, x, ids, weights).double() - due).norm() / due.norm()).item()
        assert error < ERRORS["other"], f"{tokens} tokens: {error:.4f}"


ALPHAS = {name: case for name, case in layers.ACTIVATIONS.items() if "gemm1_alpha" in case.options}
"""MiniMax-M3's activation and Kimi-K3's, with small limits."""


@pytest.mark.parametrize("name", ["silu", *ALPHAS])
def test_experts_in_mxfp4_are_to_the_bit_those_of_sglangs_class_for_other_producers(name: str) -> None:
    """``Mxfp4MoEMethod``, which SGLang takes for compressed-tensors' with ``--moe-runner-backend marlin``, and so for
    Kimi-K3."""
    from unittest.mock import patch

    from sglang.srt.layers.moe.utils import MoeRunnerBackend
    from sglang.srt.layers.quantization import mxfp4

    options: dict[str, Any] = {"hidden": HIDDEN, "intermediate": INTERMEDIATE}
    if name in ALPHAS:
        options |= ALPHAS[name].options
    with patch.object(mxfp4, "get_moe_runner_backend", lambda: MoeRunnerBackend.MARLIN):
        config = mxfp4.Mxfp4Config(is_checkpoint_mxfp4_serialized=True)
        stock, _ = layers.make_layer([("mxfp4", EXPERTS)], config=config, **options)
    assert type(stock.quant_method).__name__ == "Mxfp4MoEMethod"
    ours, _ = layers.make_layer([("mxfp4", EXPERTS)], **options)
    for tokens in TOKENS[1:]:
        ids = routings(tokens, 1)["random"].cuda()
        x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        weights = torch.rand(tokens, TOP_K, device="cuda").softmax(-1)
        a, b = layers.run(ours, x, ids, weights), layers.run(stock, x, ids, weights)
        apart = (a.double() - b.double()).abs().max().item()
        assert torch.equal(a, b), f"{tokens} tokens: {apart} apart at most, of {b.abs().max().item()}"


OTHER_PAIRS = [
    ("bf16", "fp8_block"), ("bf16", "fp8_channel"), ("bf16", "fp8_tensor"), ("bf16", "int8_channel"),
    ("bf16", "gptq_int4"), ("bf16", "awq_int4"), ("bf16", "ct_int4"), ("bf16", "nvfp4"), ("fp8_block", "gptq_int4"),
    ("fp8_channel", "nvfp4"),
    # Of Marlin's, two groups can be in MXFP4, by different names.
    ("bf16", "ct_mxfp4"), ("fp8_block", "ct_mxfp4"), ("gptq_int4", "ct_mxfp4"), ("nvfp4", "ct_mxfp4"),
    ("ct_mxfp4", "mxfp4"),
]  # fmt: skip


@pytest.mark.parametrize("name", layers.ACTIVATIONS)
@pytest.mark.parametrize("kinds", OTHER_PAIRS, ids="+".join)
def test_other_activations_and_experts_without_a_gate(kinds: tuple[str, ...], name: str) -> None:
    """Each format is a fused MoE of its own here, and its ids of other groups are -1."""
    case, formats = layers.ACTIVATIONS[name], [layers.FORMATS[kind] for kind in kinds]
    if not case.marlin and any(fmt.experts_run_on != "Triton" for fmt in formats):
        pytest.skip("refused: Marlin has no such kernel")
    if not case.options.get("is_gated", True) and any(fmt.gated_experts_only for fmt in formats):
        pytest.skip("refused: SGLang's class is for experts with a gate")
    if any(case.name in fmt.expert_activations_refused for fmt in formats):
        pytest.skip("refused: SGLang's method has no such activation")
    layer, dense = layers.make_layer(
        [(kind, EXPERTS // 2) for kind in kinds], hidden=HIDDEN, intermediate=INTERMEDIATE, **case.options
    )
    limit = max(ERRORS.get("fp8" if "fp8" in kind else kind, ERRORS["other"]) for kind in kinds)
    for tokens in (1, 64, 4096):
        for routing, ids in routings(tokens, 2).items():
            ids = ids.cuda()
            x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
            weights = torch.rand(tokens, TOP_K, device="cuda").softmax(-1)
            due = layers.reference(x, ids, weights, dense, case.activate, weighted_inputs=case.weighted_inputs)
            out = layers.run(layer, x, ids, weights)
            error = ((out.double() - due).norm() / due.norm()).item()
            # Squares and cut values double what rounding did.
            assert error < 2 * limit, f"{name}, {tokens} tokens, {routing}: error {error:.4f} of {2 * limit}"


REAL = {
    "MiniMax-M3": ({"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0}, layers.swiglu(1.702, 7.0)),
    "Kimi-K3": ({"activation": "situ", "gemm1_alpha": 4.0, "gemm1_clamp_limit": 25.0}, layers.situ(4.0, 25.0)),
}
"""Activations with the constants of releases, which large inputs reach."""


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(
    "kinds", [("ct_mxfp4",), ("ct_mxfp4", "fp8_block"), ("ct_mxfp4", "mxfp4", "bf16")], ids="+".join
)
@pytest.mark.parametrize(("hidden", "intermediate"), [(512, 256), (384, 384), (3584, 384)])
def test_experts_in_mxfp4_are_activated_as_their_models_are(
    kinds: tuple[str, ...], name: str, hidden: int, intermediate: int
) -> None:
    """Alone in their layer and beside others, also where Kimi-K3's class offers memory for the layer's output; the last
    size is Kimi-K3's on eight ranks."""
    from sglang.srt.layers import zero_copy_context

    options, activate = REAL[name]
    layer, dense = layers.make_layer(
        [(kind, EXPERTS // len(kinds)) for kind in kinds],
        hidden=hidden, intermediate=intermediate, gate_up_interleaved=False, **options,
    )  # fmt: skip
    limit = ERRORS["fp8"] if "fp8_block" in kinds else ERRORS["other"]
    for tokens in (1, 64, 1024):
        x = 8 * torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
        weights = torch.rand(tokens, TOP_K, device="cuda").softmax(-1)
        for routing, ids in routings(tokens, len(kinds)).items():
            if routing == "other ranks" and len(kinds) == 1:
                continue  # a layer of one rank gets no ids of -1
            ids = ids.cuda()
            due = layers.reference(x, ids, weights, dense, activate)
            with zero_copy_context.set_moe_output(torch.empty_like(x)):
                out = layers.run(layer, x, ids, weights)
            error = ((out.double() - due).norm() / due.norm()).item()
            assert error < 2 * limit, f"{tokens} tokens, {routing}: error {error:.4f} of {2 * limit}"


WAYS = ("random", "one group", "all groups", "last group", "other ranks")


@pytest.mark.parametrize(
    ("kinds", "name", "sizes", "runs", "ways", "limit"),
    [
        (("fp8_block", "gptq_int4", "bf16"), "SiLU", (48,), 6, WAYS, ERRORS["fp8"]),
        (("ct_mxfp4",), "Kimi-K3", (1, 48), 3, WAYS[:3], 2 * ERRORS["other"]),
        (("ct_mxfp4", "mxfp4", "fp8_block"), "Kimi-K3", (1, 48), 3, WAYS[:3], 2 * ERRORS["fp8"]),
    ],
    ids=["fp8_block+gptq_int4+bf16", "ct_mxfp4", "ct_mxfp4+mxfp4+fp8_block"],
)
def test_a_layer_in_a_cuda_graph_and_with_other_tokens(
    kinds: tuple[str, ...], name: str, sizes: tuple[int, ...], runs: int, ways: tuple[str, ...], limit: float
) -> None:
    """Captured with some tokens, replayed with others: groups run side by side in a graph."""
    options, activate = REAL.get(name, ({}, layers.silu_gate))
    layer, dense = layers.make_layer(
        [(kind, EXPERTS // len(kinds)) for kind in kinds],
        hidden=HIDDEN, intermediate=INTERMEDIATE, **({"gate_up_interleaved": False, **options} if options else {}),
    )  # fmt: skip
    for tokens in sizes:
        x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        ids = routings(tokens, len(kinds))["random"].cuda()
        weights = torch.rand(tokens, TOP_K, device="cuda").softmax(-1)
        layers.run(layer, x, ids, weights)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = [layers.run(layer, x, ids, weights) for _ in range(runs)]
        for way in ways:
            ids.copy_(routings(tokens, len(kinds))[way])
            x.normal_()
            graph.replay()
            due = layers.reference(x, ids, weights, dense, activate)
            for out in outs:
                assert ((out.double() - due).norm() / due.norm()).item() < limit, way


LIMITED = [
    ("deepseek_mxfp4", "fp8_block"),
    ("bf16", "fp8_block", "gptq_int4"),
    ("deepseek_mxfp4/fp8_block", "nvfp4"),
    ("fp8_block",),
    ("deepseek_mxfp4",),
    ("bf16",),
    ("gptq_int4",),
]


@pytest.mark.parametrize("kinds", LIMITED, ids="+".join)
def test_gate_and_up_have_deepseek_v4s_limit(kinds: tuple[str, ...]) -> None:
    """Also in a CUDA graph, whose groups run side by side. Inputs are such that the limit cuts half of the outputs, and
    without it the result would be another one. SGLang's runner on Triton takes no other limit than 10."""
    layer, dense = layers.make_layer(
        [(kind, EXPERTS // len(kinds)) for kind in kinds], hidden=HIDDEN, intermediate=INTERMEDIATE, swiglu_limit=10.0
    )
    each = [part for kind in kinds for part in kind.split("/")]
    limit = 2 * max(ERRORS.get("fp8" if "fp8" in kind else kind, ERRORS["other"]) for kind in each)
    activate = layers.limited_inputs(10.0)

    def error(out: torch.Tensor, due: torch.Tensor) -> float:
        return float((out.double() - due).norm() / due.norm())

    for tokens in (1, 64, 4096):
        weights = torch.rand(tokens, TOP_K, device="cuda").softmax(-1)
        x = torch.empty(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        ids = torch.empty(tokens, TOP_K, device="cuda", dtype=torch.int32)
        ways = routings(tokens, len(kinds))
        if len(kinds) == 1:
            del ways["other ranks"]  # a layer of one rank gets no ids of -1
        for name, routed in ways.items():
            ids.copy_(routed)
            x.normal_(std=15)
            due = layers.reference(x, ids, weights, dense, activate)
            assert error(layers.run(layer, x, ids, weights), due) < limit, f"{tokens} tokens, {name}"
            assert error(layers.reference(x, ids, weights, dense), due) > 2 * limit
        if tokens > 64:
            continue
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layers.run(layer, x, ids, weights)
        for name, routed in ways.items():
            ids.copy_(routed)
            x.normal_(std=15)
            graph.replay()
            assert error(out, layers.reference(x, ids, weights, dense, activate)) < limit, f"{tokens} replayed, {name}"
