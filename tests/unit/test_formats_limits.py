"""What SGLang's kernels cannot run, by shape and by value.

The expectations are those of SGLang 0.5.17, from running its own checks over these shapes:
``verify_marlin_supports_shape``, ``check_moe_marlin_supports_layer``, ``Fp8LinearMethod``'s
``validate_block_quant_shapes`` and ``Fp8MoEMethod``'s ``create_fp8_moe_weight_``; for what kernels assert when
they run, the place is named beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.oracles import Stated, awq, fp8, fp8_block, gptq, stated, stated_of

from mixprec_build.families.deepseek import DEEPSEEK
from mixprec_build.families.llama import LLAMA
from mixprec_build.formats.awq import Awq
from mixprec_build.formats.base import Format
from mixprec_build.formats.fp8 import Fp8
from mixprec_build.formats.gptq import Gptq
from mixprec_build.planning.rules import fused_rows_limits
from mixprec_build.storage.header import TensorInfo

Array = npt.NDArray[Any]
Tensors = dict[str, Stated]

ONE: Stated = ("F32", (1,))
B128 = Fp8("block", "dynamic", (128, 128))
QKV_A = (1536, "q_a_proj"), (576, "kv_a_proj_with_mqa")


def int4(group_size: int = 128, *, bits: int = 4, sym: bool = True, desc_act: bool = False) -> Gptq:
    return Gptq(bits, group_size, sym, desc_act, "gptq")


def check(found: list[str], expected: Sequence[str]) -> None:
    """Each limit contains its expected words, and there are no others."""
    assert len(found) == len(expected), found
    for limit, words in zip(found, expected, strict=True):
        assert words in limit


V2 = replace(int4(), layout="gptq_v2")  # not for exllama, which would add one to its zero points

# The format, the parts of a fused linear, and words of each limit.
LINEAR: list[tuple[Format, list[Tensors], list[str]]] = [
    (int4(), [gptq(64, 128)], []),
    (int4(bits=8), [gptq(256, 2048, bits=8)], []),
    (int4(32), [gptq(192, 384, group_size=32)], []),
    (int4(-1, desc_act=True), [gptq(64, 128, group_size=-1)], []),
    (V2, [gptq(96, 256)], ["96 outputs are no multiple of 64"]),
    (V2, [gptq(96, 256), gptq(32, 256)], []),  # 128 together: Marlin sees the fused linear
    (V2, [gptq(64, 256), gptq(32, 256)], ["96 outputs are no multiple of 64"]),
    (int4(-1), [gptq(64, 144, group_size=-1)], ["144 inputs are no multiple of 128"]),
    (int4(16), [gptq(64, 128, group_size=16)], ["mixprec does not serve group size 16"]),
    (int4(256), [gptq(64, 384, group_size=256)], ["not serve group size 256", "no multiple of the group size 256"]),
    (int4(sym=False), [gptq(64, 128)], ["asymmetric GPTQ"]),
    (Awq(128), [awq(64, 128)], []),
    (Awq(32), [awq(32, 256, group_size=32), awq(32, 256, group_size=32)], []),
    (Awq(64), [awq(96, 192, group_size=64)], ["96 outputs are no multiple of 64", "192 inputs are no multiple of 128"]),
    (Awq(-1), [awq(64, 128, group_size=-1)], ["mixprec does not serve group size -1 for AWQ"]),
    (Awq(16), [awq(64, 128, group_size=16)], ["mixprec does not serve group size 16 for AWQ"]),
    (B128, [fp8_block(128, 256)], []),
    (B128, [fp8_block(100, 256)], []),  # alone, the last block of outputs may be partial
    (B128, [fp8_block(128, 200)], ["200 inputs are no multiple of 128"]),  # per_token_group_quant_fp8
    (Fp8("block", "dynamic", (64, 32)), [fp8_block(64, 96, (64, 32)), fp8_block(192, 96, (64, 32))], []),
    (Fp8("block", "dynamic", (32, 32)), [fp8_block(96, 96, (32, 32), weight_scale_inv=("F8_E8M0", (3, 3)))], []),
    (Fp8("block", "dynamic", (48, 32)), [fp8_block(96, 96, (48, 32))], ["no kernel for blocks of [48, 32]"]),
    (Fp8("block", "dynamic", (8, 128)), [fp8_block(96, 256, (8, 128))], ["only for powers of two from [16, 32] on"]),
    (Fp8("block", "static", (128, 128)), [fp8_block(128, 256, input_scale=ONE)], ["block scales with static"]),
    (Fp8("channel"), [fp8(48, 80, (48, 1))], []),
    (Fp8("channel"), [fp8(48, 80, (48,))], ["weight_scale F32 [48] has one dimension, SGLang loads [N, 1]"]),
    (Fp8("channel", "static"), [fp8(48, 80, (48, 1), input_scale=ONE)], ["channel scales with static activations"]),
    (Fp8("tensor"), [fp8(48, 80, ()), fp8(48, 80, (1,))], []),
    (Fp8("tensor", "static"), [fp8(48, 80, (), input_scale=ONE)], []),
    # PerTensorScaleParameter asserts one dimension
    (Fp8("tensor"), [fp8(48, 80, (1, 1))], ["weight_scale F32 [1, 1] has two dimensions, SGLang loads [] or [1]"]),
]  # fmt: skip


@pytest.mark.parametrize(("fmt", "parts", "expected"), LINEAR)
def test_linear_limits(fmt: Format, parts: list[Tensors], expected: list[str]) -> None:
    modules = [stated(part) for part in parts]
    for module in modules:
        fmt.check(module)
    check(fmt.linear_limits(modules), expected)


@pytest.mark.parametrize(
    ("fmt", "parts", "why"),
    [
        (int4(), [gptq(64, 256)], None),
        (int4(), [gptq(96, 256)], "its 96 outputs are no multiple of 64, which Marlin needs"),
        (int4(64), [gptq(64, 192, group_size=64)], "its 192 inputs are no multiple of 128, which Marlin needs"),
        (int4(-1, bits=8), [gptq(68, 160, bits=8, group_size=-1)], "68 outputs"),
    ],
)
def test_what_marlin_has_no_kernel_for_runs_in_fp16(fmt: Format, parts: list[Tensors], why: str | None) -> None:
    modules = [stated(part) for part in parts]
    assert fmt.linear_limits(modules) == []
    found = fmt.half_only(modules)
    assert found is None if why is None else why in (found or "")


def test_the_end_of_deepseeks_joined_projections_may_be_ragged() -> None:
    # One output partition to SGLang, which then checks none; the blocks of the first part must end where it ends.
    q_a, kv_a = (stated(fp8_block(n, 256), f"self_attn.{name}") for n, name in QKV_A)
    assert [*fused_rows_limits(B128, [kv_a, q_a], DEEPSEEK)] == []
    ragged = stated(fp8_block(192, 256), q_a.name)
    message = "q_a_proj has 192 outputs, no multiple of its block 128"
    check([*fused_rows_limits(B128, [ragged, kv_a], DEEPSEEK)], [message])
    check([*fused_rows_limits(B128, [q_a, kv_a], LLAMA)], ["kv_a_proj_with_mqa has"])
    gate, up = (stated(fp8_block(n, 256), f"mlp.{name}") for n, name in ((128, "gate_proj"), (100, "up_proj")))
    check([*fused_rows_limits(B128, [gate, up], DEEPSEEK)], ["up_proj has 100 outputs, no multiple of its block 128"])
    assert [*fused_rows_limits(B128, [up], DEEPSEEK)] == []


# The format, hidden and intermediate size, and words of each limit.
EXPERTS: list[tuple[Format, int, int, list[str]]] = [
    (int4(), 256, 128, []),
    (int4(64), 128, 192, []),
    (int4(32), 128, 64, []),
    (int4(-1), 256, 64, []),
    (int4(32), 192, 64, ["hidden size 192 is no multiple of 128"]),
    (int4(), 256, 192, ["intermediate size 192 is no multiple of 128"]),
    (int4(32), 256, 96, ["intermediate size 96 is no multiple of 64"]),
    (int4(-1), 256, 96, ["intermediate size 96 is no multiple of 64"]),
    (int4(16), 128, 64, ["group size 16"]),
    (int4(sym=False), 256, 128, ["asymmetric GPTQ"]),
    (Awq(128), 256, 128, []),
    (Awq(32), 128, 64, []),
    (Awq(128), 256, 192, ["intermediate size 192 is no multiple of 128"]),
    (Awq(64), 192, 96, ["hidden size 192 is no multiple of 128", "intermediate size 96 is no multiple of 64"]),
    (Awq(-1), 256, 64, ["group size -1"]),
    (B128, 256, 128, []),
    (B128, 256, 192, ["intermediate size 192 is no multiple of the block [128, 128]"]),
    (B128, 192, 128, ["hidden size 192 is no multiple of 128"]),  # per_token_group_quant_fp8
    (Fp8("block", "dynamic", (64, 128)), 256, 64, ["intermediate size 64 is no multiple of the block [64, 128]"]),
    (Fp8("block", "dynamic", (128, 64)), 192, 128, []),
    (Fp8("block", "dynamic", (32, 32)), 96, 64, []),
    (Fp8("block", "dynamic", (16, 16)), 96, 64, ["no kernel for blocks of [16, 16]"]),
    (Fp8("channel"), 80, 48, []),
    (Fp8("tensor"), 80, 48, []),
    (Fp8("tensor", "static"), 80, 48, []),
]  # fmt: skip


def linear(fmt: Format, n: int, k: int) -> Tensors:
    """The tensors of a linear of a format."""
    if isinstance(fmt, Gptq):
        return gptq(n, k, bits=fmt.bits, group_size=fmt.group_size)
    if isinstance(fmt, Awq):
        return awq(n, k, group_size=fmt.group_size)
    assert isinstance(fmt, Fp8)
    static: dict[str, Stated] = {"input_scale": ONE} if fmt.activations == "static" else {}
    if fmt.block is not None:
        return fp8_block(n, k, fmt.block, **static)
    return fp8(n, k, (n, 1) if fmt.granularity == "channel" else (), **static)


@pytest.mark.parametrize(("fmt", "hidden", "intermediate", "expected"), EXPERTS)
def test_expert_limits(fmt: Format, hidden: int, intermediate: int, expected: list[str]) -> None:
    gate, up = (stated(linear(fmt, intermediate, hidden)) for _ in range(2))
    down = stated(linear(fmt, hidden, intermediate))
    for module in (gate, up, down):
        fmt.check(module)
    check(fmt.expert_limits([gate, up, down], hidden, intermediate), expected)
    for part in ([gate, up], [down]):  # a kernel's shapes are the same, whatever the other is in
        check(fmt.expert_limits(part, hidden, intermediate), expected)


@pytest.mark.parametrize("granularity", ["channel", "block"])
def test_experts_with_static_activations_need_one_scale_a_tensor(granularity: str) -> None:
    fmt = Fp8(granularity, "static", (128, 128) if granularity == "block" else None)
    expert = [stated(linear(fmt, 128, 128)) for _ in range(3)]
    assert f"{granularity} scales with static activations have no SGLang method" in fmt.expert_limits(expert, 128, 128)


def limits(
    fmt: Format, parts: Mapping[str, dict[str, Array]], *, experts: bool = False, unread: Sequence[str] = ()
) -> list[str]:
    """``value_limits`` of modules that hold these arrays; tensors whose leaf is ``unread`` are not at hand."""
    modules = [stated_of(arrays, name) for name, arrays in parts.items()]

    def read(info: TensorInfo) -> Array | None:
        module, _, leaf = info.name.rpartition(".")
        return None if leaf in unread else parts[module][leaf].reshape(-1)

    return fmt.value_limits(modules, read, experts=experts)


def packed(fmt: Gptq, *, word: int | None = None, g_idx: Array | None = None) -> dict[str, Array]:
    """A GPTQ linear of 64 inputs in groups of 32; ``word`` is every word of its zero points."""
    due = {("gptq", 4): 0x77777777, ("gptq_v2", 4): 0x88888888, ("gptq", 8): 0x7F7F7F7F, ("gptq_v2", 8): 0x80808080}
    pack, word = 32 // fmt.bits, due[fmt.layout, fmt.bits] if word is None else word
    return {
        "qweight": np.zeros((64 // pack, 32), np.int32),
        "qzeros": np.full((2, 32 // pack), word, np.uint32).view(np.int32),
        "scales": np.ones((2, 32), np.float16),
        "g_idx": np.arange(64, dtype=np.int32) // 32 if g_idx is None else g_idx,
    }


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_symmetric_means_the_zero_point_in_the_middle(layout: str, bits: int) -> None:
    fmt = Gptq(bits, 32, True, False, layout)
    other = Gptq(bits, 32, True, False, {"gptq": "gptq_v2", "gptq_v2": "gptq"}[layout])
    assert limits(fmt, {"a.gate_proj": packed(fmt), "a.up_proj": packed(fmt)}) == []
    (limit,) = limits(fmt, {"a.gate_proj": packed(fmt), "a.up_proj": packed(fmt, word=0x12345678)})
    assert limit.startswith(f"declared symmetric ({layout}), for which every word of qzeros is 0x")
    assert limits(fmt, {"a.up_proj": packed(fmt, word=0x12345678)}, unread=["qzeros"]) == []
    # The middle as the other layout stores it; two ways in one GEMM are one too many.
    assert limits(fmt, {"a.up_proj": packed(other)}, experts=True) == []
    (limit,) = limits(fmt, {"a.gate_proj": packed(fmt), "a.up_proj": packed(other)})
    assert limit.startswith("its parts store zero points in two ways")
    asymmetric = Gptq(bits, 32, False, False, layout)
    assert limits(asymmetric, {"a.up_proj": packed(fmt, word=0x12345678)}) == []


def test_g_idx_is_what_the_declaration_makes_of_it() -> None:
    # SGLang looks at g_idx only where desc_act is declared, and then at one for a fused linear.
    plain, act = Gptq(4, 32, True, False, "gptq"), Gptq(4, 32, True, True, "gptq")
    orders = [np.random.default_rng(seed).permutation(64).astype(np.int32) // 32 for seed in range(2)]
    mine, other = (packed(plain, g_idx=order) for order in orders)
    (limit,) = limits(plain, {"a.q_proj": packed(plain), "a.k_proj": mine})
    assert limit.startswith("declared without desc_act, but its g_idx does not count inputs in groups of 32")
    assert limits(plain, {"a.q_proj": packed(plain, g_idx=np.zeros(64, np.int32))}) == []
    without = {leaf: array for leaf, array in packed(plain).items() if leaf != "g_idx"}
    assert limits(plain, {"a.q_proj": without}) == []

    assert limits(act, {"a.q_proj": mine, "a.k_proj": mine}) == []
    (limit,) = limits(act, {"a.q_proj": mine, "a.k_proj": other})
    assert limit == "q_proj and k_proj run with one g_idx, but theirs differ (desc_act)"
    # Of an expert, gate and up share their input, down has its own.
    assert limits(act, {"e.gate_proj": mine, "e.up_proj": mine, "e.down_proj": other}, experts=True) == []
    assert len(limits(act, {"e.gate_proj": mine, "e.up_proj": other, "e.down_proj": other}, experts=True)) == 1


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_gate_and_up_of_an_expert_have_one_scale(names: tuple[str, str, str]) -> None:
    def projections(leaf: str, *values: float) -> dict[str, dict[str, Array]]:
        """Gate and up, or down."""
        arrays: dict[str, dict[str, Array]] = {}
        for name, value in zip(names[:2] if len(values) == 2 else names[2:], values, strict=True):
            scales = {"weight_scale": np.ones((), np.float32), "input_scale": np.ones(1, np.float32)}
            scales[leaf] = np.full_like(scales[leaf], value)
            arrays[f"e.{name}"] = scales
        return arrays

    fmt = Fp8("tensor", "static")
    for leaf, words in (("weight_scale", "per-tensor scales"), ("input_scale", "input scales")):
        assert limits(fmt, projections(leaf, 1, 1), experts=True) == []
        assert limits(fmt, projections(leaf, 2), experts=True) == []
        different = projections(leaf, 1, 2)
        check(limits(fmt, different, experts=True), [f"gate and up have different {words}"])
        assert limits(fmt, different, experts=True, unread=[leaf]) == []
        assert limits(fmt, different) == []  # a linear keeps one for each part
