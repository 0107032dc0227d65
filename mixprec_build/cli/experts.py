"""``mixprec experts``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AsJson
from .printing import console, print_json

__all__ = ["experts"]


def experts(
    files: Annotated[list[Path], typer.Argument(help="Activity (JSON) or dumps of SGLang's recorder (.pt), added up.")],
    top: Annotated[int, typer.Option(min=0, help="How many of the busiest experts to list.")] = 20,
    heatmap: Annotated[
        Path | None, typer.Option(help="Draw layers x experts: .png or .html.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show how tokens were spread over experts."""
    from ..report.tables import show_activity
    from ..suggesting.activity import activity_facts, read_activity

    if heatmap is not None:
        from ..report.figures import check_picture, draw_heatmap

        check_picture(heatmap, page=True)
    activity = read_activity(files)
    if heatmap is not None:
        draw_heatmap(activity, heatmap)
    facts = activity_facts(activity, top)
    if as_json:
        print_json(facts)
    else:
        from ..report.figures import show_heatmap

        show_activity(facts, console())
        show_heatmap(activity, console())
