"""``mixprec build``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Allow, Allowed, AsJson, Check, Checked, Jobs, Layout, Link, Quiet, RecipePath
from .plan import plan_from, show_plan_notes
from .printing import print_json, progress_bar

if TYPE_CHECKING:
    from ..planning.types import Plan

__all__ = ["build"]


def build(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option("--output", "-o", help="The folder to create.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace an output that mixprec wrote before.")] = False,
    take_over: Annotated[
        bool,
        typer.Option("--take-over", help="Continue a stopped build, even one that another machine began."),
    ] = False,
    allow: Allow = [],  # noqa: B006 (typer copies it)
    link: Link = False,
    layout: Annotated[
        Layout | None,
        typer.Option(
            help="Files of the complete model (merged), cut for ranks (presplit), or both; the recipe's by default."
        ),
    ] = None,
    check: Check = Checked.SAMPLE,
    jobs: Jobs = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compile a recipe's sources into one checkpoint."""
    from ..output.build import run_plan
    from ..output.target import check_output

    plan = plan_from(recipe, allow, link, layout, check)
    check_output(plan, out, force=force)
    show_plan_notes(plan, as_json)

    def follow(other: Plan) -> None:
        nonlocal plan
        show_plan_notes(other, as_json, shown=plan)
        plan = other

    with progress_bar("writing", plan.written_bytes, quiet or as_json) as progress:
        unservable = Allowed.UNSERVABLE in allow
        manifest = run_plan(
            plan,
            out,
            force=force,
            take_over=take_over,
            allow_unservable=unservable,
            link=link,
            check_all=check is Checked.FULL,
            jobs=jobs,
            progress=progress,
            replanned=follow,
        )
    if as_json:
        from ..report.facts import plan_facts

        print_json({"output": str(out), "manifest": str(manifest), **plan_facts(plan)})
    elif not quiet:
        from ..text import counted, human, printable

        only_ranks = plan.recipe.layout == Layout.PRESPLIT.value
        cut = "files cut for ranks only" if only_ranks else counted(len(plan.shards), "file")
        print(f"{printable(str(out))}: {len(plan.modules):,} modules, {human(plan.tensor_bytes)} in {cut}")
        for degree, nbytes in plan.presplit.items():
            print(f"{printable(str(out))}/presplit/{degree}: files of all ranks, {human(nbytes)}")
        print(f"next: mixprec verify {printable(str(out))}")
