"""Finds the format of every module of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import SourceError
from ..formats.base import Format, FormatError
from ..formats.registry import recognise
from .declaration import METHOD, Declaration

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

__all__ = ["detect"]


_BY_NAME = {"dynamic", "config_groups"}
"""What tells modules apart by their names in a quantization_config."""


def detect(checkpoint: Checkpoint) -> dict[str, Format | FormatError]:
    """The format of each module of a checkpoint, or why it has none that is read: only used ones matter."""
    quantization = checkpoint.quantization
    method = quantization.get("quant_method")
    declaration = None
    if method == METHOD:
        try:
            declaration = Declaration.from_json(quantization)
        except SourceError as error:
            raise SourceError(str(error), path=checkpoint.path_of(checkpoint.quantization_file)) from error
    names_matter = method in (METHOD, "mxfp4") or not quantization.keys().isdisjoint(_BY_NAME)
    known: dict[object, Format | FormatError] = {}
    found = {}
    for name, module in checkpoint.modules.items():
        # Where names do not matter, modules whose tensors are alike are looked at once: experts are, by thousands.
        what = name if names_matter else tuple([(leaf, t.dtype, t.shape) for leaf, t in module.tensors.items()])
        if what not in known:
            try:
                if declaration is None:
                    known[what] = recognise(module, quantization)
                else:
                    known[what] = fmt = declaration.format_of(name)
                    fmt.check(module)
            except FormatError as error:
                known[what] = error.with_traceback(None)  # which would keep all that was at hand, for every module
        found[name] = known[what]
    return found
