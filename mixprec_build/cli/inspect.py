"""``mixprec inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson
from .printing import console, print_json

__all__ = ["inspect"]


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's folder, or a hub id.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint holds: a compiled one or any other."""
    from ..ranks.on_disk import open_on_disk
    from ..report.facts import inspect_facts
    from ..report.tables import show_inspect

    facts = inspect_facts(open_on_disk(checkpoint), Path(checkpoint))
    if as_json:
        print_json(facts)
    else:
        show_inspect(facts, console())
