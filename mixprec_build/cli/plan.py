"""``mixprec plan``."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .options import Allow, Allowed, AsJson, Check, Checked, Layout, Link, RecipePath
from .printing import console, print_json

if TYPE_CHECKING:
    from ..planning.types import Plan

__all__ = ["plan_from", "show_plan_notes"]


def plan(
    recipe: RecipePath,
    allow: Allow = [],  # noqa: B006 (typer copies it)
    link: Link = False,
    check: Check = Checked.SAMPLE,
    as_json: AsJson = False,
) -> None:
    """Show what a build would write, without writing it."""
    from ..report.facts import plan_facts
    from ..report.tables import show_plan

    facts = plan_facts(plan_from(recipe, allow, link, check=check))
    if as_json:
        print_json(facts)
    else:
        show_plan(facts, console())


def plan_from(
    recipe: Path,
    allow: list[Allowed],
    link: bool,
    layout: Layout | None = None,
    check: Checked = Checked.SAMPLE,
) -> Plan:
    """Plans a recipe by the options of a command."""
    from ..output.build import no_garbage_collection, plan_recipe

    wanted = None if layout is None else layout.value
    with no_garbage_collection():
        plan = plan_recipe(
            recipe,
            allow_unservable=Allowed.UNSERVABLE in allow,
            link=link,
            layout=wanted,
            check_all=check is Checked.FULL,
        )
        gc.freeze()  # its million objects live until the end: no search for garbage among them, not even at exit
    return plan


def show_plan_notes(plan: Plan, as_json: bool, shown: Plan | None = None) -> None:
    """Prints a plan's notes and problems to standard error, except those that ``shown`` has."""
    if as_json:
        return
    for note in plan.notes:
        if shown is None or note not in shown.notes:
            print(f"note: {note}", file=sys.stderr)
    for problem in plan.unservable:
        if shown is None or problem not in shown.unservable:
            print(f"SGLang cannot serve this: {problem}", file=sys.stderr)
