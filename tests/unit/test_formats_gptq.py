"""GPTQ as auto-gptq 0.7.1 packs it, read back exactly.

The arithmetic leaves no room for a tolerance: ``q - zero`` takes 9 bits and an FP16 scale 11, so their product
is exact in float32, in the packer, in its forward pass and in ours.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.oracles import auto_gptq_packers, gptq, stated, stated_of

from mixprec_build.checkpoint.detection import detect
from mixprec_build.checkpoint.opening import open_checkpoint
from mixprec_build.formats.gptq import Gptq
from mixprec_build.formats.registry import recognise

Array = npt.NDArray[Any]

CUDA, CUDA_OLD = auto_gptq_packers()


@dataclass(frozen=True)
class Drawn:
    """A quantized linear as numbers: what is packed, and what must come back."""

    bits: int
    group_size: int
    q: Array  # [K, N]
    zeros: Array  # [G, N]
    scales: Array  # [G, N], float32 with values of FP16
    g_idx: Array  # [K]

    @property
    def weight(self) -> Array:
        """``[K, N]`` in float64, so that no rounding can hide here."""
        return (self.q - self.zeros[self.g_idx]) * self.scales[self.g_idx].astype(np.float64)

    def pack(self, packer: Any = CUDA, *, zeros: Array | None = None) -> Any:
        """auto-gptq's layer after its ``pack``; other ``zeros`` are stored beside the same ``q``."""
        k, n = self.q.shape
        zeros = self.zeros if zeros is None else zeros
        # pack() computes q = round((W + zero * scale) / scale) again, exactly, as W is made from these zeros.
        weight = (self.q - zeros[self.g_idx]) * self.scales[self.g_idx].astype(np.float64)
        layer = packer(self.bits, self.group_size, k, n, bias=False, weight_dtype=torch.float32)
        linear = torch.nn.Linear(k, n, bias=False)
        linear.weight.data = torch.tensor(weight.T, dtype=torch.float32)
        scales, points = torch.tensor(self.scales.T), torch.tensor(zeros.T, dtype=torch.float32)
        layer.pack(linear, scales, points, torch.tensor(self.g_idx, dtype=torch.int32))
        return layer


def tensors_of(layer: Any) -> dict[str, Array]:
    """What a checkpoint holds: the packer keeps scales in the dtype of the linear, on disk they are FP16."""
    arrays = {name: value.numpy() for name, value in layer.state_dict().items()}
    return {**arrays, "scales": arrays["scales"].astype(np.float16)}


@st.composite
def linears(draw: st.DrawFn, *, permuted: bool | None = None, sym: bool | None = None) -> Drawn:
    """Any codes, zero points and finite scales other than 0, subnormal and negative ones too."""
    bits = draw(st.sampled_from((4, 8)))
    n, k = 32 * draw(st.integers(1, 2)), 32 * draw(st.integers(1, 3))
    # Also sizes that leave the last group partial, and one larger than K.
    group_size = draw(st.sampled_from((-1, 128, 64, 32)) | st.integers(1, k + 1))
    size = k if group_size == -1 else group_size
    groups = -(-k // size)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # v1 stores zero - 1, so auto-gptq cannot pack a zero point of 0; test_zero_point_0 is about that.
    zeros = rng.integers(1, 2**bits, (groups, n))
    if draw(st.booleans()) if sym is None else sym:
        zeros[:] = 2 ** (bits - 1)
    scales = (rng.integers(1, 0x7C00, (groups, n)) | rng.integers(0, 2, (groups, n)) << 15).astype(np.uint16)
    g_idx = np.arange(k) // size
    if draw(st.booleans()) if permuted is None else permuted:
        g_idx = rng.permutation(g_idx)
    q = rng.integers(0, 2**bits, (k, n))
    return Drawn(bits, group_size, q, zeros, scales.view(np.float16).astype(np.float32), g_idx)


@settings(max_examples=60, deadline=None)
@given(linears())
def test_reads_what_auto_gptq_packs_and_computes(drawn: Drawn) -> None:
    layer = drawn.pack()
    arrays = tensors_of(layer)
    ordered = bool((np.diff(drawn.g_idx) >= 0).all())
    config = {"quant_method": "gptq", "bits": drawn.bits, "group_size": drawn.group_size, "desc_act": not ordered}
    module = stated_of(arrays)
    found = recognise(module, {**config, "sym": False})
    assert found == Gptq(drawn.bits, drawn.group_size, sym=False, desc_act=not ordered, layout="gptq")
    assert found.shape(module) == drawn.weight.T.shape

    ours = found.dequantize(arrays)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, drawn.weight.T)
    # Its own forward pass: against the identity each output is one weight times 1, plus zeros.
    np.testing.assert_array_equal(ours.T, layer(torch.eye(len(drawn.q))).numpy())


@settings(max_examples=30, deadline=None)
@given(linears(permuted=False))
def test_both_packers_agree_and_g_idx_may_be_absent(drawn: Drawn) -> None:
    arrays = tensors_of(drawn.pack(CUDA_OLD))
    fmt = Gptq(drawn.bits, drawn.group_size, sym=False, desc_act=False, layout="gptq")
    np.testing.assert_array_equal(fmt.dequantize(arrays), drawn.weight.T)
    del arrays["g_idx"]
    assert recognise(stated_of(arrays), {"quant_method": "gptq", **settings_of(fmt)}) == fmt
    np.testing.assert_array_equal(fmt.dequantize(arrays), drawn.weight.T)


