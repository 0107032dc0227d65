"""Finds the format of every module of a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import SourceError
from ..formats.base import Format, FormatError
from ..formats.quantization import Quantization
from ..formats.registry import names_matter, recognise
from .declaration import METHOD, Declaration

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

__all__ = ["detect"]


def detect(checkpoint: Checkpoint) -> dict[str, Format | FormatError]:
    """The format of each module of a checkpoint, or why it has none that is read: only used ones matter."""
    quantization = Quantization(checkpoint.quantization)
    method = quantization.get("quant_method")
    declaration = None
    if method == METHOD:
        try:
            declaration = Declaration.from_json(checkpoint.quantization)
        except SourceError as error:
            raise SourceError(str(error), path=checkpoint.path_of(checkpoint.quantization_file)) from error
    by_name = method == METHOD or names_matter(quantization)
    known: dict[object, Format | FormatError] = {}
    found = {}
    for name, module in checkpoint.modules.items():
        # Where names do not matter, modules whose tensors are alike are looked at once: experts are, by thousands. Of
        # bare parameters, names tell buffers.
        alike = not by_name and "" not in module.tensors
        what = tuple([(leaf, t.dtype, t.shape) for leaf, t in module.tensors.items()]) if alike else name
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
