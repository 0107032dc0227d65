"""The group of experts of a layer that have one format: a FusedMoE of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from torch.nn import Parameter

__all__ = ["ExpertGroup", "keep_one_projection", "only_rank"]


class ExpertGroup(FusedMoE):
    """The experts on this rank that have one format, numbered from 0."""

    virtual_rank = True
    projection = ""
    """``w13`` or ``w2`` for a group of these projections only; empty for one of both."""

    def weight_loader(
        self, param: Parameter, loaded_weight: torch.Tensor, weight_name: str, shard_id: str, expert_id: int | None
    ) -> None:
        """Loads one projection of an expert; ``expert_id`` is its number within the group."""
        self._weight_loader_impl(
            param=param, loaded_weight=loaded_weight, weight_name=weight_name, shard_id=shard_id, expert_id=expert_id
        )


def keep_one_projection(group: ExpertGroup, weight: str) -> None:
    """Drops the parameters of a new group that are not of the projection ``weight`` (``w13`` or ``w2``).

    SGLang's methods process both, so the others return as zeros for that call, and take no memory before and after.
    """
    group.projection = weight
    method, other = group.quant_method, "w2_" if weight == "w13" else "w13_"
    process = method.process_weights_after_loading

    def take_out() -> dict[str, Parameter]:
        """Unregisters the other projection's parameters; views of one zero keep their shapes, for SGLang to read."""
        names = [name for name, value in group._parameters.items() if name.startswith(other) and value is not None]
        taken = {name: group._parameters.pop(name) for name in names}
        for name, parameter in taken.items():
            if parameter.numel():
                parameter.data = parameter.new_zeros(1).expand(parameter.shape)
            group.__dict__[name] = parameter.data
        return taken

    taken = take_out()

    def process_weights_after_loading(layer: Any) -> None:
        for name, parameter in taken.items():
            del layer.__dict__[name]
            parameter.data = torch.zeros(parameter.shape, dtype=parameter.dtype, device=parameter.device)
            layer.register_parameter(name, parameter)
        process(layer)
        take_out()

    method.process_weights_after_loading = process_weights_after_loading


@contextmanager
def only_rank() -> Iterator[None]:
    """Turns expert parallelism off while the context lasts, in which a group is made.

    Patches the context, since 0.5.23's ``ParallelContext.override`` compares with the process groups.
    """
    from sglang.srt.runtime_context import get_parallel

    with patch.dict(get_parallel()._overrides, {"moe_ep_size": 1, "moe_ep_rank": 0}):
        yield