@settings(max_examples=30, deadline=None)
@given(linears())
def test_gptq_v2_is_v1_with_zero_points_as_they_are(drawn: Drawn) -> None:
    # Given zeros + 1 the v1 packer stores zeros, which is what v2 is. Here a zero point of 0 is possible.
    fmt = Gptq(drawn.bits, drawn.group_size, sym=False, desc_act=True, layout="gptq_v2")
    moved = replace(drawn, zeros=drawn.zeros - 1)
    arrays = tensors_of(moved.pack(zeros=drawn.zeros))
    np.testing.assert_array_equal(fmt.dequantize(arrays), moved.weight.T)
    # The same tensors called v1 are another weight.
    np.testing.assert_array_equal(replace(fmt, layout="gptq").dequantize(arrays), drawn.weight.T)


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_point_0(bits: int) -> None:
    """v1 stores 0 as all ones, and auto-gptq's kernels wrap it around, as its ``qlinear_cuda_old`` does.

    Its packer does not: it lets the borrow run through the rest of the word, so the words are written by hand.
    """
    rng = np.random.default_rng(bits)
    drawn = Drawn(
        bits,
        32,
        rng.integers(0, 2**bits, (64, 32)),
        rng.integers(0, 2**bits, (2, 32)),
        rng.integers(1, 1000, (2, 32)).astype(np.float32),
        np.arange(64) // 32,
    )
    drawn.zeros[0, :3] = 0
    layer = drawn.pack(CUDA_OLD, zeros=np.maximum(drawn.zeros, 1))
    stored = ((drawn.zeros - 1) % 2**bits).astype(np.uint32).reshape(2, -1, 32 // bits)
    words = (stored << np.arange(0, 32, bits, dtype=np.uint32)).sum(axis=2, dtype=np.uint32)
    layer.qzeros = torch.from_numpy(words.view(np.int32))
    # q was packed for the other zero points; what counts is that both read the same.
    ours = Gptq(bits, 32, sym=False, desc_act=False, layout="gptq").dequantize(tensors_of(layer))
    np.testing.assert_array_equal(ours, drawn.weight.T)
    np.testing.assert_array_equal(ours.T, layer(torch.eye(64)).numpy())


def settings_of(fmt: Gptq) -> dict[str, object]:
    """A format as ``quantize_config.json`` states it."""
    return {
        "bits": fmt.bits,
        "group_size": fmt.group_size,
        "sym": fmt.sym,
        "desc_act": fmt.desc_act,
        "checkpoint_format": fmt.layout,
    }


def test_a_checkpoint_with_dynamic_overrides(tmp_path: Path) -> None:
    """From the packer through files: three formats in one checkpoint, settled by module name."""
    rng = np.random.default_rng(7)
    int4 = Gptq(4, 32, sym=False, desc_act=False, layout="gptq")
    expected = {
        "model.layers.0.mlp.up_proj": int4,
        "model.layers.1.mlp.up_proj": replace(int4, bits=8, group_size=64),
        "model.layers.2.mlp.up_proj": replace(int4, group_size=-1, desc_act=True),
    }
    tensors, weights = {"lm_head.weight": torch.zeros(4, 4)}, {}
    for name, fmt in expected.items():
        size = 128 if fmt.group_size == -1 else fmt.group_size
        drawn = Drawn(
            fmt.bits,
            fmt.group_size,
            rng.integers(0, 2**fmt.bits, (128, 64)),
            rng.integers(1, 2**fmt.bits, (128 // size, 64)),
            rng.integers(1, 1000, (128 // size, 64)).astype(np.float32) / 1024,
            np.arange(128) // size,
        )
        tensors |= {f"{name}.{leaf}": torch.from_numpy(array) for leaf, array in tensors_of(drawn.pack()).items()}
        weights[name] = drawn.weight.T
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    dynamic = {
        "-:lm_head": {},
        r"layers\.": {"bits": 8},  # matched from the start of the name, so this hits nothing
        r"+:.*\.1\..*": {"bits": 8, "group_size": 64},
        r".*\.2\.mlp": {"group_size": -1, "desc_act": True},
        r"+:.*\.layers\.": {"bits": 4},  # the first hit wins
    }
    declared = {"quant_method": "gptq", **settings_of(int4), "dynamic": dynamic}
    (tmp_path / "quantize_config.json").write_text(json.dumps(declared))

    checkpoint = open_checkpoint(str(tmp_path))
    found = detect(checkpoint)
    assert found.pop("lm_head").kind == "fp32"
    assert found == expected
    for name, fmt in expected.items():
        stored = {leaf: checkpoint.read(tensor) for leaf, tensor in checkpoint.modules[name].tensors.items()}
        np.testing.assert_array_equal(fmt.dequantize(stored), weights[name])


def test_the_shape_of_the_weight_follows_from_the_tensors() -> None:
    tensors = {"qweight": ("I32", (256, 768)), "qzeros": ("I32", (16, 96)), "scales": ("F16", (16, 768))}
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    found = recognise(stated(tensors), config)
    assert found == Gptq(4, 128, sym=True, desc_act=False, layout="gptq")
    assert found.shape(stated(tensors)) == (768, 2048)
    assert tensors == gptq(768, 2048, g_idx=None)
