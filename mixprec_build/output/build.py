"""The steps of ``mixprec build``, for the command line and for other programs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..planning.planner import make_plan
from ..planning.types import Plan
from ..recipe.recipe import load_recipe
from ..recipe.sources import open_sources

if TYPE_CHECKING:
    from ..storage.threads import Progress

__all__ = ["no_garbage_collection", "plan_recipe", "run_plan"]


def plan_recipe(
    path: Path,
    *,
    allow_unservable: bool = False,
    link: bool = False,
    layout: str | None = None,
    check_all: bool = False,
) -> Plan:
    """Reads a recipe, opens its sources by their headers and makes a plan. Writes nothing.

    ``layout`` overrides the recipe's. ``check_all`` compares the weights of all quantized modules with unquantized
    ones, instead of a sample.

    Raises:
        RecipeError, SourceError, RefusedError: see their docstrings.
    """
    recipe = load_recipe(path)
    if layout is not None:
        recipe = recipe.laid_out(layout)
    with no_garbage_collection():
        sources = open_sources(recipe)
        return make_plan(recipe, sources, allow_unservable=allow_unservable, link=link, check_all=check_all)


def run_plan(
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    take_over: bool = False,
    allow_unservable: bool = False,
    link: bool = False,
    check_all: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
    replanned: Callable[[Plan], object] | None = None,
) -> Path:
    """Writes the files of a plan into ``out``. Returns the path of the manifest.

    Source files that are not on this machine are fetched first, and their values are checked by planning again;
    ``replanned`` is called with the new plan. ``take_over`` continues what a build on another machine left.

    Raises:
        OutputError, SourceError, RefusedError, WriteError: see their docstrings.
    """
    from .publish import fetch, write
    from .target import check_output

    check_output(plan, out, force=force)
    away = [
        source
        for source in plan.sources.by_name.values()
        if any(source.checkpoint.storage.cached(file) is None for file in source.checkpoint.shards)
    ]
    if away:
        # Values in a hub's files, such as scales and zero points, can be checked only now.
        fetch(plan)
        allow_unservable = allow_unservable or bool(plan.unservable)
        plan = make_plan(plan.recipe, plan.sources, allow_unservable=allow_unservable, link=link, check_all=check_all)
        if replanned is not None:
            replanned(plan)
    return write(plan, out, force=force, take_over=take_over, jobs=jobs, progress=progress)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Turns garbage collection off: planning makes a million objects that all stay, and would take a third longer."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
