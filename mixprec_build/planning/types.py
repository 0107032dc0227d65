"""A plan: which tensor comes from which source, and which file of the output it lies in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from ..families.parts import Role
from ..formats.base import Format
from ..recipe.recipe import Recipe, Rule
from ..recipe.sources import Sources
from ..storage.header import TensorInfo, build_header
from ..storage.module import StoredModule
from .problems import Problem

__all__ = ["LeftOut", "Plan", "PlannedDrafts", "PlannedModule", "PlannedShard", "PlannedTensor", "RuleUse"]


class PlannedTensor(NamedTuple):
    """A tensor of the output; ``info`` locates its bytes in ``source``."""

    source: str
    info: TensorInfo


class PlannedModule(NamedTuple):
    """A module of the output. ``rule`` is the recipe line that chose its source, None for the default.

    ``follows`` marks norms, routers and cache scales that are taken from the source of the modules they belong to;
    ``draft`` modules of draft layers.
    """

    name: str
    role: Role
    format: Format
    source: str
    rule: Rule | None
    shape: tuple[int, ...]
    tensors: Mapping[str, PlannedTensor]
    follows: bool = False
    draft: bool = False

    @property
    def stored(self) -> StoredModule:
        return StoredModule(self.name, {leaf: tensor.info for leaf, tensor in self.tensors.items()})

    @property
    def nbytes(self) -> int:
        return sum([tensor.info.nbytes for tensor in self.tensors.values()])


@dataclass(frozen=True)
class PlannedShard:
    """One file of the output."""

    file: str
    tensors: tuple[PlannedTensor, ...]
    link: tuple[str, str] | None = None
    """(source, file) of a source's file that is linked in place of a copy."""

    @property
    def header(self) -> bytes:
        """The bytes before the data section, for a shard that is not linked. Made anew: all take much memory."""
        return build_header((*tensor.info[:3], tensor.info.nbytes) for tensor in self.tensors)

    @cached_property
    def header_bytes(self) -> int:
        """The size of the header in bytes."""
        return len(self.header)

    @property
    def data_bytes(self) -> int:
        return sum([tensor.info.nbytes for tensor in self.tensors])

    def file_bytes(self, sources: Sources) -> int:
        """The size of the file in bytes, header included."""
        if self.link is not None:
            return sources.by_name[self.link[0]].checkpoint.shards[self.link[1]].size
        return self.header_bytes + self.data_bytes


@dataclass(frozen=True, slots=True)
class RuleUse:
    """Numbers of modules that a line of the recipe matches, and of those whose source it decides."""

    rule: Rule
    matched: int
    won: int


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Tensors of a source that are not in the output, and the reason."""

    source: str
    reason: str
    tensors: int
    nbytes: int
    modules: tuple[str, ...]
    """Patterns of the names of their modules."""


@dataclass(frozen=True, slots=True)
class PlannedDrafts:
    """The draft layers of the output."""

    modules: tuple[str, ...] = ()
    layers: int = 0
    """How many the written ``config.json`` declares, if it has a key for that."""
    source: str | None = None
    """The source of most of their modules; None where there are none."""
    rule: Rule | None = None
    """The line ``mtp: SOURCE`` of the recipe."""
    dropped: bool = False
    """Whether they were left out with ``--drop-mtp``."""


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A plan of all that a build does."""

    recipe: Recipe
    sources: Sources
    modules: Mapping[str, PlannedModule]
    shards: tuple[PlannedShard, ...]
    rules: tuple[RuleUse, ...]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]
    problems: tuple[Problem, ...] = ()
    """Reasons why SGLang could not serve it, which the user allowed."""
    warnings: tuple[Problem, ...] = ()
    """What the user most likely did not mean, although SGLang could serve it."""
    sglang: str = ""
    """The release of SGLang whose rules were followed."""
    needs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Rule that only some releases keep (:mod:`mixprec_build.versions`) -> patterns of the modules that need it."""
    drafts: PlannedDrafts = PlannedDrafts()
    presplit: Mapping[str, int] = field(default_factory=dict)
    """Degree, as ``tp4-ep1`` -> bytes of the files cut for it."""

    @property
    def unservable(self) -> tuple[str, ...]:
        """The problems as sentences."""
        return tuple(map(str, self.problems))

    @property
    def tensor_bytes(self) -> int:
        return sum(shard.data_bytes for shard in self.shards)

    @property
    def written_bytes(self) -> int:
        """Bytes of tensors in all files, those cut for ranks included."""
        return self.tensor_bytes + sum(self.presplit.values())
