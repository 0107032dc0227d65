"""``mixprec verify``."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Annotated

import typer

from .options import AsJson, Folder, Quiet
from .printing import console, print_json, progress_bar

__all__ = ["verify"]


def verify(
    folder: Folder,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            help="Also show how far quantized weights are from those of this unquantized source (its name), folder or "
            "hub id.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        list[str], typer.Option("--source", help="NAME=LOCATION: where a source has moved to.", metavar="NAME=LOCATION")
    ] = [],  # noqa: B006
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Compare a compiled checkpoint with its sources, bit for bit."""
    from ..checkpoint.manifest import read_head
    from ..checkpoint.typed import open_source
    from ..output.verify import verify as run
    from ..output.weight_errors import comparable, weight_errors
    from ..ranks.on_disk import open_on_disk

    moved = dict(_pair(item) for item in source)
    if against:
        recorded = read_head(folder).sources.get(against)
        reference = open_source(moved.get(against) or (recorded and recorded.place) or against)
        ours = open_on_disk(str(folder))
        comparable(ours, reference)  # before the hour that reading may take
    with ExitStack() as stack:
        result = run(
            folder,
            sources=moved,
            watch=lambda total: stack.enter_context(progress_bar("comparing", total, quiet or as_json)),
        )
    errors = list(weight_errors(ours, reference)) if against else []
    if as_json:
        print_json(
            {
                "bit_for_bit": result.bit_for_bit,
                "by_checksum": result.by_checksum,
                "gone": result.gone,
                "differences": result.differences,
                "leftovers": result.leftovers,
                "beside": result.beside,
                "drop_mtp": result.drops_mtp,
                "card": result.card,
                "errors": [{"module": e.module, "format": e.kind, "relative": e.relative} for e in errors],
            }
        )
    elif not quiet:
        from ..report.tables import show_errors

        for reason in result.gone:
            print(f"compared by checksum only, source {reason}")
        if result.leftovers:
            print(f"left behind by a `mixprec split` that was stopped: {', '.join(result.leftovers)}; repeat it")
        if result.beside:
            print(f"beside the checkpoint, and no part of it: {', '.join(result.beside)}")
        if result.drops_mtp:
            print("draft layers (MTP): left out when it was built (--drop-mtp)")
        if result.card:
            print(f"README.md, the model card: {result.card} since the build, which is no difference of the checkpoint")
        compared = f"{result.bit_for_bit:,} tensors bit for bit with their sources, {result.by_checksum:,} by checksum"
        print(f"compared {compared}")
        if errors:
            show_errors(errors, against or "", console())
    if result.differences:
        for difference in result.differences:
            print(f"differs: {difference}", file=sys.stderr)
        if not quiet and not as_json:
            print(f"differences: {len(result.differences)}")
        raise typer.Exit(1)
    if not quiet and not as_json:
        print("no difference")


def _pair(text: str) -> tuple[str, str]:
    name, equals, location = text.partition("=")
    if not (name and equals and location):
        raise typer.BadParameter(f"{text!r} is not NAME=LOCATION", param_hint="--source")
    return name, location
