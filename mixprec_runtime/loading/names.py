"""Renames and converts tensors for SGLang's own loader, which finds parameters by name.

Producers use several names for the same tensor (``scale``, ``activation_scale``), and several dtypes for the same
scales. A compiled checkpoint keeps those of its sources. mixprec's own loader needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch.nn import Module

from mixprec_build.formats.base import Format

from ..formats.registry import served

__all__ = ["as_parameters", "converter", "keep_names"]


_KNOWN = "weight_scale"
"""Name of block scales that has a parameter of its own: see :mod:`mixprec_runtime.formats.scaled`."""


def as_parameters(
    weights: Iterable[tuple[str, torch.Tensor]], formats: Mapping[str, Format]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields ``weights`` under SGLang's names. ``formats``: module of the checkpoint -> its format."""
    renamed = {fmt: names for fmt in set(formats.values()) if (names := _other_names(fmt))}
    if not renamed:
        yield from weights
        return
    for name, tensor in weights:
        module, _, leaf = name.rpartition(".")
        other = renamed.get(formats[module], {}).get(leaf) if module in formats else None
        yield name if other is None else f"{module}.{other}", tensor


def keep_names(model: Module) -> None:
    """Has SGLang's class for Mistral-Large-3 load tensors by the names of parameters, those of compiled checkpoints.

    Stock, it takes them for those of its release, and drops what has another one (``remapping`` in
    models/mistral_large_3.py of 0.5.15.post1 to 0.5.23).
    """
    for module in model.modules():
        if isinstance(getattr(module, "remapping", None), dict):
            module.remapping = {"(.+)": r"\1"}  # type: ignore[assignment]


def converter(formats: Mapping[str, Format]) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Returns a function of a tensor's name and the tensor, which returns it as SGLang's loaders take it.

    ``formats``: module of the checkpoint -> its format.
    """

    def convert(name: str, tensor: torch.Tensor) -> torch.Tensor:
        module, _, leaf = name.rpartition(".")
        fmt = formats.get(module)
        return tensor if fmt is None else served(fmt).as_loaded(fmt, leaf, tensor)

    return convert


def _other_names(fmt: Format) -> dict[str, str]:
    return {leaf: name for leaf in fmt.leaves if (name := fmt.sglang_name(leaf)) != leaf and leaf != _KNOWN}
