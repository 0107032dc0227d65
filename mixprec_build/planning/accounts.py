"""Accounts for every line of the recipe, and for every tensor of its sources."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain

from ..checkpoint.typed import Source
from ..families.expected import is_tied_head, left_out_of_builds
from ..families.parts import Role
from ..patterns.compress import compress
from ..recipe.recipe import Recipe
from ..recipe.sources import Sources
from ..storage.header import TensorInfo
from .choose import Chosen
from .types import LeftOut, PlannedModule

__all__ = ["left_out", "notes_on_heads", "notes_on_rules"]


def notes_on_heads(
    modules: Mapping[str, PlannedModule], default: Source, chosen: Chosen, sources: Sources
) -> Iterator[str]:
    """Yields a note on each source of the mix whose head, as large as an embedding, the output does not have."""
    family = sources.family
    for source in chosen.sources.values():
        for name in source.checkpoint.modules:
            if (
                name in modules
                or family.role_by_name(name) is not Role.HEAD
                or family.is_draft(name, source.facts.layers)
            ):
                continue
            why = f"`{default.name}` has no such module"
            if is_tied_head(name, default.facts):
                why = f"`{default.name}` ties its head to the embedding (tie_word_embeddings), which takes its place"
            yield f"{name} of `{source.name}` is left out: {why}"


def notes_on_rules(chosen: Chosen, recipe: Recipe, sources: Sources) -> Iterator[str]:
    """Yields notes on lines that match nothing, never win, or name numbers that no module has."""
    dropped = [n for s in sources.by_name.values() for n in sources.drafts_of(s)] if recipe.drop_mtp else []
    for use, names in zip(chosen.uses, chosen.matched, strict=True):
        if not use.matched and dropped and (use.rule.mtp or any(map(use.rule.pattern.matches, dropped))):
            yield f"{use.rule} decides nothing: --drop-mtp leaves the draft layers out"
        elif not use.matched:
            hint = _why_nothing(use.rule.pattern.text, sources)
            yield f"{use.rule} matches nothing{hint and f' ({hint})'}"
        elif not use.won:
            yield f"{use.rule} never wins: later or exact lines decide all it matches"
        for number, pattern in use.rule.pattern.greatest() if use.matched else ():
            if not any(map(pattern.matches, reversed(names))):  # the greatest are last
                yield f"{use.rule}: no module that it matches has the number {number}"


def _why_nothing(glob: str, sources: Sources) -> str:
    """A hint for a glob that matches nothing; may be empty."""
    if glob.endswith(".bias"):
        return "a bias comes with its module"
    dashed = re.search(r"{(\d+)-(\d+)}", glob)
    if dashed:
        return f"a range is written {{{dashed[1]}..{dashed[2]}}}"
    names = chain.from_iterable(source.checkpoint.modules for source in sources.by_name.values())
    words = {word for name in names for word in name.split(".")}
    for word in re.split(r"\.+", glob):
        near = difflib.get_close_matches(word, words, n=1)
        if near and word not in words and not re.search(r"[*?{}]", word):
            return f"no name has a part `{word}`: did you mean `{near[0]}`?"
    return ""


def left_out(
    modules: Mapping[str, PlannedModule], default: Source, recipe: Recipe, sources: Sources
) -> Iterator[LeftOut]:
    """Yields the tensors of each source that are not in the output, by reason."""
    for source in sources.by_name.values():
        tensors, nbytes = Counter[str](), Counter[str]()
        names: dict[str, set[str]] = {}
        for name, stored in source.checkpoint.modules.items():
            module = modules.get(name)
            for leaf, tensor in stored.tensors.items():
                if module is not None and module.tensors.get(leaf) == (source.name, tensor):
                    continue
                why = _why_left_out(source, tensor, leaf, module, default, recipe, sources)
                tensors[why] += 1
                nbytes[why] += tensor.nbytes
                names.setdefault(why, set()).add(name)
        for reason, count in tensors.items():
            yield LeftOut(source.name, reason, count, nbytes[reason], tuple(compress(names[reason])))


def _why_left_out(
    source: Source,
    tensor: TensorInfo,
    leaf: str,
    module: PlannedModule | None,
    default: Source,
    recipe: Recipe,
    sources: Sources,
) -> str:
    if module is None and (reason := left_out_of_builds(tensor.name)) is not None:
        return reason
    if module is not None and leaf == "bias" and module.source == source.name:
        return f"zero biases that `{default.name}` does not have"
    if module is not None:
        return f"taken from `{module.source}`"
    if is_tied_head(tensor.name, default.facts):
        return "tied to the embedding"
    if sources.is_draft(tensor.name):
        return "draft layers (MTP), dropped" if recipe.drop_mtp else "draft layers (MTP), which no line takes from it"
    return f"not in the model as `{default.name}` has it"
