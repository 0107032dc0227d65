"""NVFP4 on Marlin: SGLang's methods of ModelOpt's, also for what compressed-tensors stores.

SGLang's own methods of compressed-tensors run on Blackwell only before 0.5.22. The bytes are the same but for names,
and for the scale of all, of which compressed-tensors stores one over it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization import modelopt_quant
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from torch.nn import Parameter

from mixprec_build.formats.base import Format
from mixprec_build.formats.nvfp4 import Nvfp4

from .base import Served
from .marlin import (
    PACKED_AS_WEIGHT,
    ROUTER_WEIGHTS,
    create_runner,
    may_get_negative_ids,
    rename,
    require_activation,
    require_shapes,
    skip_negative_ids,
)
from .places import make_input_scale
from .repair import ADVICE, ISSUES, PULLS, Call, Repair

__all__ = ["ServedNvfp4"]


_BLOCK = 16
_FILE = "srt/layers/quantization/modelopt_quant.py"


class _OnMarlin(modelopt_quant.ModelOptFp4Config):
    """Marlin for linears as for experts, whether there are scales of inputs or not: it does not use them."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        if torch.cuda.is_available() and torch.cuda.get_device_capability() >= (10, 0):
            raise ValueError(
                f"{prefix}: on this GPU SGLang runs NVFP4 on kernels that mixprec does not serve yet; build the "
                "checkpoint with another format for it, or serve it on compute capability 8.0 to 9.0"
            )
        if isinstance(layer, LinearBase):
            return modelopt_quant.ModelOptNvFp4A16LinearMethod(self)
        return super().get_quant_method(layer, prefix)


def _is_compressed(fmt: Nvfp4) -> bool:
    return fmt.producer == "compressed-tensors"


# ModelOpt's names, and what compressed-tensors calls them
_RENAMED = (
    ("weight", "weight_packed"),
    ("weight_scale_2", "weight_global_scale"),
    ("input_scale", "input_global_scale"),
)


def _create_compressed(prefixes: tuple[str, ...]) -> Callable[..., None]:
    def create_weights(call: Call, layer: Any, *args: Any, **kwargs: Any) -> None:
        if prefixes != ("",):
            kwargs["weight_loader"] = _by_their_names(kwargs["weight_loader"])
        call.stock(layer, *args, **kwargs)
        for prefix in prefixes:
            for theirs, name in _RENAMED:
                rename(layer, f"{prefix}{theirs}", f"{prefix}{name}")

    return create_weights


def _by_their_names(load: Callable[..., None]) -> Callable[..., None]:
    """Experts' loaders look for words in the name of what they load."""

    def load_renamed(parameter: Parameter, tensor: torch.Tensor, weight_name: str, **where: Any) -> None:
        for theirs, name in _RENAMED:
            weight_name = weight_name.replace(name, theirs)
        load(parameter, tensor, weight_name, **where)

    return load_renamed


def _process_compressed(prefixes: tuple[str, ...]) -> Callable[..., None]:
    def process_weights_after_loading(call: Call, layer: Any) -> None:
        for prefix in prefixes:
            for theirs, name in _RENAMED:
                rename(layer, f"{prefix}{name}", f"{prefix}{theirs}")
            scale = layer._parameters[f"{prefix}weight_scale_2"]
            scale.data = 1 / scale.data
        call.stock(layer)

    return process_weights_after_loading


def _compressed(layer: str, prefixes: tuple[str, ...]) -> Repair:
    return Repair(
        name=f"NVFP4 of compressed-tensors ({layer})",
        why="Its own methods run on Blackwell only before 0.5.22. ModelOpt's take the same bytes by other names, and "
        "the scale of all where compressed-tensors stores one over it.",
        where="srt/layers/quantization/compressed_tensors/schemes/compressed_tensors_w4a4_nvfp4.py",
        layer=layer,
        applies=_is_compressed,
        create=_create_compressed(prefixes),
        process=_process_compressed(prefixes),
    )


