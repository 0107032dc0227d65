"""Writes a page with a checkpoint's map: layers by experts, by format, activity and error, and a table to sort.

It is one HTML file without any reference to another. Names of the checkpoint, which are untrusted, appear in one block
of JSON, in which no markup can end; the script sets them as text.
"""

from __future__ import annotations

import html
import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.manifest import check_outside
from ..errors import OutputError, StatsError
from ..families.facts import ModelFacts
from ..families.parts import Role
from ..formats.base import FormatError
from ..storage.disk import read_regular
from ..storage.limits import load_json
from ..text import human, printable
from .page_parts import SCRIPT, STYLE

if TYPE_CHECKING:
    from ..checkpoint.manifest import Manifest
    from ..checkpoint.typed import Source
    from ..planning.types import Plan
    from ..suggesting.activity import Activity
    from ..suggesting.allocate import Suggestion

__all__ = ["check_page", "check_place", "checkpoint_rows", "map_page", "read_errors", "suggestion_rows", "write_page"]

UNREAD = "not read"
_COLORS = (
    "#4c78a8", "#f58518", "#54a24b", "#e45756", "#b279a2", "#eeca3b", "#72b7b2", "#ff9da6", "#9d755d", "#8b949e",
)  # fmt: skip
_MOST_NOTES = 100
_MOST_ERRORS = 1 << 28
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


@dataclass(slots=True)
class Row:
    """A module of the page."""

    name: str
    format: str
    source: str
    nbytes: int
    weights: int
    layer: int = -1
    """-1 for modules that no map shows: norms, routers, embeddings, draft layers."""
    place: str = ""
    """Its name within the layer."""
    expert: int = -1
    activity: float | None = None
    """The share of tokens that it runs for."""
    error: float | None = None
    """‖W−Ŵ‖/‖W‖"""


def check_place(path: Path) -> None:
    """Raises :class:`OutputError` where no new file can be."""
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}; make it first")
    check_outside(path)
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; name a file")


def check_page(path: Path) -> None:
    """Raises :class:`OutputError` where no page can be written to ``path``."""
    check_place(path)
    if path.suffix != ".html":
        raise OutputError(f"{path}: pages are written as .html")


def write_page(path: Path, text: str) -> None:
    """Writes a page. Raises :class:`OutputError`."""
    check_page(path)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


def read_errors(path: Path) -> dict[str, float]:
    """Module -> relative error, from a file that ``mixprec verify --against NAME --json`` printed.

    Raises:
        StatsError: the file cannot be read, or is another.
    """
    try:
        found = load_json(read_regular(path, _MOST_ERRORS), 8_000_000)
        errors = found["errors"] if isinstance(found, dict) else None
        return {str(entry["module"]): float(entry["relative"]) for entry in errors or [] if _is_number(entry)}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise StatsError(
            f"{path}: no errors of modules; write them with `mixprec verify OUT --against NAME --json > {path.name}`"
        ) from error


def _is_number(entry: Mapping[str, Any]) -> bool:
    relative = float(entry["relative"])
    if not (math.isfinite(relative) and relative >= 0):
        raise ValueError("no error")
    return True


def checkpoint_rows(
    source: Source,
    recorded: Manifest | None,
    activity: Activity | None = None,
    errors: Mapping[str, float] | None = None,
) -> list[Row]:
    """The modules of a checkpoint.

    Args:
        recorded: the manifest of a compiled one, which says where its modules come from.
        activity: expert activity of its model.
        errors: module -> relative error.

    Raises:
        StatsError: the activity or the errors are another model's.
    """
    facts, rows = source.facts, []
    origins = {} if recorded is None else {name: entry.source for name, entry in recorded.tensors().items()}
    for name, module in source.checkpoint.modules.items():
        fmt = source.formats[name]
        tensors = list(module.tensors.values())
        origin = next((origins[t.name] for t in tensors if t.name in origins), "")
        if isinstance(fmt, FormatError):
            rows.append(Row(name, UNREAD, origin, module.nbytes, 0))
            continue
        shape = fmt.shape(module)
        role = facts.family.role_of(name, shape, module.tensors)
        rows.append(_placed(Row(name, fmt.kind, origin, module.nbytes, prod(shape)), role, facts))
    if activity is not None:
        _add_activity(rows, activity, facts)
    if errors:
        unknown = errors.keys() - {row.name for row in rows}
        if unknown:
            raise StatsError(f"errors of {min(unknown)}, which this checkpoint does not have: they are another model's")
        for row in rows:
            row.error = errors.get(row.name)
    return rows


