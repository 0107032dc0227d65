"""The canary's limits lie between right products, rounded as kernels round, and wrong ones: simulated on a CPU.

A simulated kernel rounds activations as the format's kernel does, adds slices of the inputs in any order, each rounded
to the model's dtype, and rounds what it hands on.
"""

from __future__ import annotations

import pytest
import torch
from support import formats as packers
from support.serving import quantize
from support.sglang.layers import FORMATS

from mixprec_build.formats.base import Format
from mixprec_build.formats.fp8 import Fp8
from mixprec_build.formats.int8 import Int8
from mixprec_build.formats.w4afp8 import W4afp8

pytestmark = pytest.mark.usefixtures("sglang")

DTYPES = [torch.bfloat16, torch.float16]
SIZE, SLICES = 512, 4
LARGEST = 448
"""Of E4M3."""
Experts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Gate, up and down, ``[N, K]``."""


def weight(seed: int, outputs: int = SIZE, inputs: int = SIZE) -> torch.Tensor:
    """A weight whose blocks and rows are of various sizes, as those of trained models, so that their scales differ."""
    made = torch.Generator().manual_seed(seed)
    blocks = torch.randn(outputs // 128, inputs // 32, generator=made).mul(0.4).exp()
    rows = torch.randn(outputs, 1, generator=made).mul(0.3).exp()
    values = torch.randn(outputs, inputs, generator=made)
    return values * rows * blocks.repeat_interleave(128, 0).repeat_interleave(32, 1) / inputs**0.5


def rounded(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Activations as the kernel multiplies them: in FP8 or Int8, with a scale for a token's group, a token, or all."""
    if isinstance(fmt, Fp8 | Int8) and fmt.activations != "none":
        block = fmt.block[1] if fmt.block else 0
        groups = x.unflatten(-1, (-1, block)) if block else x[:, None] if fmt.granularity == "channel" else x[None]
        largest = groups.abs().amax((-1, -2) if fmt.granularity == "tensor" else -1, keepdim=True)
        if isinstance(fmt, Fp8):
            return (in_fp8(groups * LARGEST / largest) * largest / LARGEST).reshape(x.shape)
        scaled = groups * 127 / largest
        whole = scaled.trunc() if block else scaled.round()
        return (whole * largest / 127).reshape(x.shape)
    if isinstance(fmt, W4afp8):
        return in_fp8(x * LARGEST / x.abs().max()) * x.abs().max() / LARGEST
    return x


def in_fp8(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float8_e4m3fn).float()


def multiplied(
    x: torch.Tensor, dense: torch.Tensor, fmt: Format, order: tuple[int, ...] = (0, 1, 2, 3)
) -> torch.Tensor:
    """``x [T, K]`` by a weight ``[N, K]``, in the dtype of ``x``."""
    activations = rounded(x.float(), fmt)
    # Marlin and dense kernels multiply weights in the model's dtype, the others by scales in float32.
    weights = dense if rounded(x.float(), fmt) is not x and isinstance(fmt, Fp8 | Int8 | W4afp8) else dense.to(x.dtype)
    out = torch.zeros(len(x), len(dense), dtype=x.dtype)
    slices = list(zip(activations.chunk(SLICES, 1), weights.float().chunk(SLICES, 1), strict=True))
    for number in order:
        part, factors = slices[number]
        out += (part @ factors.t()).to(x.dtype)
    return out


def expert(x: torch.Tensor, dense: Experts, fmt: Format) -> torch.Tensor:
    gate, up, down = dense
    hidden = torch.nn.functional.silu(multiplied(x, gate, fmt).float()) * multiplied(x, up, fmt).float()
    return multiplied(hidden.to(x.dtype), down, fmt)


def due(x: torch.Tensor, dense: Experts) -> torch.Tensor:
    gate, up, down = (one.double() for one in dense)
    return (torch.nn.functional.silu(x.double() @ gate.t()) * (x.double() @ up.t())) @ down.t()


