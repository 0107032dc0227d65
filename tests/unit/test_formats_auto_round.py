"""AutoRound's packings as auto-round 0.16.1 itself packs them, read back exactly."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.oracles import auto_round_packer, stated_of

from mixprec_build.formats.awq import Awq
from mixprec_build.formats.base import Format, FormatError
from mixprec_build.formats.gptq import Gptq
from mixprec_build.formats.registry import recognise

Array = np.ndarray[Any, Any]

N, K, GROUP = 64, 256, 128
V1, V2 = Gptq(4, GROUP, True, False, "gptq"), Gptq(4, GROUP, True, False, "gptq_v2")
PACKINGS: dict[str, Format] = {
    "auto_round:auto_gptq": V1,
    "auto_round:gptq": V1,
    "auto_round": V2,
    "auto_round:exllamav2": V2,
    "auto_round:tritonv2": V2,
    "auto_round:gptqmodel": V2,
    "auto_round:auto_awq": Awq(GROUP),
    "auto_round:awq": Awq(GROUP),
}


@pytest.fixture(scope="module")
def packer() -> Any:
    return auto_round_packer()


def drawn(seed: int, zeros: Array | None = None) -> tuple[Array, Array, Array]:
    """A weight ``[N, K]`` on the grid of its scales and zero points ``[N, K / GROUP]``, and these two."""
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 16, (N, K))
    scales = rng.uniform(0.001, 0.1, (N, K // GROUP)).astype(np.float16).astype(np.float32)
    zeros = np.full(scales.shape, 8) if zeros is None else zeros
    group = np.arange(K) // GROUP
    # 5 bits times the 11 of an FP16 scale: float32 has both exactly, and so has what the packer divides again.
    return ((q - zeros[:, group]) * scales[:, group]).astype(np.float32), scales, zeros


def packed(make: Any, weight: Array, scales: Array, zeros: Any, *, awq: bool) -> dict[str, Array]:
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = torch.from_numpy(weight)
    scale, zero = torch.from_numpy(scales), torch.from_numpy(zeros).float() if isinstance(zeros, np.ndarray) else zeros
    if awq:
        # export_to_awq/export.py: pack_layer hands scales and zero points over with inputs first
        zero = zero.t().contiguous() if isinstance(zero, torch.Tensor) else zero
        layer = make.from_linear(linear, 4, GROUP, scales=scale.t().contiguous(), zeros=zero)
    else:
        layer = make(4, GROUP, K, N, bias=False)
        layer.device = "cpu"
        layer.pack(linear, scale, zero, None, device="cpu")
    return {name: tensor.numpy() for name, tensor in layer.state_dict().items()}


def declared(packing: str, **values: object) -> dict[str, object]:
    return {
        "quant_method": "auto-round", "packing_format": packing, "bits": 4, "group_size": GROUP, "sym": True,
        "data_type": "int", **values,
    }  # fmt: skip


@pytest.mark.parametrize("one_number", [False, True], ids=["a tensor", "one number"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_symmetric_weights_are_read_as_auto_round_packs_them(packer: Any, packing: str, one_number: bool) -> None:
    """auto-round hands its packers the zero points as a tensor, or the one that all are."""
    due = PACKINGS[packing]
    weight, scales, zeros = drawn(len(packing))
    arrays = packed(packer(packing), weight, scales, 8 if one_number else zeros, awq=isinstance(due, Awq))
    module = stated_of(arrays)
    found = recognise(module, declared(packing))
    assert found == due
    assert found.as_stored(module, lambda info: arrays[info.name.rpartition(".")[2]]) == due
    assert found.value_limits([module], lambda info: arrays[info.name.rpartition(".")[2]], experts=False) == []
    np.testing.assert_array_equal(found.dequantize(arrays), weight)


@pytest.mark.parametrize("packing", PACKINGS)
def test_asymmetric_weights_too(packer: Any, packing: str) -> None:
    """From 1 on: its packer of zero points minus one stores 0 as 1."""
    awq = isinstance(PACKINGS[packing], Awq)
    weight, scales, zeros = drawn(len(packing), np.random.default_rng(1).integers(1, 16, (N, K // GROUP)))
    arrays = packed(packer(packing), weight, scales, zeros, awq=awq)
    found = recognise(stated_of(arrays), declared(packing, sym=False))
    np.testing.assert_array_equal(found.dequantize(arrays), weight)


def test_a_packing_that_is_not_known_is_refused(packer: Any) -> None:
    weight, scales, zeros = drawn(0)
    arrays = packed(packer("auto_round"), weight, scales, zeros, awq=False)
    with pytest.raises(FormatError, match="AutoRound's packing_format 'auto_round:turned' is not read"):
        recognise(stated_of(arrays), declared("auto_round:turned"))
