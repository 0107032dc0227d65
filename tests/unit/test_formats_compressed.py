"""compressed-tensors: its packed weights against its own compressor, exactly, and how config groups are found."""

from __future__ import annotations

import re
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracles import Stated, compressed, config_group, fp8, fp8_block, packed, stated, stated_of

from mixprec_build.formats.base import Format, FormatError
from mixprec_build.formats.fp8 import Fp8
from mixprec_build.formats.int8 import Int8
from mixprec_build.formats.packed import Packed
from mixprec_build.formats.registry import format_from_json, recognise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

Array = npt.NDArray[Any]
BF16 = np.dtype(ml_dtypes.bfloat16)
TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
ONE: Stated = ("F32", (1,))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from((4, 8)), st.sampled_from((-1, 32, 64)), st.booleans(), st.integers(1, 3), st.integers(0, 2**32 - 1)
)
def test_reads_what_compressed_tensors_packs(bits: int, group_size: int, sym: bool, groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, k = 16, 64 * groups
    half, count = 1 << (bits - 1), 1 if group_size == -1 else k // group_size
    strategy = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    scheme = QuantizationScheme(
        targets=["Linear"], weights=QuantizationArgs(num_bits=bits, type="int", symmetric=sym, **strategy)
    )
    q = torch.from_numpy(rng.integers(-half, half, (n, k)).astype(np.int8))
    scale = torch.from_numpy(np.exp2(rng.uniform(-12, 2, (n, count))).astype(np.float32)).bfloat16()
    tensors = {"weight_packed": pack_to_int32(q, bits), "weight_scale": scale, "weight_shape": torch.tensor([n, k])}
    if not sym:
        zeros = torch.from_numpy(rng.integers(-half, half, (n, count)).astype(np.int8))
        tensors["weight_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0).contiguous()
    arrays = {leaf: t.numpy() for leaf, t in tensors.items() if leaf != "weight_scale"}
    arrays["weight_scale"] = scale.view(torch.int16).numpy().view(BF16)

    found = recognise(stated_of(arrays), compressed("pack-quantized", scheme_json(scheme)))
    assert found == Packed(bits, group_size, sym, False)
    assert found.shape(stated_of(arrays)) == (n, k)
    ours = found.dequantize(arrays)
    assert ours.dtype == np.float32
    # Their arithmetic is that of the scales' dtype; in float32 the product is exact.
    theirs = PackedQuantizationCompressor.decompress({**tensors, "weight_scale": scale.float()}, scheme)["weight"]
    np.testing.assert_array_equal(ours, theirs.float().numpy())


def scheme_json(scheme: QuantizationScheme) -> Any:
    return {**scheme.model_dump(mode="json"), "input_activations": None}


def test_inputs_in_groups_of_their_own() -> None:
    rng = np.random.default_rng(0)
    group = rng.permutation(64).astype(np.int32) // 32
    q = rng.integers(0, 16, (8, 64))
    words = (q.reshape(8, 8, 8) << np.arange(0, 32, 4)).sum(2).astype(np.uint32).view(np.int32)
    scale = rng.random((8, 2)).astype(np.float16)
    arrays = {"weight_packed": words, "weight_scale": scale, "weight_g_idx": group}
    config = compressed("pack-quantized", config_group(group_size=32, actorder="group"))
    found = recognise(stated_of(arrays), config)
    assert found == Packed(4, 32, True, True)
    np.testing.assert_array_equal(found.dequantize(arrays), (q - 8) * scale.astype(np.float32)[:, group])
    # `weight`, and its other name `static`, order inputs while quantizing only.
    for order in ("weight", "static", None, False):
        plain = compressed("pack-quantized", config_group(group_size=128, actorder=order))
        assert recognise(stated(packed(256, 512)), plain) == Packed(4, 128, True, False)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_a_cut_along_an_axis_is_the_weight_of_the_cut(sym: bool, group_size: int) -> None:
    rng = np.random.default_rng(1)
    fmt, n, k = Packed(4, group_size, sym, False), 32, 128
    groups = 1 if group_size == -1 else k // 32
    arrays: dict[str, Array] = {
        "weight_packed": rng.integers(-(2**31), 2**31, (n, k // 8)).astype(np.int32),
        "weight_scale": rng.random((n, groups)).astype(np.float32),
    }
    if not sym:
        arrays["weight_zero_point"] = rng.integers(-(2**31), 2**31, (n // 8, groups)).astype(np.int32)
    weight = fmt.dequantize(arrays)
    for axis, size in (("n", n), ("k", k)):
        halves = []
        for half in range(2):
            cut = {}
            for leaf, array in arrays.items():
                along = getattr(fmt.axes(leaf), axis)
                assert along is None or array.shape[along.dim] * along.per == size
                cut[leaf] = array if along is None else np.split(array, 2, along.dim)[half]
            halves.append(fmt.dequantize(cut))
        np.testing.assert_array_equal(np.concatenate(halves, "nk".index(axis)), weight)


# Which group


INT4 = config_group("re:.*mlp.*", group_size=128)
EIGHT = config_group("re:.*self_attn.*", kind="float", num_bits=8, strategy="channel", activations=TOKEN)
MIXED = compressed(
    "mixed-precision",
    {**INT4, "format": "pack-quantized"},
    {**EIGHT, "format": "float-quantized"},
    {**config_group("Linear", num_bits=8, strategy="channel"), "format": "pack-quantized"},
    {**config_group("model.layers.3.mlp.down_proj", group_size=32), "format": "pack-quantized"},
    ignore=["lm_head", "re:.*layers\\.7\\..*"],
)


@pytest.mark.parametrize(
    ("name", "tensors", "expected"),
    [
        ("model.layers.0.mlp.up_proj", packed(256, 512), Packed(4, 128, True, False)),
        ("model.layers.0.self_attn.q_proj", fp8(256, 512, (256, 1)), Fp8("channel")),
        # A name goes before a regular expression, and that before a class.
        ("model.layers.3.mlp.down_proj", packed(256, 512, group_size=32), Packed(4, 32, True, False)),
        ("model.layers.0.other", packed(256, 512, bits=8, group_size=-1), Packed(8, -1, True, False)),
    ],
)
def test_each_module_is_in_the_format_of_its_group(name: str, tensors: dict[str, Stated], expected: Format) -> None:
    assert recognise(stated(tensors, name), MIXED) == expected


E4M3_BLOCK = config_group(kind="float", num_bits=8, strategy="block", block_structure=[128, 128], activations=TOKEN)
E4M3_WEIGHT = config_group(kind="float", num_bits=8, strategy="channel")
I8 = config_group(num_bits=8, strategy="channel", activations={**TOKEN, "type": "int"})
E4M3_STATIC = config_group(kind="float", num_bits=8, strategy="tensor", activations=STATIC)


@pytest.mark.parametrize(
    ("tensors", "config", "expected"),
    [
        (fp8(256, 512, (2, 4)), compressed("float-quantized", E4M3_BLOCK),
         Fp8("block", "dynamic", (128, 128), "weight_scale")),
        (fp8(128, 128, (1, 1)), compressed("float-quantized", E4M3_BLOCK),
         Fp8("block", "dynamic", (128, 128), "weight_scale")),
        (fp8(256, 512, (256, 1)), compressed("float-quantized", E4M3_WEIGHT), Fp8("channel", "none")),
        (fp8(256, 512, (1,), input_scale=ONE), compressed("float-quantized", E4M3_STATIC), Fp8("tensor", "static")),
        (fp8(256, 512, (256, 1), weight=("I8", (256, 512))), compressed("int-quantized", I8), Int8("channel")),
    ],
)  # fmt: skip
def test_eight_bits_unpacked(tensors: dict[str, Stated], config: dict[str, Any], expected: Format) -> None:
    found = recognise(stated(tensors), config)
    assert found == expected
    assert format_from_json(found.to_json()) == found


def test_blocks_are_one_format_under_either_name() -> None:
    theirs, usual = Fp8("block", "dynamic", (128, 128), "weight_scale"), Fp8("block", "dynamic", (128, 128))
    assert theirs.fuses_as == usual.fuses_as and theirs != usual
    arrays = {"weight": np.arange(128 * 128, dtype=np.uint8).reshape(128, 128).view(ml_dtypes.float8_e4m3fn)}
    scale = np.full((1, 1), 0.5, np.float32)
    np.testing.assert_array_equal(
        theirs.dequantize({**arrays, "weight_scale": scale}), usual.dequantize({**arrays, "weight_scale_inv": scale})
    )


def test_weights_alone_are_no_w8a8() -> None:
    """FP8 whose activations stay as they are: Marlin for linears, nothing for experts."""
    fmt = Fp8("channel", "none")
    assert fmt.linear_limits([stated(fp8(128, 256, (128, 1)))]) == []
    (limit,) = fmt.linear_limits([stated(fp8(96, 256, (96, 1)))])
    assert limit == "its 96 outputs are no multiple of 64, which Marlin needs"
    parts = [stated(fp8(128, 128, (128, 1))) for _ in range(3)]
    assert fmt.expert_limits(parts, 128, 128) == ["experts in FP8 with unquantized activations have no SGLang method"]
    assert Fp8("block", "none", (128, 128)).linear_limits([stated(fp8_block(128, 128))]) == [
        "fp8_block with unquantized activations has no SGLang method"
    ]
    assert Int8("channel", "none").linear_limits([stated(fp8(128, 128, (128, 1)))]) == [
        "int8_channel with unquantized activations has no SGLang method"
    ]


def limits_of(fmt: Packed, arrays: dict[str, dict[str, Array]], *, experts: bool = False) -> list[str]:
    modules = [stated_of(leaves, name) for name, leaves in arrays.items()]

    def read(info: Any) -> Array:
        module, _, leaf = info.name.rpartition(".")
        return arrays[module][leaf].reshape(-1)

    return fmt.value_limits(modules, read, experts=experts)


def test_values_that_contradict_the_shapes() -> None:
    fmt = Packed(4, 32, True, True)
    order = np.arange(64, dtype=np.int32) // 32

    def linear(k: int = 64, g_idx: Array = order) -> dict[str, Array]:
        shape = {"weight_shape": np.array([8, k]), "weight_scale": np.ones((8, 2), np.float16)}
        return {"weight_packed": np.zeros((8, 8), np.int32), "weight_g_idx": g_idx, **shape}

    assert limits_of(fmt, {"a.q_proj": linear(), "a.k_proj": linear()}) == []
    assert limits_of(fmt, {"a.q_proj": linear(60)}) == [
        "weight_shape of q_proj says [8, 60], its other tensors hold [8, 64]"
    ]
    other = {"a.gate_proj": linear(), "a.up_proj": linear(g_idx=order[::-1].copy())}
    assert limits_of(fmt, other) == ["gate_proj and up_proj run with one weight_g_idx, but theirs differ"]


# What is refused


PLAIN = compressed()


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (packed(256, 512, weight_scale=None), PLAIN, "ct_int4 needs weight_scale"),
        (packed(256, 512, weight_scale=("BF16", (256,))), PLAIN, "weight_scale BF16 [256]: two dimensions were expect"),
        (packed(256, 512, group_size=64), PLAIN,
         "weight_scale BF16 [256, 8]: [256, 4] was expected for 256 outputs and 512 inputs in groups of 128"),
        (packed(256, 512, bits=8), PLAIN, "weight_scale BF16 [256, 4]: [256, 8] was expected for 256 outputs and 1024"),
        (packed(256, 512, weight_zero_point=("I32", (32, 4))), PLAIN,
         "weight_zero_point I32 [32, 4] does not belong to ct_int4"),
        (packed(256, 512), compressed("pack-quantized", config_group(group_size=128, symmetric=False)),
         "ct_int4 needs weight_zero_point"),
        (packed(256, 512, weight_g_idx=("I32", (512,))), PLAIN, "weight_g_idx I32 [512] does not belong to ct_int4"),
        (packed(256, 512), compressed("pack-quantized", config_group(group_size=128, actorder="group")),
         "ct_int4 needs weight_g_idx"),
        (packed(256, 512), compressed(ignore=["re:.*down_proj"]), "stored quantized, although `ignore` of"),
        (packed(256, 512), compressed(ignore=["model.layers.0.mlp.down_proj"]), "stored quantized, although `ignore`"),
        (packed(256, 512), compressed("pack-quantized", config_group("lm_head", group_size=128)),
         "stored quantized, but the targets of no config group cover it"),
        (packed(256, 512), compressed("pack-quantized", config_group(group_size=128, num_bits=3)),
         "config group 'group_0' (pack-quantized, 3 bit int, group) is not read, only 4 and 8 bit are"),
        (packed(256, 512), compressed("pack-quantized", config_group(group_size=128, activations=TOKEN)),
         "stored as W4A8 (weight_packed I32 [256, 64] of config group 'group_0' (pack-quantized, 4 bit int, group))"),
        (packed(256, 512), compressed("marlin-24", config_group(group_size=128)),
         "weight_packed I32 [256, 64] of config group 'group_0' (marlin-24, 4 bit int, group) is not read"),
        (packed(256, 512), compressed("pack-quantized", config_group(strategy="tensor")),
         "config group 'group_0' (pack-quantized, 4 bit int, tensor) is not read: packed weights have scales by"),
        (packed(256, 512), compressed("pack-quantized", config_group()), "group_size None of packed weights is neithe"),
        (packed(256, 512), {"quant_method": "compressed-tensors"},
         "weight_packed, but quantization_config has no config_groups that say how"),
        # FP8 and Int8 that are declared otherwise
        (fp8(256, 512, (256, 1)), PLAIN,
         "stored as fp8_channel, but declared by config group 'group_0' (pack-quantized, 4 bit int, group)"),
        (fp8(256, 512, (1,)), compressed("float-quantized", E4M3_WEIGHT), "weight_scale F32 [1]: [256] was expected"),
        (fp8(256, 512, (2, 4)), compressed("float-quantized", E4M3_WEIGHT),
         "weight_scale F32 [2, 4] are no scales as declared by config group"),
        (fp8(256, 512, (256, 1)), compressed("int-quantized", I8), "stored as fp8_channel, but declared by config gro"),
        (fp8(256, 512, (256, 1), input_scale=ONE), compressed("float-quantized", E4M3_WEIGHT),
         "config group 'group_0' (float-quantized, 8 bit float, channel) has unquantized activations, but the module"),
        (fp8(256, 512, (1,)), compressed("float-quantized", E4M3_STATIC),
         "config group 'group_0' (float-quantized, 8 bit float, tensor) has static activations, but the module has no"),
        # Nonsense
        (packed(256, 512), compressed(config_groups=[]), "config_groups [] are not 1 to 256 named groups"),
        (packed(256, 512), compressed(config_groups={}), "config_groups {} are not 1 to 256 named groups"),
        (packed(256, 512), compressed(ignore="lm_head"), "ignore: targets 'lm_head' are not a list of names"),
        (packed(256, 512), compressed(ignore=[1]), "ignore: targets [1] are not a list of names"),
        (packed(256, 512), compressed("pack-quantized", None), "config group 'group_0': targets None are not a list"),
        (packed(256, 512), compressed(config_groups={"g": {"targets": ["Linear"]}}),
         "config group 'g' says nothing of its weights"),
        (packed(256, 512), compressed([[]]), "config group 'group_0' has the format [[]]"),
        (packed(256, 512), compressed("pack-quantized", config_group(num_bits="4")), "config group 'group_0' has weig"),
        (packed(256, 512), compressed("pack-quantized", config_group(group_size=10**400)),
         "weight_scale BF16 [256, 4]: [256, 1] was expected"),
        (packed(256, 512), compressed("pack-quantized", config_group(group_size=True)), "config group 'group_0' has w"),
        (packed(256, 512), compressed("pack-quantized", config_group(dynamic=True)), "config group 'group_0' has dyna"),
        (packed(256, 512), compressed("pack-quantized", config_group(actorder=[])), "config group 'group_0' has weigh"),
        (packed(256, 512), compressed("pack-quantized", config_group(activations={"num_bits": 10**400})),
         "config group 'group_0' quantizes activations to 1000"),
        (packed(256, 512), compressed("pack-quantized", config_group(activations={"symmetric": False})),
         "config group 'group_0' quantizes activations asymmetrically"),
        (packed(256, 512), compressed(ignore=["re:(a+)+$"]), "quantization_config holds 're:(a+)+$': a regular"),
        (packed(256, 512), compressed(ignore=["re:a"] * 5000), "ignore holds more than 100000 names or 4096 regular"),
        (fp8(256, 512, (2, 4)), compressed("float-quantized", {**E4M3_BLOCK, "weights": {**E4M3_BLOCK["weights"],
         "block_structure": "128x128"}}), "weight_block_size '128x128' is no pair of positive numbers"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_told(tensors: dict[str, Stated], config: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match="^" + re.escape(message)) as caught:
        recognise(stated(tensors), config)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("fmt", "n", "k", "expected"),
    [
        (Packed(4, 128, True, False), 64, 128, []),
        (Packed(8, -1, True, False), 64, 128, []),
        (Packed(4, 32, False, False), 64, 128, []),
        (Packed(8, 128, False, False), 64, 128, ["mixprec does not serve asymmetric ct_int8"]),
        (Packed(4, 16, True, False), 64, 128, ["mixprec does not serve group size 16"]),
        (
            Packed(4, 32, True, False),
            96,
            192,
            ["96 outputs are no multiple of 64", "192 inputs are no multiple of 128"],
        ),
    ],
)
def test_what_sglangs_kernels_do_not_take(fmt: Packed, n: int, k: int, expected: list[str]) -> None:
    zeros: dict[str, Stated] = {}
    if not fmt.sym:
        zeros = {"weight_zero_point": ("I32", (n // fmt.pack, 1 if fmt.group_size == -1 else k // fmt.group_size))}
    module = stated(packed(n, k, bits=fmt.bits, group_size=fmt.group_size, **zeros))
    fmt.check(module)
    found = fmt.linear_limits([module])
    assert len(found) == len(expected) and all(words in limit for words, limit in zip(expected, found, strict=True))
    asymmetric = "asymmetric experts of compressed-tensors are misread by SGLang"
    assert (asymmetric in fmt.expert_limits([module], 128, 128)) is not fmt.sym
