"""A checkpoint with the format of each of its modules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SourceError
from ..families.facts import ModelFacts
from ..formats.base import Format, FormatError
from ..storage.module import StoredModule
from .checkpoint import Checkpoint
from .detection import detect
from .opening import open_checkpoint

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Source", "open_source"]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """One checkpoint of a recipe, with the formats of its modules."""

    name: str
    location: str
    line: int
    """The line of the recipe that names it; 0 where none does."""
    checkpoint: Checkpoint
    formats: Mapping[str, Format | FormatError]
    distinct_formats: frozenset[Format]
    """The supported formats among ``formats``."""
    kinds: frozenset[str]
    """Kinds of its quantized formats, or of its unquantized ones if it has no others."""

    @classmethod
    def of(cls, name: str, checkpoint: Checkpoint, line: int = 0) -> Source:
        """Detects the formats of a checkpoint's modules."""
        formats = detect(checkpoint)
        supported = frozenset(fmt for fmt in {*formats.values()} if isinstance(fmt, Format))
        kinds = {fmt.kind for fmt in supported if fmt.quantized} or {fmt.kind for fmt in supported}
        return cls(name, checkpoint.location, line, checkpoint, formats, supported, frozenset(kinds))

    @property
    def facts(self) -> ModelFacts:
        """The facts of its ``config.json``."""
        return self.checkpoint.facts

    def module(self, name: str) -> StoredModule | None:
        """The tensors of a module; None where there is no such module."""
        return self.checkpoint.modules.get(name)

    def known_format(self, name: str) -> Format | None:
        """The format of a module; None where the source lacks the module, or its format is not supported."""
        found = self.formats.get(name)
        return None if isinstance(found, FormatError) else found

    def format_of(self, name: str) -> Format:
        """The format of a module. Raises :class:`SourceError` if it is not supported."""
        found = self.formats[name]
        if isinstance(found, FormatError):
            first = next(iter(self.checkpoint.modules[name].tensors.values()))
            raise SourceError(f"module {name}: {found}", path=self.checkpoint.path_of(first.file))
        return found

    def dequantize(self, name: str) -> npt.NDArray[np.float32]:
        """The weight of a module in float32, ``[N, K]`` for a linear."""
        tensors = {leaf: self.checkpoint.read(info) for leaf, info in self.checkpoint.modules[name].tensors.items()}
        return self.format_of(name).dequantize(tensors)


def open_source(location: str, *, relative_to: Path | None = None) -> Source:
    """Opens one checkpoint outside any recipe, a compiled one or a plain one, with its formats."""
    return Source.of(location, open_checkpoint(location, relative_to=relative_to))
