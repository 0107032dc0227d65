"""``mixprec build``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Allow, Allowed, AsJson, Check, Checked, DropMtp, ForSglang, Jobs, Layout, Link, Quiet, RecipePath
from .plan import plan_from, show_plan_notes
from .printing import print_json, progress_bar

if TYPE_CHECKING:
    from ..output.parts import Part
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
    part: Annotated[
        str | None,
        typer.Option(
            "--part", metavar="3/16", help="Build this part of the files only, beside the output.", show_default=False
        ),
    ] = None,
    finish: Annotated[
        bool, typer.Option("--finish", help="Make the output of its parts, which any machines built.")
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
    drop_mtp: DropMtp = False,
    sglang: ForSglang = None,
    card: Annotated[
        bool, typer.Option("--card/--no-card", help="Write a model card for the hub, README.md, above the model's own.")
    ] = True,
    jobs: Jobs = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compile a recipe's sources into one checkpoint."""
    from ..output.build import run_plan
    from ..output.parts import shards_of
    from ..output.target import check_output

    if part is not None and finish:
        raise typer.BadParameter("a part is built, or all parts are finished: give one of the two", param_hint="--part")
    wanted = None if part is None else _part(part)
    plan = plan_from(recipe, allow, link, layout, check, drop_mtp, sglang)
    check_output(plan, out, force=force)
    show_plan_notes(plan, as_json)

    def follow(other: Plan) -> None:
        nonlocal plan
        show_plan_notes(other, as_json, shown=plan)
        plan = other

    mine = plan.shards if wanted is None else shards_of(plan, wanted)
    nbytes = plan.written_bytes if wanted is None else sum(shard.data_bytes for shard in mine)
    with progress_bar("writing", nbytes, quiet or as_json) as progress:
        unservable = Allowed.UNSERVABLE in allow
        written = run_plan(
            plan,
            out,
            force=force,
            take_over=take_over,
            part=wanted,
            finish=finish,
            allow_unservable=unservable,
            link=link,
            check_all=check is Checked.FULL,
            card=card,
            jobs=jobs,
            progress=progress,
            replanned=follow,
        )
    if wanted is not None:
        _show_part(recipe, out, wanted, [shard.file for shard in mine], nbytes, written, quiet, as_json)
    elif as_json:
        from ..report.facts import plan_facts

        print_json({"output": str(out), "manifest": str(written), **plan_facts(plan)})
    elif not quiet:
        from ..text import as_word, counted, human, printable

        only_ranks = plan.recipe.layout == Layout.PRESPLIT.value
        cut = "files cut for ranks only" if only_ranks else counted(len(plan.shards), "file")
        print(f"{printable(str(out))}: {len(plan.modules):,} modules, {human(plan.tensor_bytes)} in {cut}")
        for degree, nbytes in plan.presplit.items():
            print(f"{printable(str(out))}/presplit/{degree}: files of all ranks, {human(nbytes)}")
        print(f"next: mixprec verify {printable(as_word(out))}")


def _part(text: str) -> Part:
    from ..output.parts import Part

    try:
        return Part.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--part") from None


def _show_part(
    recipe: Path, out: Path, part: Part, files: list[str], nbytes: int, written: Path, quiet: bool, as_json: bool
) -> None:
    """Prints what a part has; ``nbytes`` are those of its tensors, and ``written`` is where its files are."""
    from ..text import as_word, counted, human, printable

    if as_json:
        folder = str(written) if files else None
        print_json({"output": str(out), "part": str(part), "folder": folder, "files": files, "bytes": nbytes})
    elif not quiet and not files:
        print(f"part {part}: nothing to do, there are more parts than files")
    elif not quiet:
        print(f"part {part}: {counted(len(files), 'file')}, {human(nbytes)}, in {printable(str(written))}")
        finish = f"mixprec build {as_word(recipe)} -o {as_word(out)} --finish"
        print(f"when all parts are there: {printable(finish)}")
