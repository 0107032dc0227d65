"""Experts at other places than in the checkpoint: moved by SGLang's EPLB, or placed by ``--init-expert-location``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.utils import is_cpu
from torch.nn import Module

from mixprec_build.versions import between

from .. import launch
from ..contact.check import installed
from .group import ExpertGroup

__all__ = ["move_layer", "prepare", "take_present"]


logger = logging.getLogger(__name__)

_LIST, _LOCATION = "routed_experts_weights_of_layer", "get_model_config_for_expert_location"
"""What a class of SGLang's has whose experts EPLB moves."""
_INFO = "expert_location_dispatch_info"


def prepare(model: Module) -> None:
    """Checks that SGLang can move or place the experts of a new model, and has its routers name them by their places.

    Raises:
        RuntimeError: SGLang lacks what EPLB or a file of places needs, for the model's class or without a GPU.
    """
    if launch.moves_experts():
        flag, needed = "--enable-eplb", [_LOCATION, _LIST]
    elif launch.places_experts():
        flag, needed = "--init-expert-location", [_LOCATION]
    else:
        return
    if is_cpu():  # layers/moe/topk.py:1908 asks for places on GPUs only
        launch.refuse(
            [f"{flag} changes the places of experts, which SGLang's routers find on a GPU only; leave it out"]
        )
    _require(type(model), needed, flag)
    _route_to_places(model, flag)


def _require(owner: type[Module], names: Sequence[str], flag: str) -> None:
    """Raises ``RuntimeError`` for a class of models that tells SGLang nothing of its experts."""
    lacking = [name for name in names if not _sets(owner, name)]
    if lacking:
        launch.refuse(
            [f"{flag} needs {' and '.join(lacking)}, which SGLang's class {owner.__name__} lacks; leave it out"]
        )


def _sets(owner: type, name: str) -> bool:
    """Whether a class has an attribute, or a method of it sets or reads one of that name."""
    functions = (found for base in owner.__mro__ for found in vars(base).values() if isinstance(found, FunctionType))
    return hasattr(owner, name) or any(name in function.__code__.co_names for function in functions)


def _route_to_places(model: Module, flag: str) -> None:
    """Has each router of ``model`` give the places of experts, also where SGLang's class does not ask for them.

    Before 0.5.23, most classes ask for places only where DeepEP exchanges rows (models/qwen3_moe.py:327 of 0.5.17 is
    without): tokens of an expert that has moved then go to the one that has its place. From 0.5.23 on, routers ask for
    them (layers/moe/topk.py:670). In both, drafts do not: their experts stay.
    """
    if not between("", "0.5.23", installed()):
        return
    for name, block in model.named_modules():
        children = [child for child in block.children() if not isinstance(child, ExpertGroup)]
        experts = [child for child in children if isinstance(child, FusedMoE)]
        routers = [child for child in children if isinstance(child, TopK)]
        if not experts:
            continue
        if len(experts) != 1 or len(routers) != 1:
            launch.refuse([f"{flag} needs a router beside the experts of {name}, which has none; leave it out"])
        routers[0].register_forward_pre_hook(partial(_ask_for_places, int(experts[0].layer_id)), with_kwargs=True)


def _ask_for_places(
    layer: int, _: Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if kwargs.get(_INFO) is None:
        kwargs = {**kwargs, _INFO: ExpertLocationDispatchInfo.init_new(layer_id=layer)}
    return args, kwargs


def take_present(model: Module) -> None:
    """Has EPLB move the weights that kernels read: all parameters of each layer of experts, as they are now.

    Some classes list parameters when they are loaded, before they are repacked (models/bailing_moe.py:1003), so that
    EPLB would move tensors that nothing reads; some list a parameter for all experts, too.

    Raises:
        RuntimeError: a parameter has not a row for each expert, or SGLang's list cannot be changed.
    """
    kind = type(model).__name__
    present = {
        int(layer.layer_id): list(_rows(name, layer))
        for name, layer in model.named_modules()
        if isinstance(layer, FusedMoE) and not isinstance(layer, ExpertGroup)
    }
    given: dict[int, Sequence[torch.Tensor]] = getattr(model, _LIST)
    unfit = _unfit(given, present)
    for layer in unfit:
        if layer in present:
            given[layer] = present[layer]
    lost = _unfit(getattr(model, _LIST), present)
    if lost:
        launch.refuse(
            [
                f"--enable-eplb would move other tensors than the weights of layers {lost}, since SGLang's class "
                f"{kind} lists others; leave it out"
            ]
        )
    if unfit:
        logger.info("mixprec: EPLB moves the weights of %d layers as they are now, not as %s listed", len(unfit), kind)


def _rows(name: str, layer: Any) -> Iterator[torch.Tensor]:
    """Yields the parameters of a layer of experts, with a row for each place that EPLB may fill.

    Fused shared experts, which come last, stay.
    """
    for leaf, parameter in layer.named_parameters():
        if not parameter.numel():
            continue
        if not parameter.dim() or len(parameter) != layer.num_local_experts:
            launch.refuse(
                [
                    f"--enable-eplb moves weights expert by expert, and {name}.{leaf} {list(parameter.shape)} is not "
                    f"that of {layer.num_local_experts} experts; leave it out"
                ]
            )
        yield parameter.data[: layer.num_local_experts - layer.num_fused_shared_experts]


def _unfit(given: Mapping[int, Sequence[torch.Tensor]], present: Mapping[int, Sequence[torch.Tensor]]) -> list[int]:
    """The layers for which ``given`` has not the tensors of ``present``."""
    return [
        layer
        for layer, tensors in given.items()
        if [_place(t) for t in tensors if t.numel()] != [_place(t) for t in present.get(layer, ())]
    ]


def _place(tensor: torch.Tensor) -> tuple[int, torch.dtype, torch.Size, tuple[int, ...]]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def move_layer(
    original: Callable[..., Any],
    routed_experts_weights: Sequence[torch.Tensor],
    temp_buffers: Sequence[torch.Tensor],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Around ``update_expert_weights_single_layer``: moves bytes, through buffers like the weights of the layer.

    SGLang makes buffers for the first layer only, and passes them to all (eplb/expert_location_updater.py:148). Experts
    of a layer in another format would be converted to the first one's dtypes on their way, or not fit at all. Bytes are
    moved because torch sends no E8M0, the dtype of MXFP4's scales, by NCCL (ncclDataType in its NCCLUtils.hpp). Weights
    without values, such as unused orders of inputs, are not passed on.
    """
    weights = [_as_bytes(weight) for weight in routed_experts_weights if weight.numel()]
    buffers = [_as_bytes(buffer) for buffer in temp_buffers if buffer.numel()]
    if [_form(buffer) for buffer in buffers] != [_form(weight) for weight in weights]:
        buffers = [torch.empty_like(weight) for weight in weights]
    return original(weights, buffers, *args, **kwargs)


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A view ``[experts, bytes]`` of a contiguous tensor ``[experts, ...]``; others as they are."""
    return tensor.view(len(tensor), -1).view(torch.uint8) if tensor.is_contiguous() else tensor


def _form(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, tuple[int, ...]]:
    return tensor.dtype, tensor.shape, tensor.stride()
