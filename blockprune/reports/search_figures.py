"""The figures of a search's report: nothing is shown or written here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from blockprune.measures.measure import MEASURES
from blockprune.reports.canvas import FAINT, INK, MUTED, axis_title, is_wide, new_figure, plain, tidy, title, write
from blockprune.reports.image_grid import grid_figure, search_rows
from blockprune.reports.search_view import SearchView, history
from blockprune.reports.unet import Svg, search_svg
from blockprune.runs.records import PRESET, SCAN, Evaluation

# Okabe and Ito's colours; the marker repeats what the colour says.
OURS, KNOWN, RANDOM, SINGLE = "#0072b2", "#d55e00", "#8a949c", "#c9d0d6"
NAMES = {"params": "parameters of the whole pipeline", "macs": "MACs of a U-Net step", "latency": "latency of a U-Net step"}


def search_figures(view: SearchView) -> Iterator[tuple[str, Figure | Svg]]:
    """(file name, figure) of every figure for which the search has data."""
    if not view.is_front:
        yield "unet-best.svg", search_svg(view, view.best, "found")
    if (preset := view.nearest_preset) is not None:
        yield "unet-preset.svg", search_svg(view, preset, "preset")
    yield "history.png", history_figure(view)
    yield "front.png", front_figure(view)
    if view.prompts and view.images:
        yield (
            "grid.png",
            grid_figure("The same prompts and seeds", "Teacher and finalists, one-shot.", view.prompts, search_rows(view)),
        )


def _step(ax: Axes, evaluations: list[Evaluation], measure: str, colour: str, label: str) -> None:
    values = [(i, MEASURES[measure].loss(v)) for i, v in enumerate(history(evaluations), 1) if math.isfinite(v)]
    if values:
        ax.step(*zip(*values, strict=True), where="post", color=colour, lw=1.8, label=label)


def history_figure(view: SearchView) -> Figure:
    """Best so far against evaluations: the search's, and random sets' where there are any; presets as lines."""
    figure = new_figure(7.4, 4.6)
    sub = "Evaluations are charged from the first single removal on." + (
        " Random: sets drawn within the budget." if view.random else ""
    )
    title(figure, "Best score so far", sub)
    ax = figure.add_axes((0.11, 0.13, 0.86, 0.7))
    tidy(ax)
    _step(ax, list(view.search), view.measure, OURS, "this search")
    _step(ax, list(view.random), view.measure, RANDOM, "random")
    fitting = [e for e in view.search if e.fits and e.score.value is not None]
    lines: dict[str, list[str]] = {}
    for e in (e for e in fitting if e.candidate.source == PRESET):
        lines.setdefault(f"{e.score.value or 0.0:.2g}", []).append(e.score.label)
    for text, names in lines.items():
        ax.axhline(float(text), color=KNOWN, lw=1, ls="--")
        style = {"transform": ax.get_yaxis_transform(), "ha": "right", "va": "bottom", "color": KNOWN, "fontsize": 7.5}
        write(ax, 0.99, float(text), ", ".join(names), **style)
    if is_wide(abs(e.score.value or 0.0) for e in fitting):
        ax.set_yscale("log")
    for i, e in enumerate(view.search, 1):
        if i > 1 and e.candidate.source not in {PRESET, *(f.candidate.source for f in view.search[: i - 1])}:
            ax.axvline(i - 0.5, color=FAINT, lw=0.8)
            write(ax, i, 1.01, e.candidate.source, transform=ax.get_xaxis_transform(), fontsize=7, color=MUTED)
    ax.set_xlabel("evaluations", fontsize=8.5, color=INK)
    ax.set_ylabel(axis_title(view.measure), fontsize=8.5, color=INK)
    ax.legend(fontsize=8, frameon=False, loc="center right")
    return figure


def front_figure(view: SearchView) -> Figure:
    """Quality against size: everything scored, the presets by name, the budget, and the front of the finalists."""
    figure, quantity = new_figure(7.4, 5.2), view.quantity
    title(figure, "Quality against size", "Small: scores of the search. Large: finalists on fresh seeds, with 95 % intervals.")
    ax = figure.add_axes((0.11, 0.12, 0.86, 0.73))
    tidy(ax)
    scored = [e for e in view.search if e.score.value is not None]
    for e in scored:
        colour = SINGLE if e.candidate.source == SCAN else OURS
        ax.plot(100 * view.share(e, quantity), (e.score.value or 0.0), ls="", marker=".", ms=4, color=colour, alpha=0.6)
    for e in view.finals:
        _finalist(ax, view, e, quantity)
    front = view.front(quantity)
    ys = [(e.score.value or 0.0) for e in front]
    ax.plot([100 * view.share(e, quantity) for e in front], ys, color=OURS, lw=1, zorder=1)
    total = {"params": view.graph.total.params, "macs": view.graph.total.macs(view.convention)}
    outside = {"params": view.outside_params, "macs": 0}
    for text, (kind, limit) in view.limits.items():
        if kind == quantity and kind in total:
            x = 100 * (limit + outside[kind]) / (total[kind] + outside[kind])
            ax.axvline(x, color=INK, lw=1, ls=":")
            write(ax, x, 0.99, f" budget {text}", transform=ax.get_xaxis_transform(), va="top", fontsize=7.5)
    positive = [e.score.value for e in scored if e.score.value is not None and e.score.value > 0]
    if len(positive) == len(scored) and is_wide(positive):
        ax.set_yscale("log")
    ax.set_xlabel(f"{NAMES[quantity]}, per cent of the teacher", fontsize=8.5, color=INK)
    ax.set_ylabel(axis_title(view.measure), fontsize=8.5, color=INK)
    return figure


def _finalist(ax: Axes, view: SearchView, e: Evaluation, quantity: str) -> None:
    if e.score.value is None:
        return
    known = e.candidate.source == PRESET
    x, colour = 100 * view.share(e, quantity), KNOWN if known else OURS
    if e.score.low is not None and e.score.high is not None:
        ax.vlines(x, e.score.low, e.score.high, color=colour, lw=1)
    ax.plot([x], [e.score.value], ls="", marker="D" if known else "o", ms=6.5, color=colour, mec="white", mew=0.6, zorder=3)
    if known or e.candidate.arch in [c.candidate.arch for c in view.chosen]:
        style: dict[str, Any] = {"xytext": (7, 6), "textcoords": "offset points", "fontsize": 7.5, "color": colour}
        ax.annotate(plain(e.score.label), (x, e.score.value), parse_math=False, **style)
