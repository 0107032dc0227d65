"""Corrects formats by the values of tensors, where a configuration is wrong and headers do not show it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..formats.base import Format
from ..patterns.compress import compress
from ..text import some

if TYPE_CHECKING:
    import numpy as np

    from ..checkpoint.checkpoint import ValueReader
    from ..storage.header import TensorInfo
    from .types import PlannedModule

__all__ = ["as_stored"]


def as_stored(modules: Mapping[str, PlannedModule], reader: ValueReader) -> tuple[dict[str, PlannedModule], list[str]]:
    """Returns the modules with the formats that their values show, and notes on those declared in another."""
    found = dict(modules)
    changed: dict[tuple[str, str, str], list[str]] = {}
    for name, module in modules.items():
        declared = module.format
        if type(declared).as_stored is Format.as_stored:
            continue

        def read(info: TensorInfo, module: PlannedModule = module) -> np.ndarray | None:
            return reader.read(module.source, info)

        stored = declared.as_stored(module.stored, read)
        if stored != declared:
            found[name] = module._replace(format=stored)
            before, after = declared.to_json(), stored.to_json()
            said, shown = (
                ", ".join(f"{k} {v}" for k, v in one.items() if before[k] != after[k]) for one in (before, after)
            )
            changed.setdefault((module.source, said, shown), []).append(name)
    notes = [
        f"{some(compress(names))}: `{source}` declares {said}, and their values are stored as by {shown}, which counts"
        for (source, said, shown), names in changed.items()
    ]
    return found, notes