def off(found: torch.Tensor, right: torch.Tensor) -> float:
    """As the canary measures it."""
    return float((found.double() - right.double()).norm() / right.double().norm())


def limit_of(fmt: Format, *, experts: bool = False) -> float:
    from mixprec_runtime.canary.product import OF_EXPERTS
    from mixprec_runtime.formats.registry import served

    return served(fmt).product_error(fmt) * (OF_EXPERTS if experts else 1)


def inputs(tokens: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(tokens, SIZE, generator=torch.Generator().manual_seed(tokens)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FORMATS)
def test_right_products_are_within_the_limit(kind: str, dtype: torch.dtype) -> None:
    fmt = FORMATS[kind]
    dense = tuple(quantize(weight(seed), kind)[1].float() for seed in range(3))
    for tokens in (1, 64):
        x = inputs(tokens, dtype)
        linear = off(multiplied(x, dense[0], fmt), x.double() @ dense[0].double().t())
        assert 0 < linear < 0.8 * limit_of(fmt)
        assert 0 < off(expert(x, dense, fmt), due(x, dense)) < 0.8 * limit_of(fmt, experts=True)


@pytest.mark.parametrize("kind", FORMATS)
def test_wrong_scales_are_beyond_the_limit(kind: str) -> None:
    """Those of the next group, row or block; and all of them a tenth too large."""
    fmt = FORMATS[kind]
    tensors, dense = quantize(weight(0), kind)
    x = inputs(64, torch.bfloat16)
    right = x.double() @ dense.double().t()
    wrong = [dense.float() * 1.1]
    for leaf, scale in tensors.items():
        if leaf in ("scales", "weight_scale", "weight_scale_inv", "scale") and scale.numel() > 1:
            along = 0 if scale.shape[0] > 1 else 1
            raw = scale.view(torch.uint8) if scale.element_size() == 1 else scale
            moved = {**tensors, leaf: raw.roll(1, along).view(scale.dtype)}
            wrong.append(packers.dequantize(moved, torch.bfloat16).float())
    assert len(wrong) == 1 + (kind not in ("bf16", "fp8_tensor"))
    assert all(off(multiplied(x, one, fmt), right) > limit_of(fmt) for one in wrong)


def test_wrong_experts_are_beyond_the_limit() -> None:
    """Gate and up in each other's place; scales of down a tenth too large."""
    x = inputs(64, torch.bfloat16)
    gate, up, down = (weight(seed) for seed in range(3))
    for fmt in FORMATS.values():
        right = due(x, (gate, up, down))
        assert off(expert(x, (up, gate, down), fmt), right) > limit_of(fmt, experts=True)
        assert off(expert(x, (gate, up, down * 1.1), fmt), right) > limit_of(fmt, experts=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_of_additions_is_no_race(dtype: torch.dtype) -> None:
    """Launches of one product may differ by the dtype's rounding step (``varies`` in ``canary/product.py``)."""
    fmt, dense = FORMATS["gptq_int4"], quantize(weight(0), "gptq_int4")[1].float()
    x = inputs(64, dtype)
    first = multiplied(x, dense, fmt)
    orders = [(3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)]
    differ = [off(multiplied(x, dense, fmt, order), first) for order in orders]
    assert min(differ) > 0 and max(differ) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_points_of_another_group_in_one_tile_are_a_race(dtype: torch.dtype) -> None:
    """One tile of 64 outputs, in one of 16 groups of inputs, as a warp gets it that reads too late."""
    tensors, dense = quantize(weight(0, 1536, 2048), "awq_int4")
    raced = dense.float().clone()
    raced[64:128, 256:384] += tensors["scales"][2, 64:128, None]  # a zero point less by one
    x = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0)).to(dtype)
    fmt = FORMATS["awq_int4"]
    differs = off(multiplied(x, raced, fmt), multiplied(x, dense.float(), fmt))
    assert differs > torch.finfo(dtype).eps
