"""Opens the checkpoints of a recipe, detects the format of every module, and checks sources named after formats."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.opening import open_checkpoint
from ..checkpoint.typed import Source
from ..errors import RecipeError, SourceError
from ..families.base import Family
from ..families.expected import left_out_of_builds
from ..formats.base import FormatError
from ..formats.registry import kinds_of_word

if TYPE_CHECKING:
    from .recipe import Recipe, SourceRef

__all__ = ["Sources", "open_sources"]


@dataclass(frozen=True, slots=True, eq=False)
class Sources:
    """The opened checkpoints of a recipe: config and tokenizer come from ``model``, weights from ``by_name``."""

    model: Checkpoint
    by_name: Mapping[str, Source]

    @property
    def family(self) -> Family:
        """The family of the config that the output is served with."""
        return self.model.facts.family

    def is_draft(self, name: str) -> bool:
        """Whether a module is of a draft layer."""
        return self.family.is_draft(name, self.model.facts.layers)

    def drafts_of(self, source: Source) -> list[str]:
        """The modules of draft layers that a plan may take from a source."""
        return [n for n in source.checkpoint.modules if self.is_draft(n) and left_out_of_builds(n) is None]

    def resolve(self, word: str, recipe: Recipe, line: int) -> Source:
        """The source that a rule names, or the only one that has modules in the format that it names.

        Raises:
            RecipeError: no source has that format, or several have.
        """
        if word in self.by_name:
            return self.by_name[word]
        holders = [s for s in self.by_name.values() if s.kinds & kinds_of_word(word)]
        if len(holders) == 1:
            return holders[0]
        found = ", ".join(f"`{s.name}` holds {_describe(s)}" for s in self.by_name.values())
        what = "no source holds" if not holders else "several sources hold"
        raise RecipeError(f"{what} `{word}`: {found}; name a source", path=recipe.path, line=line)


def open_sources(recipe: Recipe) -> Sources:
    """Opens every checkpoint of a recipe once, and reads the norms of several sources.

    Raises:
        RecipeError: a source is named after a format that it does not have, such as ``int4``.
        SourceError, HubError: a checkpoint cannot be opened.
    """
    locations = {ref.location: ref for ref in (recipe.model, *recipe.sources.values())}
    # Side by side only where a network is waited for: the memory that reading takes for a while would add up.
    local = all(os.path.isdir(recipe.folder / os.path.expanduser(location)) for location in locations)  # noqa: PTH111, PTH112
    with ThreadPoolExecutor(max_workers=1 if local else 4) as pool:
        opened = dict(zip(locations, pool.map(lambda ref: _open(ref, recipe), locations.values()), strict=True))
    by_name = {}
    for name, ref in recipe.sources.items():
        checkpoint = opened[ref.location]
        source = Source.of(name, checkpoint, ref.line)
        _check_claim(source, recipe)
        by_name[name] = source
    if len(by_name) > 1:
        is_norm = opened[recipe.model.location].facts.family.is_norm
        for source in by_name.values():
            # Norms show whether the sources are one model, and whether scales are folded into them.
            norms = (module for name, module in source.checkpoint.modules.items() if is_norm(name))
            source.checkpoint.read_values(tensor for norm in norms for tensor in norm.tensors.values())
    return Sources(opened[recipe.model.location], by_name)


def _open(ref: SourceRef, recipe: Recipe) -> Checkpoint:
    try:
        return open_checkpoint(ref.location, relative_to=recipe.folder)
    except SourceError as error:
        error.args = (f"{error} (source `{ref.name}`, {recipe.path}:{ref.line})",)
        raise


def _check_claim(source: Source, recipe: Recipe) -> None:
    """Refuses a source that is named after a format it does not have; any other name is allowed."""
    claimed = kinds_of_word(source.name)
    if not claimed or source.kinds & claimed:
        return
    unread = next((f for f in source.formats.values() if isinstance(f, FormatError)), None)
    raise RecipeError(
        f"the source `{source.name}` ({source.location}) holds {_describe(source)}"
        + (f" (a module is {unread})" if unread is not None else "")
        + "; rename it after what it holds, or point it to another checkpoint",
        path=recipe.path,
        line=source.line,
    )


def _describe(source: Source) -> str:
    return ", ".join(sorted(source.kinds)) or "no format that is supported"
