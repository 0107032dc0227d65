"""Base class and repairs of FP8 and Int8."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import torch

from mixprec_build.formats.base import Format
from mixprec_build.formats.scaled import Scaled

from .base import Served
from .places import add_alias
from .repair import PULLS, Call, Repair

__all__ = ["BLOCK_REPAIRS", "ServedScaled"]

S = TypeVar("S", bound=Scaled)


class ServedScaled(Served[S]):
    def unmovable(self, fmt: S) -> str:
        return ""

    def as_loaded(self, fmt: S, leaf: str, tensor: torch.Tensor) -> torch.Tensor:
        # SGLang's parameters are in F32. Its loaders would copy exponents that are stored as U8 as numbers.
        if leaf == fmt.scale_leaf and tensor.dtype in (torch.uint8, torch.float8_e8m0fnu):
            return tensor.view(torch.float8_e8m0fnu).float()
        return tensor

    def as_stored(
        self, fmt: S, tensors: dict[str, torch.Tensor], widths: list[int] | None
    ) -> tuple[Format, dict[str, torch.Tensor]]:
        return replace(fmt, scale="", input=""), tensors  # SGLang's parameters always have the default names


def _has_blocks(fmt: Scaled) -> bool:
    return fmt.block is not None


def _check_partition(fmt: Scaled, layer: Any, outputs: list[int], inputs: int, uncut: tuple[int, int]) -> None:
    for size, full, step in zip((sum(outputs), inputs), uncut, fmt.block or (1, 1), strict=True):
        if size < full and size % step:
            raise ValueError(f"a rank would hold {size} of {full}, no multiple of its block of {step}.")


def _alias_weight_scale(layer: str, prefixes: tuple[str, ...]) -> Repair:
    """A repair that adds an empty parameter ``weight_scale``, which loads its tensor into ``weight_scale_inv``."""

    def create_weights(call: Call, layer: Any, *args: Any, **kwargs: Any) -> None:
        call.stock(layer, *args, **kwargs)
        for prefix in prefixes:
            add_alias(layer, f"{prefix}weight_scale", of=f"{prefix}weight_scale_inv")

    def process_weights_after_loading(call: Call, layer: Any) -> None:
        for prefix in prefixes:
            layer._parameters.pop(f"{prefix}weight_scale", None)
        call.stock(layer)

    return Repair(
        name=f"scales of blocks by another name ({layer})",
        why="Llama looks for weight_scale_inv under the name weight_scale (also model_loader/auto_loader.py:192), and "
        "compressed-tensors stores it so. Block FP8 and Int8 have no such parameter, and it is dropped with a warning.",
        where="srt/models/llama.py:679",
        issues=(f"{PULLS}/30234",),
        layer=layer,
        applies=_has_blocks,
        create=create_weights,
        process=process_weights_after_loading,
    )


BLOCK_REPAIRS = (
    Repair(
        name="blocks cut under data-parallel attention",
        why="SGLang checks blocks for the global tensor-parallel size. Under data-parallel attention, that of this "
        "layer is another one, and a block is silently cut.",
        where="srt/layers/quantization/fp8.py:478",
        layer="linear",
        applies=_has_blocks,
        until="0.5.22",
        check=_check_partition,
    ),
    _alias_weight_scale("linear", ("",)),
    _alias_weight_scale("experts", ("w13_", "w2_")),
)