def suggestion_rows(suggestion: Suggestion) -> list[Row]:
    """The modules of a suggested mix, with the measured error of each choice and how often its experts run."""
    rows = plan_rows(suggestion.plan)
    by_name = {row.name: row for row in rows}
    for group, option in suggestion.picked():
        for member in group.members:
            row = by_name[member]
            if group.power > 0:
                row.error = math.sqrt(option.error / group.power)
            if row.expert >= 0:
                row.activity = group.frequency
    return rows


def plan_rows(plan: Plan) -> list[Row]:
    """The modules of a plan."""
    facts = plan.sources.model.facts
    return [
        _placed(
            Row(module.name, module.format.kind, module.source, module.nbytes, prod(module.shape)), module.role, facts
        )
        for module in plan.modules.values()
    ]


def _placed(row: Row, role: Role, facts: ModelFacts) -> Row:
    family = facts.family
    layer, place = family.place_of(row.name)
    if layer is not None and not role.never_quantized and not family.is_draft(row.name, facts.layers):
        expert = family.expert_of(row.name)
        row.layer, row.place, row.expert = layer, place, -1 if expert is None else expert[1]
    return row


def _add_activity(rows: Sequence[Row], activity: Activity, facts: ModelFacts) -> None:
    experts: Counter[int] = Counter()
    for row in rows:
        if row.expert >= 0:
            experts[row.layer] = max(experts[row.layer], row.expert + 1)
    for layer, counts in activity.counts.items():
        if layer not in experts or counts[experts[layer] :].any():
            raise StatsError(f"the activity counts experts of layer {layer} that the checkpoint does not have")
    for row in rows:
        if row.expert >= 0 and row.layer in activity.counts:
            row.activity = activity.frequency(row.layer, row.expert, facts.experts_per_token or 1)


def map_page(rows: Sequence[Row], title: str, about: Collection[str], frontier: Mapping[str, Any] | None = None) -> str:
    """A complete page.

    Args:
        about: lines of text below the title.
        frontier: facts of a suggestion, of which the frontier of loss against bytes is drawn.
    """
    heading = html.escape(printable(title))
    lines = [*about][:_MOST_NOTES]
    paragraphs = "".join(f"<p>{html.escape(printable(line))}</p>\n" for line in lines)
    curve = "" if frontier is None else f"<section><h2>Loss against bytes</h2>\n{_frontier(frontier)}</section>\n"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{heading}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{heading}</h1>\n{paragraphs}"
        "<noscript><p>The maps and the table are drawn by a script of this page.</p></noscript>\n"
        f'<ul class="legend" id="legend"></ul>\n{curve}'
        '<section><h2>Layers × experts</h2><div class="maps" id="experts"></div></section>\n'
        '<section><h2>Layers × other linears</h2><div class="maps" id="others"></div></section>\n'
        "<section><h2>Modules</h2>\n"
        '<p class="pages"><input id="filter" type="search" placeholder="part of a name, format or source" '
        'aria-label="filter modules"><button id="before">previous</button><button id="after">next</button>'
        '<span id="count" class="dim"></span></p>\n<div class="scroll"><table id="table"></table></div></section>\n'
        f'<script type="application/json" id="data">{_data(rows)}</script>\n<script>{SCRIPT}</script>\n'
        "</body>\n</html>\n"
    )


