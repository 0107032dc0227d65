"""AWQ as AutoAWQ packs it, read back exactly: ``q - zero`` takes 5 bits and an FP16 scale 11, float32 holds both."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from support.oracles import awq, awq_words, stated, stated_of

from mixprec_build.formats.awq import Awq
from mixprec_build.formats.registry import recognise


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.sampled_from((-1, 8, 32)), st.integers(0, 2**32 - 1))
def test_reads_what_is_packed(eights: int, groups: int, group_size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, k = 8 * eights, 16 if group_size == -1 else groups * group_size
    size = k if group_size == -1 else group_size
    q, zeros = rng.integers(0, 16, (k, n)), rng.integers(0, 16, (k // size, n))
    scales = rng.integers(1, 0x7C00, (k // size, n)).astype(np.uint16).view(np.float16)
    arrays = {"qweight": awq_words(q), "qzeros": awq_words(zeros), "scales": scales}
    config = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "GEMM"}
    found = recognise(stated_of(arrays), config)
    assert found == Awq(group_size)
    assert found.shape(stated_of(arrays)) == (n, k)
    group = np.arange(k) // size
    expected = (q - zeros[group]) * scales[group].astype(np.float64)
    ours = found.dequantize(arrays)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, expected.T)


def test_a_cut_along_an_axis_is_the_weight_of_the_cut() -> None:
    """What :meth:`axes` says is where the halves of a weight lie in its tensors."""
    rng = np.random.default_rng(0)
    fmt, n, k = Awq(32), 64, 128
    arrays = {
        "qweight": awq_words(rng.integers(0, 16, (k, n))),
        "qzeros": awq_words(rng.integers(0, 16, (k // 32, n))),
        "scales": rng.random((k // 32, n)).astype(np.float16),
    }
    weight = fmt.dequantize(arrays)
    for axis, size in (("n", n), ("k", k)):
        halves = []
        for half in range(2):
            cut = {}
            for leaf, array in arrays.items():
                along = getattr(fmt.axes(leaf), axis)
                assert array.shape[along.dim] * along.per == size
                cut[leaf] = np.split(array, 2, along.dim)[half]
            halves.append(fmt.dequantize(cut))
        np.testing.assert_array_equal(np.concatenate(halves, "nk".index(axis)), weight)


def test_the_shape_of_the_weight_follows_from_the_tensors() -> None:
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True}
    module = stated(awq(768, 2048, group_size=64, bias=("F16", (768,))))
    found = recognise(module, config)
    assert found == Awq(64)
    assert found.shape(module) == (768, 2048)
