"""Layers for multi-token prediction, which SGLang loads into a class of its own and runs as drafts.

The class reads the same checkpoint as the model's own class, and takes only the draft layers, under other names. It has
an embedding and a head, which SGLang replaces by the model's once both are loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["APPENDED_LAYER", "Draft", "DraftClass"]


@dataclass(frozen=True, slots=True)
class DraftClass:
    """SGLang's class for the draft layers of a family."""

    architectures: tuple[str, ...]
    """Its name, and that in earlier releases."""
    renamed: tuple[tuple[str, str], ...]
    """Beginnings of names, and those in their place among the class's parameters. The first that fits counts.
    ``{layers}`` stands for the number of the model's layers."""
    shared: tuple[str, ...] = ()
    """Modules within draft layers that are copies of the model's, which the class does not load."""
    needs_tensors: bool = False
    """Whether its ``load_weights`` raises where it gets no tensors."""


_APPENDED = "model.layers.{layers}."
APPENDED_LAYER = (
    *((f"{_APPENDED}{name}.", f"model.{name}.") for name in ("enorm", "hnorm", "eh_proj", "shared_head.norm")),
    (_APPENDED, "model.decoder."),
)
"""The names of one decoder layer after the last, with norms and a projection before it, as DeepSeek has them."""


class _Family(Protocol):
    @property
    def draft_class(self) -> DraftClass | None: ...
    def is_draft(self, name: str, layers: int | None) -> bool: ...
    def is_left_to_class(self, name: str) -> bool: ...


class _Model(Protocol):
    """The part of :class:`.facts.ModelFacts` that is needed here."""

    @property
    def family(self) -> _Family: ...
    @property
    def layers(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Draft:
    """The draft layers of one model, as SGLang's class for them has them.

    Names are those of modules, tensors or, after :meth:`.base.Family.sglang_name`, of parameters.
    """

    described: DraftClass
    family: _Family
    layers: int | None

    @classmethod
    def of(cls, model: _Model, architecture: str | None = None) -> Draft | None:
        """The draft layers of ``model``; None where its family has no class for them that mixprec knows.

        With ``architecture``, also None where SGLang's class of that name is another.
        """
        described = model.family.draft_class
        if described is None or architecture not in (None, *described.architectures):
            return None
        return cls(described, model.family, model.layers)

    def expects(self, name: str) -> bool:
        """Whether the class must load what has this name in the checkpoint."""
        inner = f".{name}."
        return self.family.is_draft(name, self.layers) and not any(f".{s}." in inner for s in self.described.shared)

    def sglang_name(self, name: str) -> str:
        """Its name in the class; unchanged where the class has no layer for it."""
        return self._renamed(name) or name

    def name_to_load(self, name: str) -> str:
        """The name by which it is loaded: that in the checkpoint where the class reads it by itself."""
        return name if self.family.is_left_to_class(name) else self.sglang_name(name)

    def has_place_for(self, name: str) -> bool:
        """Whether the class has a layer for what has this name in the checkpoint."""
        return self._renamed(name) is not None

    def _renamed(self, name: str) -> str | None:
        for stored, served in self.described.renamed:
            beginning = stored.format(layers=self.layers)
            if f"{name}.".startswith(beginning):
                return (served + f"{name}."[len(beginning) :])[:-1]
        return None