def _data(rows: Sequence[Row]) -> str:
    """The block of JSON. ``<``, ``>`` and ``&`` are escaped, so that nothing in it can end the block."""
    nbytes, weights, modules = Counter[str](), Counter[str](), Counter[str]()
    for row in rows:
        nbytes[row.format] += row.nbytes
        weights[row.format] += row.weights
        modules[row.format] += 1
    formats = sorted(modules, key=lambda fmt: (-nbytes[fmt] / max(1, weights[fmt]), fmt))
    sources = sorted({row.source for row in rows} - {""}) and sorted({row.source for row in rows})
    number_of = {name: number for number, name in enumerate(formats)}
    source_of = {name: number for number, name in enumerate(sources)}
    data = {
        "formats": [
            {"name": name, "color": _COLORS[i % len(_COLORS)], "modules": modules[name], "size": human(nbytes[name])}
            for i, name in enumerate(formats)
        ],
        "sources": sources,
        "names": [row.name for row in rows],
        "format": [number_of[row.format] for row in rows],
        "source": [source_of[row.source] for row in rows] if sources else [],
        "bytes": [row.nbytes for row in rows],
        "weights": [row.weights for row in rows],
        "layer": [row.layer for row in rows],
        "place": [row.place for row in rows],
        "expert": [row.expert for row in rows],
        "activity": _known([row.activity for row in rows]),
        "error": _known([row.error for row in rows]),
    }
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _known(values: Sequence[float | None]) -> list[float | None] | None:
    """Values to six digits; None where none is known."""
    if all(value is None for value in values):
        return None
    return [None if value is None else float(f"{value:.6g}") for value in values]


def _frontier(facts: Mapping[str, Any]) -> str:
    """An SVG of the frontier, this mix, those of one source, and the budget."""
    wide, high, left, top = 760, 340, 70, 16
    points = [(point["bytes"], point["loss"]) for point in facts["frontier"]]
    marks = [(entry["bytes"], entry["loss"], f"all {entry['source']}") for entry in facts["uniform"]]
    marks.append((facts["bytes"], facts["loss"], "this mix"))
    all_bytes = [*(x for x, _ in points), *(x for x, _, _ in marks), facts["budget"]]
    losses = [*(y for _, y in points), *(y for _, y, _ in marks)]
    log = min(losses) > 0
    low, most = (math.log10(min(losses)), math.log10(max(losses))) if log else (0.0, max(losses))
    first, last = min(all_bytes), max(all_bytes)

    def x(nbytes: float) -> float:
        return left + (wide - left - 120) * ((nbytes - first) / (last - first) if last > first else 0.5)

    def y(loss: float) -> float:
        value = math.log10(loss) if log else loss
        return top + (high - top - 40) * (1 - (value - low) / (most - low) if most > low else 0.5)

    parts = [_axes(wide, high, left, top, (first, last), (min(losses), max(losses)), x, y, str(facts["objective"]))]
    line = " ".join(f"{x(b):.1f},{y(v):.1f}" for b, v in points)
    parts.append(f'<polyline points="{line}" fill="none" stroke="var(--high)" stroke-width="2"/>')
    at = x(facts["budget"])
    parts.append(
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{high - 40}" stroke="currentColor" stroke-dasharray="3 4"/>'
        f'<text x="{at + 4:.1f}" y="{top + 10}">budget</text>'
    )
    for nbytes, loss, name in marks:
        size, color = (7, "#e45756") if name == "this mix" else (4, "#8b949e")
        label = html.escape(printable(f"{name}: {human(nbytes)}, {loss:.3g}"))
        parts.append(
            f'<circle cx="{x(nbytes):.1f}" cy="{y(loss):.1f}" r="{size}" fill="{color}"><title>{label}</title></circle>'
            f'<text x="{x(nbytes) + 9:.1f}" y="{y(loss) - 6:.1f}">{html.escape(printable(name))}</text>'
        )
    return f'<svg viewBox="0 0 {wide} {high}" width="{wide}" role="img" aria-label="loss">{"".join(parts)}</svg>\n'


def _axes(
    wide: int, high: int, left: int, top: int, span: tuple[float, float], losses: tuple[float, float], x: Any, y: Any,
    objective: str,
) -> str:  # fmt: skip
    """Two axes, each with its two ends."""

    def ticks() -> Iterator[str]:
        for nbytes in dict.fromkeys(span):
            yield f'<text x="{x(nbytes):.1f}" y="{high - 22}" text-anchor="middle">{human(nbytes)}</text>'
        for loss in dict.fromkeys(losses):
            yield f'<text x="{left - 6}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:.3g}</text>'

    return (
        f'<path d="M{left - 2} {top}V{high - 38}H{wide - 60}" fill="none" stroke="var(--line)"/>{"".join(ticks())}'
        f'<text x="{left}" y="{high - 4}">bytes of the files, against loss ({html.escape(objective)})</text>'
    )
