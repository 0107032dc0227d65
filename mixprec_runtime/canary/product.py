"""Makes SGLang's layer for a few of a checkpoint's weights, multiplies, and compares with float64 arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from sglang.srt.utils import is_cpu
from torch.nn import Module

from mixprec_build.checkpoint.declaration import Declaration
from mixprec_build.families.names import SHARDS
from mixprec_build.families.unknown import UNKNOWN
from mixprec_build.formats.base import Format
from mixprec_build.patterns.pattern import Pattern

from ..config import MixPrecConfig
from ..formats.registry import served
from ..loading.ledger import DTYPES, default_dtype
from ..native import NativeFormat
from .choice import Experts, Linear

__all__ = ["LAUNCHES", "OF_EXPERTS", "Result", "Stored", "compare"]

LAUNCHES = 50
"""How often each product is repeated on the same input."""
TOKENS = (1, 64)
OF_EXPERTS = 1.5
"""Times the error of one product that of an expert may be: it multiplies what gate and up were rounded to."""
_PREFIX = "model.layers.0.mlp.experts"
_PARTS = UNKNOWN.projections[0].words
"""Gate, up and down, by the names that a quantization of any family reads."""

Stored = Callable[[str], Mapping[str, tuple[str, np.ndarray]]]
"""The tensors of a module by leaf: dtype, as in safetensors, and values."""


@dataclass(frozen=True, slots=True)
class Result:
    """What a product was, beside what it should be.

    Attributes:
        what: the formats, and the modules that the weights are of.
        error: the norm of the difference from float64 arithmetic, by the norm of the product; the largest seen.
        limit: what ``error`` may be: activations that are rounded to FP8 or Int8 cost more than rounding sums.
        differing: how many of ``launches`` products of the same input differ from the first.
    """

    what: str
    error: float
    limit: float
    differing: int
    launches: int

    @property
    def right(self) -> bool:
        # Not "error > limit", which a NaN is not.
        return self.error <= self.limit and not self.differing


def compare(case: Linear | Experts, stored: Stored, dtype: torch.dtype, device: torch.device) -> Result:
    """Runs SGLang's kernels for ``case``, on weights that ``stored`` reads; ``dtype`` is that of activations."""
    with torch.device(device), default_dtype(dtype), torch.no_grad():
        made = _linear(case, stored, dtype) if isinstance(case, Linear) else _experts(case, stored, dtype)
        formats = {case.fmt} if isinstance(case, Linear) else {fmt for pair in case.formats for fmt in pair}
        limit = max(served(fmt).product_error(fmt) for fmt in formats)
        if isinstance(case, Experts):
            limit *= OF_EXPERTS
        generator = torch.Generator(device).manual_seed(0)
        error, differing = 0.0, 0
        # Marlin's dense GEMM adds parts of sums atomically, so that they are rounded in any order: its product differs
        # by 3e-3 of the norm in BF16, and by 6e-4 in FP16.
        varies = torch.finfo(dtype).eps
        for tokens in TOKENS:
            x = torch.randn(tokens, made.inputs, generator=generator)
            run, due = made.on(x)
            found = ((run().double() - due).norm() / due.norm()).item()
            error = found if found != found else max(error, found)
            with _without_atomic_additions():
                first = run().double()
                for _ in range(LAUNCHES - 1):
                    differing += not bool((run().double() - first).norm() <= varies * first.norm())
    return Result(case.text, error, limit, differing, LAUNCHES * len(TOKENS))


@contextmanager
def _without_atomic_additions() -> Iterator[None]:
    """Has Marlin's GEMM of experts add up in a fixed order: in any order, two answers of gate, up and down are 1 % of
    their norm apart in BF16, as far as a race sets them."""
    from sglang.srt.layers.moe.fused_moe_triton import fused_marlin_moe

    gemm = getattr(fused_marlin_moe, "moe_wna16_marlin_gemm", None)
    if gemm is None:  # on a CPU
        yield
        return

    def in_order(*args: Any, **kwargs: Any) -> Any:
        return gemm(*args, **{**kwargs, "use_atomic_add": False})

    with patch.object(fused_marlin_moe, "moe_wna16_marlin_gemm", in_order):
        yield


@dataclass(frozen=True, slots=True)
class _Made:
    inputs: int
    on: Callable[[torch.Tensor], tuple[Callable[[], torch.Tensor], torch.Tensor]]
    """For an input: a function that multiplies it, and what it should return, in float64."""


def _linear(case: Linear, stored: Stored, dtype: torch.dtype) -> _Made:
    from sglang.srt.layers.linear import ReplicatedLinear

    tensors = stored(case.name)
    weight = _dequantized(case.fmt, tensors)
    outputs, inputs = weight.shape
    layer: Any = ReplicatedLinear(
        inputs, outputs, bias=False, params_dtype=dtype, quant_config=NativeFormat(case.fmt), prefix=case.name
    )
    for parameter, tensor in _parameters(layer, "", case.fmt, tensors):
        parameter.weight_loader(parameter, tensor)
    _process(layer)

    def on(x: torch.Tensor) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
        return lambda: layer.quant_method.apply(layer, x), x.double() @ weight.double().t()

    return _Made(inputs, on)


