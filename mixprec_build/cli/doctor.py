"""``mixprec doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson
from .printing import console, print_json

__all__ = ["doctor"]


def doctor(
    folder: Annotated[
        Path | None, typer.Argument(help="A compiled checkpoint to be served.", show_default=False)
    ] = None,
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels", help="Compare SGLang's kernels with float64 arithmetic on a few weights, in under a minute."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check that this machine can serve compiled checkpoints, or this one, with SGLang."""
    from ..report.doctor import examine

    if kernels and folder is None:
        raise typer.BadParameter("--kernels compares them on a checkpoint's weights: name its folder")
    findings = examine(folder, kernels=kernels)
    if as_json:
        print_json([{"status": f.status, "subject": f.subject, "text": f.text} for f in findings])
    else:
        from ..report.tables import show_findings

        show_findings([(f.status, f.subject, f.text) for f in findings], console())
    if any(f.status == "fail" for f in findings):
        raise typer.Exit(1)
