"""Where experts of the checkpoint are on this rank, the scales of inputs that are loaded by it, and parameters that
SGLang's classes look for by other names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter

__all__ = ["add_alias", "local_places", "make_input_scale"]


def local_places(layer: Any, expert: int) -> list[int]:
    """The places of an expert on this rank: none, one, or several where it is redundant.

    Args:
        layer: a FusedMoE, or a group of one.
        expert: the expert's number in the checkpoint; in a group, its number there.
    """
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    metadata = get_global_expert_location_metadata()
    moved = metadata is not None and not getattr(layer, "virtual_rank", False)
    moved = moved and getattr(layer, "uses_expert_location", True)  # 0.5.23: not those of drafts
    places = metadata.logical_to_all_physical(layer.layer_id, expert) if moved else [expert]
    local = (int(layer._map_global_expert_id_to_local_expert_id(place)) for place in places)
    return [place for place in local if place >= 0]


def make_input_scale(layer: Any, name: str, *more: int) -> None:
    """Registers a parameter for a scale of inputs, ones ``[experts of this rank, *more]`` in float32.

    A tensor of gate and one of up are loaded into the same place: they are equal, or nothing reads them.
    """
    scale = Parameter(torch.ones((layer.num_local_experts, *more), dtype=torch.float32), requires_grad=False)
    scale.weight_loader = _load_input_scale(layer)  # type: ignore[attr-defined]
    layer.register_parameter(name, scale)


def _load_input_scale(layer: Any) -> Callable[..., None]:
    def load(parameter: Parameter, tensor: torch.Tensor, weight_name: str, *, expert_id: int, **_: Any) -> None:
        for place in local_places(layer, expert_id):
            parameter.data[place] = tensor.reshape(())

    return load


def add_alias(layer: Any, name: str, of: str) -> None:
    """Registers an empty parameter ``name``, whose loader loads into the parameter ``of``."""

    def load(_: Parameter, loaded_weight: torch.Tensor, *shard: Any, **expert: Any) -> None:
        parameter = layer._parameters[of]
        parameter.weight_loader(parameter, loaded_weight, *shard, **expert)

    alias = Parameter(torch.empty(0), requires_grad=False)
    alias.weight_loader = load  # type: ignore[attr-defined]
    layer.register_parameter(name, alias)
