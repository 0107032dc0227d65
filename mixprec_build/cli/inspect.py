"""``mixprec inspect``."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .memory import add_memory, gpus_of
from .options import AsJson, Context, ExpertRanks, KvCache, KvCacheDtype, OnGpus
from .printing import console, print_json

if TYPE_CHECKING:
    from ..checkpoint.typed import Source

__all__ = ["inspect"]


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint's folder, or a hub id.", show_default=False)],
    gpus: OnGpus = None,
    context: Context = 32768,
    kv_cache_dtype: KvCacheDtype = KvCache.AUTO,
    ep: ExpertRanks = 1,
    page: Annotated[
        Path | None,
        typer.Option("--html", help="Write a page: layers x experts by format, and a table.", show_default=False),
    ] = None,
    stats: Annotated[
        list[Path], typer.Option("--stats", help="With --html: expert activity, as `suggest` reads it; repeatable.")
    ] = [],  # noqa: B006
    errors: Annotated[
        Path | None,
        typer.Option(help="With --html: what `verify --against NAME --json` printed.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a checkpoint holds: a compiled one or any other; with --gpus, what serving it needs."""
    from ..ranks.on_disk import open_on_disk
    from ..report.facts import inspect_facts
    from ..report.tables import show_inspect
    from ..storage.garbage import no_garbage_collection

    wanted = gpus_of(gpus)
    if page is not None:
        from ..report.page import check_page

        check_page(page)
    elif stats or errors is not None:
        raise typer.BadParameter("has no page to be shown on", param_hint="--stats" if stats else "--errors")
    with no_garbage_collection():
        source = open_on_disk(checkpoint)
        facts = inspect_facts(source, Path(checkpoint))
        gc.freeze()  # what was read lives until the end
    if wanted is not None:
        from ..report.memory import memory_of_source

        add_memory(facts, memory_of_source(source, wanted, context, cache_dtype=kv_cache_dtype.value, ep=ep))
    if page is not None:
        _write_map(page, source, facts, Path(checkpoint), stats, errors)
    if as_json:
        print_json(facts)
    else:
        show_inspect(facts, console())


def _write_map(
    page: Path, source: Source, facts: dict[str, Any], folder: Path, stats: list[Path], errors: Path | None
) -> None:
    from ..checkpoint.manifest import read_manifest
    from ..report.page import checkpoint_rows, map_page, read_errors, write_page
    from ..suggesting.activity import read_activity
    from ..text import human

    recorded = read_manifest(folder) if "manifest_checksum" in facts else None
    activity = read_activity(stats) if stats else None
    rows = checkpoint_rows(source, recorded, activity, None if errors is None else read_errors(errors))
    about = [
        f"{facts['modules']:,} modules, {facts['parameters']:,} parameters in {human(facts['bytes'])}, "
        f"{facts['bits_per_weight'] or 0:.2f} bits a weight ({facts['model_type']})",
        *(f"not read: {', '.join(entry['modules'][:4])}: {entry['reason']}" for entry in facts["unread"]),
        *(f"SGLang cannot serve this: {problem}" for problem in facts.get("unservable", [])),
        *(f"note: {note}" for note in facts.get("notes", [])),
    ]
    write_page(page, map_page(rows, facts["location"], about))
