"""``mixprec plan``."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .memory import add_memory, gpus_of
from .options import (
    Allow,
    Allowed,
    AsJson,
    Check,
    Checked,
    Context,
    DropMtp,
    ExpertRanks,
    ForSglang,
    KvCache,
    KvCacheDtype,
    Layout,
    Link,
    OnGpus,
    RecipePath,
)
from .printing import console, print_json

if TYPE_CHECKING:
    from ..planning.types import Plan

__all__ = ["plan_from", "show_plan_notes"]


def plan(
    recipe: RecipePath,
    allow: Allow = [],  # noqa: B006 (typer copies it)
    link: Link = False,
    check: Check = Checked.SAMPLE,
    drop_mtp: DropMtp = False,
    sglang: ForSglang = None,
    gpus: OnGpus = None,
    context: Context = 32768,
    kv_cache_dtype: KvCacheDtype = KvCache.AUTO,
    ep: ExpertRanks = 1,
    as_json: AsJson = False,
) -> None:
    """Show what a build would write, without writing it; with --gpus, what serving it needs."""
    from ..report.facts import plan_facts
    from ..report.memory import memory_of_plan
    from ..report.tables import show_plan

    wanted = gpus_of(gpus)
    planned = plan_from(recipe, allow, link, check=check, drop_mtp=drop_mtp, sglang=sglang)
    facts = plan_facts(planned)
    if wanted is not None:
        add_memory(facts, memory_of_plan(planned, wanted, context, cache_dtype=kv_cache_dtype.value, ep=ep))
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
    drop_mtp: bool = False,
    sglang: str | None = None,
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
            drop_mtp=drop_mtp,
            sglang=sglang,
        )
        gc.freeze()  # its million objects live until the end: no search for garbage among them, not even at exit
    return plan


def show_plan_notes(plan: Plan, as_json: bool, shown: Plan | None = None) -> None:
    """Prints a plan's warnings, notes and problems to standard error, except those that ``shown`` has."""
    if as_json:
        return
    for warning in plan.warnings:
        if shown is None or warning not in shown.warnings:
            print(f"warning: {warning}", file=sys.stderr)
    for note in plan.notes:
        if shown is None or note not in shown.notes:
            print(f"note: {note}", file=sys.stderr)
    for problem in plan.unservable:
        if shown is None or problem not in shown.unservable:
            print(f"SGLang cannot serve this: {problem}", file=sys.stderr)
