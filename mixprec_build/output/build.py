"""The steps of ``mixprec build``, for the command line and for other programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..planning.planner import make_plan
from ..planning.types import Plan
from ..recipe.recipe import load_recipe
from ..recipe.sources import open_sources
from ..storage.garbage import no_garbage_collection

if TYPE_CHECKING:
    from ..storage.threads import Progress
    from .parts import Part

__all__ = ["no_garbage_collection", "plan_recipe", "run_plan"]


def plan_recipe(
    path: Path,
    *,
    allow_unservable: bool = False,
    link: bool = False,
    layout: str | None = None,
    check_all: bool = False,
    drop_mtp: bool = False,
    sglang: str | None = None,
) -> Plan:
    """Reads a recipe, opens its sources by their headers and makes a plan. Writes nothing.

    ``layout`` overrides the recipe's. ``check_all`` compares the weights of all quantized modules with unquantized
    ones, instead of a sample. ``drop_mtp`` leaves draft layers out. ``sglang`` is the release that it is planned for.

    Raises:
        RecipeError, SourceError, RefusedError: see their docstrings.
    """
    recipe = replace(load_recipe(path), drop_mtp=drop_mtp)
    if layout is not None:
        recipe = recipe.laid_out(layout)
    with no_garbage_collection():
        sources = open_sources(recipe)
        return make_plan(
            recipe, sources, allow_unservable=allow_unservable, link=link, check_all=check_all, sglang=sglang
        )


def run_plan(
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    take_over: bool = False,
    part: Part | None = None,
    finish: bool = False,
    allow_unservable: bool = False,
    link: bool = False,
    check_all: bool = False,
    card: bool = True,
    jobs: int | None = None,
    progress: Progress | None = None,
    replanned: Callable[[Plan], object] | None = None,
) -> Path:
    """Writes the files of a plan into ``out``. Returns the path of the manifest, or of the folder with a part's files.

    Source files that are not on this machine are fetched first, and their values are checked by planning again;
    ``replanned`` is called with the new plan. ``take_over`` continues what a build on another machine left. ``card``
    writes a model card, ``README.md``.

    ``part`` writes that part only, beside ``out``; ``finish`` makes ``out`` of all parts. Both take files that are on
    this machine only.

    Raises:
        OutputError, SourceError, RefusedError, WriteError: see their docstrings.
    """
    from .parts import require_sources_here, write_part
    from .publish import write
    from .staging import fetch
    from .target import check_output

    if part is not None and finish:
        raise ValueError("a part is built, or all parts are finished, not both")
    check_output(plan, out, force=force)
    if part is not None or finish:
        require_sources_here(plan)
        if part is not None:
            return write_part(plan, out, part, force=force, take_over=take_over, jobs=jobs, progress=progress)
        return write(plan, out, force=force, take_over=take_over, finish=True, card=card, jobs=jobs, progress=progress)
    away = [
        source
        for source in plan.sources.by_name.values()
        if any(source.checkpoint.storage.cached(file) is None for file in source.checkpoint.shards)
    ]
    if away:
        # Values in a hub's files, such as scales and zero points, can be checked only now.
        fetch(plan)
        allow_unservable = allow_unservable or bool(plan.unservable)
        plan = make_plan(
            plan.recipe,
            plan.sources,
            allow_unservable=allow_unservable,
            link=link,
            check_all=check_all,
            sglang=plan.sglang,
        )
        if replanned is not None:
            replanned(plan)
    return write(plan, out, force=force, take_over=take_over, card=card, jobs=jobs, progress=progress)
