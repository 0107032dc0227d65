"""``mixprec suggest``."""

from __future__ import annotations

from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..suggesting.objective import Objective
from .options import Allow, Allowed, AsJson, Jobs, Quiet
from .printing import console, print_json, progress_bar

if TYPE_CHECKING:
    from ..storage.threads import Progress

__all__ = ["suggest"]


class Device(str, Enum):
    """Values of ``--device``: where errors are measured."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def suggest(
    base: Annotated[Path, typer.Argument(help="A recipe with the sources to choose from (YAML).", show_default=False)],
    budget: Annotated[str, typer.Option(help="Bytes of the files to be written: 140GB, 130GiB.", show_default=False)],
    out: Annotated[Path, typer.Option("--output", "-o", help="The recipe to write.", show_default=False)],
    stats: Annotated[
        list[Path], typer.Option("--stats", help="Expert activity (JSON, or a dump of SGLang's recorder); repeatable.")
    ] = [],  # noqa: B006
    moments: Annotated[
        Path | None, typer.Option(help="Second moments of the modules' inputs (safetensors).", show_default=False)
    ] = None,
    swaps: Annotated[
        Path | None,
        typer.Option(help="What the model loses by measured swaps (JSON of recipes/swaps.py).", show_default=False),
    ] = None,
    objective: Annotated[
        Objective | None,
        typer.Option(
            help="What to minimize; by default `measured` with swaps, else `relative-output` with moments, else "
            "`relative`."
        ),
    ] = None,
    min_format: Annotated[
        list[str],
        typer.Option(help="For these modules, no format of fewer bits than this one.", metavar="PATTERN: FORMAT"),
    ] = [],  # noqa: B006
    pin: Annotated[list[str], typer.Option(help="For these modules, this source.", metavar="PATTERN: SOURCE")] = [],  # noqa: B006
    plot: Annotated[Path | None, typer.Option(help="Draw loss against bytes (PNG).", show_default=False)] = None,
    page: Annotated[
        Path | None,
        typer.Option(
            "--html",
            help="Write a page: layers x experts by format, activity, error; the frontier.",
            show_default=False,
        ),
    ] = None,
    errors: Annotated[
        Path | None,
        typer.Option(help="Where measured errors are kept; by default below ~/.cache/mixprec.", show_default=False),
    ] = None,
    device: Annotated[
        Device,
        typer.Option(
            help="Measure errors by numpy (`cpu`), or by torch on a GPU: `cuda`, or `auto` if torch finds one."
        ),
    ] = Device.AUTO,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing recipe.")] = False,
    allow: Allow = [],  # noqa: B006
    jobs: Jobs = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Choose a source for every module: the least error within a budget. Writes a recipe."""
    from ..recipe.recipe import load_recipe, parse_size
    from ..recipe.sources import open_sources
    from ..report.tables import show_suggestion
    from ..suggesting.activity import read_activity
    from ..suggesting.allocate import suggest as run
    from ..suggesting.choices import Request
    from ..suggesting.distortion import DistortionCache, Moments, default_cache
    from ..suggesting.facts import suggestion_facts
    from ..suggesting.recipe_file import check_target, write_recipe
    from ..suggesting.swaps import read_swaps

    try:
        nbytes = parse_size(budget)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--budget") from error
    check_target(out, base, force=force)
    if plot is not None:
        from ..report.figures import check_picture

        check_picture(plot)
    if page is not None:
        from ..report.page import check_page

        check_page(page)
    request = Request(
        budget=nbytes,
        objective=objective,
        activity=read_activity(stats) if stats else None,
        moments=Moments(moments) if moments else None,
        swaps=read_swaps(swaps) if swaps else None,
        pins=[_wish(text, "--pin") for text in pin],
        floors=[_wish(text, "--min-format") for text in min_format],
        allow_unservable=Allowed.UNSERVABLE in allow,
    )
    recipe = load_recipe(base)
    with ExitStack() as stack:
        cache = stack.enter_context(DistortionCache(errors or default_cache()))

        def watch(total: int) -> Progress:
            return stack.enter_context(progress_bar("measuring", total, quiet or as_json))

        suggestion = run(recipe, open_sources(recipe), request, cache, device=device.value, jobs=jobs, watch=watch)
    write_recipe(suggestion, out, force=force)
    if plot is not None:
        from ..report.figures import draw_frontier

        draw_frontier(suggestion, plot)
    if page is not None:
        from ..report.page import map_page, suggestion_rows, write_page

        facts = suggestion_facts(suggestion)
        about = [
            f"Chosen by mixprec for {nbytes:,} bytes: {facts['bytes']:,} bytes, loss {facts['loss']:.6g} "
            f"({facts['objective']}), at most {facts['gap']:.2g} of it above the least",
            *(f"note: {note}" for note in facts["notes"]),
        ]
        write_page(page, map_page(suggestion_rows(suggestion), out.name, about, facts))
    if as_json:
        print_json({"recipe": str(out), **suggestion_facts(suggestion)})
    elif not quiet:
        show_suggestion(suggestion_facts(suggestion), console())
        from ..text import as_word, printable

        print(f"next: mixprec plan {printable(as_word(out))}")


def _wish(text: str, flag: str) -> tuple[str, str]:
    pattern, colon, word = text.rpartition(":")
    if not (colon and pattern.strip() and word.strip()):
        raise typer.BadParameter(f"{text!r} is not `PATTERN: WORD`", param_hint=flag)
    return pattern.strip(), word.strip()