def _experts(case: Experts, stored: Stored, dtype: torch.dtype) -> _Made:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    read = [[stored(name) for name in parts] for parts in case.parts]
    weights = [
        [_dequantized(pair[part == 2], tensors) for part, tensors in enumerate(each)]
        for pair, each in zip(case.formats, read, strict=True)
    ]
    intermediate, hidden = weights[0][0].shape
    count = len(weights)
    layer: Any = FusedMoE(
        num_experts=count,
        hidden_size=hidden,
        intermediate_size=intermediate,
        layer_id=0,
        top_k=min(count, 8),
        params_dtype=dtype,
        quant_config=_config(case),
        prefix=_PREFIX,
        inplace=False,
    )
    for expert, (pair, each) in enumerate(zip(case.formats, read, strict=True)):
        for part, (shard, tensors) in enumerate(zip(SHARDS, each, strict=True)):
            weight = "w2" if part == 2 else "w13"
            for parameter, tensor in _parameters(layer, f"{weight}_", pair[part == 2], tensors):
                name = next(name for name, own in layer.named_parameters() if own is parameter)
                parameter.weight_loader(parameter, tensor, f"experts.{name}", shard_id=shard, expert_id=expert)
    for module in list(layer.modules()):
        _process(module)

    def on(x: torch.Tensor) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
        ids = torch.rand(len(x), count, generator=torch.Generator(x.device).manual_seed(1)).argsort(1)
        ids = ids[:, : min(count, 8)].to(torch.int32)
        shares = torch.linspace(1, 2, ids.shape[1], dtype=torch.float32).softmax(-1).repeat(len(x), 1)
        topk = StandardTopKOutput(topk_weights=shares, topk_ids=ids, router_logits=x[:, :1])

        def run() -> torch.Tensor:
            out: torch.Tensor = layer.quant_method.apply(layer, StandardDispatchOutput(x, None, topk)).hidden_states
            return out

        due = torch.zeros(x.shape, dtype=torch.float64)
        for expert, (gate, up, down) in enumerate(weights):
            token, choice = (ids == expert).nonzero(as_tuple=True)
            rows = x[token].double()
            hidden = torch.nn.functional.silu(rows @ gate.double().t()) * (rows @ up.double().t())
            due.index_add_(0, token, hidden @ down.double().t() * shares[token, choice, None].double())
        return run, due

    return _Made(hidden, on)


def _config(case: Experts) -> MixPrecConfig:
    """The quantization of a model that has these experts only."""
    formats = {fmt: f"format{number}" for number, fmt in enumerate(dict.fromkeys(f for p in case.formats for f in p))}
    rules = tuple(
        (Pattern(f"{_PREFIX}.{expert}.{part}"), formats[pair[part == _PARTS[-1]]])
        for expert, pair in enumerate(case.formats)
        for part in _PARTS
    )
    first = next(iter(formats.values()))
    made = MixPrecConfig(Declaration({name: fmt for fmt, name in formats.items()}, rules, first))
    made.bind([f"{_PREFIX}.{expert}.{part}" for expert in range(len(case.formats)) for part in _PARTS])
    return made


def _parameters(
    layer: Module, prefix: str, fmt: Format, tensors: Mapping[str, tuple[str, np.ndarray]]
) -> Iterator[tuple[Any, torch.Tensor]]:
    """Yields each parameter of ``layer`` that is loaded, and the tensor for it, on the CPU."""
    named = dict(layer.named_parameters(recurse=False))
    for leaf, (dtype, array) in tensors.items():
        if leaf != "bias":
            found = named.get(prefix + leaf, named.get(prefix + fmt.sglang_name(leaf)))
            if found is None:
                raise RuntimeError(f"SGLang's layer in {fmt.kind} has no parameter for {prefix}{leaf}")
            yield found, served(fmt).as_loaded(fmt, leaf, _as_tensor(dtype, array))


def _as_tensor(dtype: str, array: np.ndarray) -> torch.Tensor:
    with torch.device("cpu"):
        flat = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy())
        return flat.view(DTYPES[dtype]).reshape(array.shape)


def _dequantized(fmt: Format, tensors: Mapping[str, tuple[str, np.ndarray]]) -> torch.Tensor:
    """The weight ``[N, K]`` in float32, by the compiler's reference arithmetic."""
    dense = fmt.dequantize({leaf: array for leaf, (_, array) in tensors.items() if leaf != "bias"})
    return torch.tensor(dense)  # on the default device


def _process(module: Any) -> None:
    method = getattr(module, "quant_method", None)
    if method is not None:
        method.process_weights_after_loading(module)


def device_of_run() -> torch.device:
    """The device that layers are made on."""
    return torch.device("cpu" if is_cpu() else "cuda")