def _create_experts(call: Call, layer: Any, *args: Any, **kwargs: Any) -> None:
    call.stock(layer, *args, **kwargs)
    for weight in ("w13", "w2"):
        layer._parameters.pop(f"{weight}_blockscale_swizzled", None)
        both = weight == "w13" and _is_compressed(call.fmt) and layer.moe_runner_config.is_gated
        make_input_scale(layer, f"{weight}_input_scale", *([2] if both else []))


def _process_experts(call: Call, layer: Any) -> None:
    for weight in ("w13", "w2"):
        layer._parameters.pop(f"{weight}_input_scale", None)
    call.stock(layer)


def _create_runner(call: Call, layer: Any, *args: Any, **kwargs: Any) -> None:
    create_runner(call, layer, *args, **kwargs)
    if may_get_negative_ids(layer):
        skip_negative_ids(call.method.runner)


class ServedNvfp4(Served[Nvfp4]):
    format: ClassVar[type[Format]] = Nvfp4
    repairs: ClassVar[tuple[Repair, ...]] = (
        require_shapes(lambda fmt: True, lambda fmt: -1),
        Repair(
            name="scales that Marlin does not use",
            why="Scales of inputs are made for all experts of the model, whatever a rank holds, and a second copy of "
            "the scales of blocks is made for Blackwell, in memory for ever. Marlin reads neither.",
            where=f"{_FILE}:2083",
            issues=(f"{ISSUES}/38073", f"{PULLS}/38092"),
            layer="experts",
            create=_create_experts,
            process=_process_experts,
        ),
        _compressed("linear", ("",)),
        _compressed("experts", ("w13_", "w2_")),
        PACKED_AS_WEIGHT,
        Repair(
            name="ids of experts elsewhere, of NVFP4",
            why="Ids of -1 are left out only where the layer's dispatcher has a map of experts, which a group of "
            "experts has not.",
            where=f"{_FILE}:2550",
            layer="experts",
            runner=_create_runner,
        ),
        ROUTER_WEIGHTS,
    )

    def sglang_config(self, fmt: Nvfp4) -> QuantizationConfig:
        return _OnMarlin(is_checkpoint_nvfp4_serialized=True, group_size=_BLOCK, exclude_modules=[])

    def check_experts(self, layer: Any, fmt: Nvfp4, prefix: str) -> None:
        require_activation(layer, fmt, prefix)
        activation, supported = layer.moe_runner_config.activation, modelopt_quant._SUPPORTED_ACT_STRS
        if activation not in supported:  # SGLang asserts it when it first runs
            raise ValueError(
                f"{prefix} ({fmt.kind}): SGLang's method for NVFP4 experts has no {activation}, only "
                f"{', '.join(supported)}. Build the checkpoint with another format for this module."
            )
        hidden, intermediate = layer.hidden_size, layer.intermediate_size_per_partition
        if hidden % 128 or intermediate % 64:
            raise ValueError(
                f"{prefix} ({fmt.kind}): Marlin has no kernel for experts of hidden size {hidden} and {intermediate} "
                f"intermediate columns a rank. {ADVICE}"
            )

    def unmovable(self, fmt: Nvfp4) -> str:
        return ""

    def runners(self, fmt: Nvfp4) -> tuple[str, ...]:
        return ("marlin",)

    def values_in(self, name: str, parameter: torch.Tensor, fmt: Nvfp4) -> int:
        if not name.endswith(("weight", "weight_packed")):
            return 0
        return parameter.numel() * (8 if parameter.dtype == torch.int32 else 2)

    def may_be_empty(self, name: str, fmt: Nvfp4) -> bool:
        # ModelOptNvFp4A16LinearMethod and _create_experts make it whether there is one or not.
        return name.endswith(fmt.names.inputs) and fmt.activations == "none"
