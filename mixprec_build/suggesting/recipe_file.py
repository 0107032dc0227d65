"""Writes a suggestion as a recipe."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import yaml

from ..checkpoint.manifest import check_outside
from ..errors import OutputError
from ..recipe.recipe import Recipe
from ..recipe.writer import quoted
from ..text import human
from ..versions import __version__
from .allocate import Suggestion
from .objective import Objective

__all__ = ["check_target", "recipe_text", "write_recipe"]

_MEASURES = {
    Objective.WEIGHT: "f ‖Δ‖²",
    Objective.RELATIVE: "f ‖Δ‖² / ‖W‖²",
    Objective.OUTPUT: "f Σ m ‖Δ‖²",
    Objective.RELATIVE_OUTPUT: "f Σ m ‖Δ‖² / Σ m ‖W‖²",
    Objective.MEASURED: "nats a token by measured swaps",
}


def check_target(out: Path, base: Path, *, force: bool) -> None:
    """Raises :class:`OutputError` where :func:`write_recipe` would, before hours of measuring."""
    if out.exists() and base.exists() and out.samefile(base):
        raise OutputError(f"{out}: is the recipe with the sources to choose from; name another file")
    if out.exists() and not force:
        raise OutputError(f"{out}: exists; pass --force to replace it, or name another file")
    if not out.parent.is_dir():
        raise OutputError(f"{out}: there is no folder {out.parent}; make it first")
    check_outside(out)


def write_recipe(suggestion: Suggestion, out: Path, *, force: bool = False) -> None:
    """Writes the recipe under its name by one rename.

    Raises:
        OutputError: ``out`` exists and ``force`` is not set, or it cannot be written.
    """
    check_target(out, suggestion.plan.recipe.path, force=force)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        unfinished.write_text(recipe_text(suggestion, out.parent), encoding="utf-8")
        unfinished.rename(out)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise OutputError(f"{out}: cannot be written: {error.strerror}") from error


def recipe_text(suggestion: Suggestion, folder: Path) -> str:
    """The text of the recipe for a file in ``folder``, which relative locations of sources then start from."""
    recipe = suggestion.plan.recipe
    lines = [f"# {line}".rstrip() for line in _head(suggestion)]
    lines += ["", f"model: {_location(recipe, recipe.model.location, folder)}", "sources:"]
    lines += [f"  {ref.name}: {_location(recipe, ref.location, folder)}" for ref in recipe.sources.values()]
    lines += [f"default: {recipe.default}", "weights:"]
    nbytes: Counter[int] = Counter()
    for module in suggestion.plan.modules.values():
        nbytes[id(module.rule)] += module.nbytes
    for comment, rules in suggestion.lines:
        lines += [f"  # {line}" for line in comment.splitlines()]
        lines += [f"  {quoted(rule.pattern.text)}: {rule.source}  # {human(nbytes[id(rule)])}" for rule in rules]
    lines.append(f"output: {{{', '.join(_output(recipe))}}}")
    if recipe.serving:
        lines.append(yaml.safe_dump(dict(recipe.serving), sort_keys=False, allow_unicode=True).rstrip())
    return "\n".join(lines) + "\n"


def _head(suggestion: Suggestion) -> Iterator[str]:
    request, solution = suggestion.request, suggestion.solution
    yield f"Chosen by mixprec {__version__} from {suggestion.plan.recipe.path.name} for {human(request.budget)}."
    yield ""
    yield f"Bytes   {suggestion.nbytes:,} in files, {_below(suggestion)} under the budget of {request.budget:,}"
    yield f"Loss    {solution.loss:.6g}, {_gap(suggestion)}"
    power = "" if suggestion.exponent == 1 else f", to the power of {suggestion.exponent:.2f}"
    yield f"        {suggestion.objective.value}: {_MEASURES[suggestion.objective]}{power}, added up over modules"
    if solution.price:
        yield f"Price   {solution.price * 1e6:.3g} of loss for a megabyte: what saves more got its bytes"
    for line in suggestion.notes:
        yield f"Note    {line}"


def _below(suggestion: Suggestion) -> str:
    return f"{1 - suggestion.nbytes / suggestion.request.budget:.2%}"


def _gap(suggestion: Suggestion) -> str:
    gap = suggestion.solution.gap
    return "the least there is" if gap < 1e-12 else f"at most {gap:.2g} of it above the least there is"


def _output(recipe: Recipe) -> Iterator[str]:
    yield f"shard_size: {_size(recipe.shard_size)}"
    if recipe.tp:
        yield f"tp: {list(recipe.tp)}"
        yield f"layout: {recipe.layout}"


def _location(recipe: Recipe, location: str, folder: Path) -> str:
    """A source's location, seen from another folder."""
    path = Path(location).expanduser()
    if not path.is_absolute() and (recipe.folder / path).is_dir():
        # Links above the source are resolved, for `..` after one means its target's parent; a source may be a link.
        full = recipe.folder / path
        named = path.name not in ("", "..")
        place = Path(os.path.realpath(full.parent if named else full), path.name if named else "")
        relative = os.path.relpath(place, os.path.realpath(folder))
        location = relative if relative.startswith(".") else f"./{relative}"
    return quoted(location)


def _size(nbytes: int) -> str:
    return (
        f"{nbytes // 10**9}GB"
        if nbytes % 10**9 == 0
        else f"{nbytes // 10**6}MB"
        if nbytes % 10**6 == 0
        else str(nbytes)
    )
