"""The checkpoints of a recipe, opened, with the format of every module detected and claims checked."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import REST, Checkpoint, StoredModule, open_checkpoint
from .errors import RecipeError, SourceError
from .formats.base import Format, FormatError
from .formats.registry import ALIASES, detect
from .manifest import MANIFEST, read_manifest
from .model import Model, Role, role_by_name

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from .recipe import Recipe, SourceRef

__all__ = ["Source", "Sources", "open_on_disk", "open_source", "open_sources"]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """One checkpoint of a recipe."""

    name: str
    location: str
    line: int
    """Of the recipe; 0 outside any."""
    checkpoint: Checkpoint
    formats: Mapping[str, Format | FormatError]
    model: Model
    held: frozenset[Format]
    """All that are read."""
    holds: frozenset[str]
    """Kinds of its quantized formats; of its unquantized ones where it has no others."""

    @classmethod
    def of(cls, name: str, checkpoint: Checkpoint, line: int = 0) -> Source:
        formats = detect(checkpoint)
        held = frozenset(fmt for fmt in {*formats.values()} if isinstance(fmt, Format))
        kinds = {fmt.kind for fmt in held if fmt.quantized} or {fmt.kind for fmt in held}
        model = Model.from_config(checkpoint.config)
        return cls(name, checkpoint.location, line, checkpoint, formats, model, held, frozenset(kinds))

    def module(self, name: str) -> StoredModule | None:
        return self.checkpoint.modules.get(name)

    def known_format(self, name: str) -> Format | None:
        """The format of a module; None where the source lacks the module, or its format is not read."""
        found = self.formats.get(name)
        return None if isinstance(found, FormatError) else found

    def format_of(self, name: str) -> Format:
        """Raises :class:`SourceError` for a module whose format is not read."""
        found = self.formats[name]
        if isinstance(found, FormatError):
            first = next(iter(self.checkpoint.modules[name].tensors.values()))
            raise SourceError(f"module {name}: {found}", path=self.checkpoint.path_of(first.file))
        return found

    def dequantize(self, name: str) -> npt.NDArray[np.float32]:
        """The weight of a module in float32, ``[N, K]`` for a linear."""
        tensors = {leaf: self.checkpoint.read(info) for leaf, info in self.checkpoint.modules[name].tensors.items()}
        return self.format_of(name).dequantize(tensors)


@dataclass(frozen=True, slots=True, eq=False)
class Sources:
    """All that a recipe names: ``model`` gives config and tokenizer, ``by_name`` the weights."""

    model: Checkpoint
    by_name: Mapping[str, Source]

    def resolve(self, word: str, recipe: Recipe, line: int) -> Source:
        """The source a rule means: by name, else the one that holds the format the word stands for.

        Raises:
            RecipeError: no source holds it, or several do.
        """
        if word in self.by_name:
            return self.by_name[word]
        holders = [s for s in self.by_name.values() if s.holds & ALIASES[word]]
        if len(holders) == 1:
            return holders[0]
        held = ", ".join(f"`{s.name}` holds {_describe(s)}" for s in self.by_name.values())
        what = "no source holds" if not holders else "several sources hold"
        raise RecipeError(f"{what} `{word}`: {held}; name a source", path=recipe.path, line=line)


def open_source(location: str, *, relative_to: Path | None = None) -> Source:
    """Opens one checkpoint outside any recipe, a compiled one or a plain one, with its formats."""
    return Source.of(location, open_checkpoint(location, relative_to=relative_to))


def open_on_disk(location: str) -> Source:
    """:func:`open_source`; of a compiled checkpoint in a folder also where its merged files were dropped."""
    folder = Path(location)
    if not (folder / MANIFEST).exists() or not (folder / REST).exists():
        return open_source(location)
    from .merged import open_compiled

    return Source.of(location, open_compiled(folder, read_manifest(folder)))


def open_sources(recipe: Recipe) -> Sources:
    """Opens every checkpoint of a recipe once and checks what each is called against what it holds.

    Raises:
        RecipeError: a source called ``int4`` holds no 4-bit format, and the like.
        SourceError, HubError: from opening them.
    """
    locations = {ref.location: ref for ref in (recipe.model, *recipe.sources.values())}
    with ThreadPoolExecutor(max_workers=4) as pool:
        opened = dict(zip(locations, pool.map(lambda ref: _open(ref, recipe), locations.values()), strict=True))
    by_name = {}
    for name, ref in recipe.sources.items():
        checkpoint = opened[ref.location]
        source = Source.of(name, checkpoint, ref.line)
        _check_claim(source, recipe)
        by_name[name] = source
    if len(by_name) > 1:
        for source in by_name.values():
            # What their norms hold says whether sources are one model, and whether scales are folded into them.
            norms = (module for name, module in source.checkpoint.modules.items() if role_by_name(name) is Role.NORM)
            source.checkpoint.read_values(tensor for norm in norms for tensor in norm.tensors.values())
    return Sources(opened[recipe.model.location], by_name)


def _open(ref: SourceRef, recipe: Recipe) -> Checkpoint:
    try:
        return open_checkpoint(ref.location, relative_to=recipe.folder)
    except SourceError as error:
        error.args = (f"{error} (source `{ref.name}`, {recipe.path}:{ref.line})",)
        raise


def _check_claim(source: Source, recipe: Recipe) -> None:
    """A source whose name is a format must hold it; any other name claims nothing."""
    claimed = ALIASES.get(source.name)
    if claimed is None or source.holds & claimed:
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
    return ", ".join(sorted(source.holds)) or "nothing that is read"
