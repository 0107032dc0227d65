"""Draws a heat map of expert activity (PNG, HTML, terminal) and the frontier of loss against bytes (PNG).

PNGs need matplotlib, which the extra ``plot`` installs.
"""

from __future__ import annotations

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import OutputError
from ..suggesting.activity import Activity
from .page import check_place

if TYPE_CHECKING:
    from rich.console import Console

    from ..suggesting.allocate import Suggestion

__all__ = ["check_picture", "draw_frontier", "draw_heatmap", "show_heatmap"]


_DARK, _LIGHT = np.array([68.0, 1.0, 84.0]), np.array([253.0, 231.0, 37.0])
_MIDDLE = np.array([33.0, 145.0, 140.0])  # these three are the ends and the middle of matplotlib's viridis

_Grid = npt.NDArray[np.float64]


def check_picture(path: Path, *, page: bool = False) -> None:
    """Raises :class:`OutputError` where no picture can be drawn to ``path``; ``page`` allows HTML, too."""
    check_place(path)
    if page and path.suffix == ".html":
        return
    if path.suffix != ".png":
        raise OutputError(f"{path}: pictures are written as .png (a heat map also as .html)")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise OutputError(f"{path}: PNGs are drawn by matplotlib; pip install matplotlib") from error


def _grid(activity: Activity) -> tuple[list[int], _Grid]:
    """Layers, and ``[layers, experts]``: an expert's tokens over its layer's mean; NaN where a layer has fewer."""
    wide = max(map(len, activity.counts.values()))
    grid = np.full((len(activity.counts), wide), np.nan)
    for row, counts in zip(grid, activity.counts.values(), strict=True):
        row[: len(counts)] = counts / max(counts.mean(), 1e-12)
    return list(activity.counts), grid


def draw_heatmap(activity: Activity, path: Path) -> None:
    """Writes ``path``, an HTML page or a PNG by its suffix.

    Raises:
        OutputError: as :func:`check_picture`, or a file that cannot be written.
    """
    check_picture(path, page=True)
    if path.suffix == ".html":
        try:
            path.write_text(_html(activity), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
        return
    layers, grid = _grid(activity)
    figure, axes = _figure((min(16.0, 3 + grid.shape[1] / 10), min(16.0, 2 + len(layers) / 6)))
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", vmin=0)
    figure.colorbar(image, ax=axes, label="tokens, over the layer's mean")
    step = -(-len(layers) // 24)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set(xlabel="expert", ylabel="layer", title="Expert activity")
    _save(figure, path)


def draw_frontier(suggestion: Suggestion, path: Path) -> None:
    """Writes a PNG: the frontier of loss against bytes, this mix, and all from one source.

    Raises:
        OutputError: as for :func:`draw_heatmap`.
    """
    check_picture(path)
    figure, axes = _figure((8.0, 5.0))
    line = suggestion.frontier
    axes.plot(line.cost / 1e9, line.loss, label="frontier (lower bound)", zorder=1)
    axes.scatter([suggestion.nbytes / 1e9], [suggestion.solution.loss], marker="*", s=160, label="this mix", zorder=3)
    for uniform in suggestion.uniform:
        axes.scatter([uniform.nbytes / 1e9], [uniform.loss], label=f"all {uniform.source}", zorder=2)
    axes.axvline(suggestion.request.budget / 1e9, linestyle=":", linewidth=1, label="budget")
    if (line.loss > 0).all():
        axes.set_yscale("log")
    axes.set(xlabel="GB", ylabel=f"loss ({suggestion.objective.value})", title="Loss against bytes")
    axes.legend()
    _save(figure, path)


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


def _color(value: float, most: float) -> tuple[int, int, int]:
    at = min(1.0, value / most) if most else 0.0
    color = _DARK + (_MIDDLE - _DARK) * 2 * at if at < 0.5 else _MIDDLE + (_LIGHT - _MIDDLE) * (2 * at - 1)
    red, green, blue = (int(part) for part in color)
    return red, green, blue


def _html(activity: Activity) -> str:
    """A self-contained page; each cell has its numbers in its title."""
    layers, grid = _grid(activity)
    most = float(np.nanmax(grid))
    rows = []
    for layer, row in zip(layers, grid, strict=True):
        counts = activity.counts[layer]
        cells = "".join(
            f'<td style="background:#{bytes(_color(float(row[e]), most)).hex()}" '
            f'title="layer {layer}, expert {e}: {int(count):,} tokens, {row[e]:.2f} of the mean"></td>'
            for e, count in enumerate(counts)
        )
        rows.append(f"<tr><th>{layer}</th>{cells}</tr>")
    style = (
        "body{font:14px sans-serif}table{border-collapse:collapse}td{width:8px;height:12px;padding:0}"
        "th{font-weight:normal;text-align:right;padding-right:6px}"
    )
    title = html.escape(f"Expert activity: {len(layers)} layers, up to {grid.shape[1]} experts")
    legend = f"Dark is no token, bright is {most:.2f} times the layer's mean."
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style></head><body><h1>{title}</h1>"
        f"<p>{legend} Rows are layers, columns are experts.</p><table>\n"
        + "\n".join(rows)
        + "\n</table></body></html>\n"
    )


def show_heatmap(activity: Activity, console: Console) -> None:
    """Prints blocks, two layers a line; neighbouring experts share a block where there are too many."""
    from rich.text import Text

    layers, grid = _grid(activity)
    room = max(16, console.width - 8)
    fold = -(-grid.shape[1] // room)
    folded = _folded(grid, fold)
    most = float(np.nanmax(folded))
    per = "an expert" if fold == 1 else f"{fold} experts"
    console.print(Text(f"Heat map: a block is {per}, bright is {most:.2f} times the layer's mean"))
    plain = console.color_system is None
    for top in range(0, len(layers), 1 if plain else 2):
        line = Text(f"{layers[top]:>6} ")
        for column in range(folded.shape[1]):
            upper = folded[top, column]
            if plain:  # no colors: five shades
                line.append(" " if np.isnan(upper) else " ░▒▓█"[min(4, int(5 * upper / most) if most else 0)])
                continue
            lower = folded[top + 1, column] if top + 1 < len(layers) else np.nan
            style = " on ".join(
                "default" if np.isnan(v) else "rgb({},{},{})".format(*_color(float(v), most)) for v in (upper, lower)
            )
            line.append("▀" if not np.isnan(upper) else " ", style)
        console.print(line, soft_wrap=True)


def _folded(grid: _Grid, fold: int) -> _Grid:
    """The largest of every ``fold`` columns: one busy expert must not vanish among idle ones."""
    layers, experts = grid.shape
    padded = np.full((layers, -(-experts // fold) * fold), -np.inf)
    padded[:, :experts] = np.where(np.isnan(grid), -np.inf, grid)
    most = padded.reshape(layers, -1, fold).max(axis=2)
    return np.where(np.isinf(most), np.nan, most)
