"""The figures of a scan's report, built with matplotlib's objects: nothing is shown or written here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from blockprune.measures.measure import MEASURES
from blockprune.measures.score import TEACHER
from blockprune.model.architecture import Architecture
from blockprune.reports.canvas import (
    DPI,
    FAINT,
    INK,
    MUTED,
    axis_title,
    colour_of,
    is_wide,
    loss_scale,
    new_figure,
    plain,
    tidy,
    title,
    write,
)
from blockprune.reports.image_grid import grid_figure, scan_rows
from blockprune.reports.timesteps import binned, timestep_figure
from blockprune.reports.unet import Svg, scan_svg
from blockprune.reports.view import ScanView, rank_correlation, ranked, short

# Okabe and Ito's colours, told apart with any colour vision; the marker repeats what the colour says.
PLACES = {"down": ("#0072b2", "o"), "mid": ("#009e73", "D"), "up": ("#d55e00", "s"), "other": ("#555555", "*")}
Box = tuple[float, float, float, float]


def figures(view: ScanView, removed: Architecture | None = None) -> Iterator[tuple[str, Figure | Svg]]:
    """(file name, figure) of every figure for which the scan has data; blocks of `removed` are hatched in the U-Net."""
    yield "unet.svg", scan_svg(view, removed)
    if view.main_measure:
        yield "tradeoff.png", tradeoff(view, view.main_measure)
        yield "sensitivity.png", sensitivity(view)
    if view.prompts and any(len(view.images.get(label, ())) for label in view.removals):
        sub = "Teacher first, then from the least to the most quality lost."
        yield "grid.png", grid_figure("The same prompts and seeds, block by block", sub, view.prompts, scan_rows(view))
    if sum(view.value(n, "eps_mse") is not None and view.value(n, "fid") is not None for n in view.removals) >= 2:
        yield "correlation.png", correlation(view)
    if binned(view)[1]:
        yield "timesteps.png", timestep_figure(view)


def place(label: str) -> str:
    """Where in the U-Net a removal lies: a key of `PLACES`."""
    return next((p for p in PLACES if label.startswith((f"{p}_block", f"{p}_blocks"))), "other")


def _axis(ax: Axes, which: str, values: Sequence[float], measure: str) -> None:
    """Logarithmic when the values need it, named after the measure with its direction."""
    if is_wide(values):
        ax.set(**{f"{which}scale": "log"})
    ax.set(**{f"{which}label": axis_title(measure)})
    (ax.xaxis if which == "x" else ax.yaxis).label.set(fontsize=8.5, color=INK)


def _points(ax: Axes, view: ScanView, xs: dict[str, float], measure: str) -> dict[str, tuple[float, float]]:
    """Draws each label of `xs` that has a value, with its interval upright; returns label => (x, y)."""
    points = {label: (x, y) for label, x in xs.items() if (y := view.value(label, measure)) is not None}
    _axis(ax, "y", [y for _, y in points.values()], measure)
    for label, (x, y) in points.items():
        colour, marker = PLACES[place(label)]
        if band := view.interval(label, measure):
            ax.vlines(x, *band, color=colour, lw=0.9, alpha=0.45)
        ax.plot([x], [y], marker=marker, color=colour, ms=9 if marker == "*" else 5, mec="white", mew=0.5, ls="")
    return points


def _legend(figure: Figure, labels: Sequence[str]) -> None:
    used = [p for p in PLACES if any(place(label) == p for label in labels)]
    names = {"down": "down path", "mid": "mid stage", "up": "up path", "other": "several"}
    keys = [Line2D([], [], color=PLACES[p][0], marker=PLACES[p][1], ls="", label=names[p]) for p in used]
    figure.legend(handles=keys, loc="lower left", ncols=4, fontsize=8, frameon=False, bbox_to_anchor=(0.01, 0.0))


def _name_points(ax: Axes, points: dict[str, tuple[float, float]], labels: Sequence[str]) -> None:
    """Names the points, each in the nearest place that covers no other name and few points; axis limits must be final."""
    point = DPI / 72
    at = {label: tuple(ax.transData.transform(xy)) for label, xy in points.items()}
    frame = ax.get_window_extent()
    taken: list[Box] = []
    for label in labels:
        text, (x, y) = plain(short(label)), at[label]
        w, h = 4.4 * point * len(text), 9 * point
        places = [(x + side * (8 * point + w / 2), y + row * h) for row in (0, 1, -1, 2, -2, 3, -3, 4, -4) for side in (1, -1)]
        boxes = [(cx - w / 2, cx + w / 2, cy - h / 2, cy + h / 2) for cx, cy in places]
        costs = [_covered(box, taken, list(at.values()), frame.extents) + 0.1 * i for i, box in enumerate(boxes)]
        best = boxes[int(np.argmin(costs))]
        taken.append(best)
        middle = (best[0] + best[1]) / 2 - x, (best[2] + best[3]) / 2 - y
        leader = {"arrowstyle": "-", "color": "#8a949c", "lw": 0.6, "shrinkA": 0, "shrinkB": 2} if abs(middle[1]) > h / 2 else None
        style: dict[str, Any] = {"fontsize": 7, "color": INK, "ha": "center", "va": "center", "parse_math": False, "zorder": 5}
        shift = (middle[0] / point, middle[1] / point)
        ax.annotate(text, points[label], xytext=shift, textcoords="offset points", arrowprops=leader, **style)


def _covered(box: Box, names: Sequence[Box], dots: Sequence[tuple[float, ...]], frame: Sequence[float]) -> float:
    """How bad a name at `box` is: names count most, then the frame, then dots."""
    x0, x1, y0, y1 = box
    overlaps = sum(x0 < b[1] and b[0] < x1 and y0 < b[3] and b[2] < y1 for b in names)
    outside = x0 < frame[0] or x1 > frame[2] or y0 < frame[1] or y1 > frame[3]
    return 100 * overlaps + 50 * outside + sum(x0 - 6 < d[0] < x1 + 6 and y0 - 6 < d[1] < y1 + 6 for d in dots)


def _front(points: dict[str, tuple[float, float]], measure: str) -> list[str]:
    """The labels that no other beats in both quality and saving, best quality first."""
    front, loss = list[str](), MEASURES[measure].loss
    for label in sorted(points, key=lambda n: (loss(points[n][1]), -points[n][0])):
        if not front or points[label][0] > points[front[-1]][0]:
            front.append(label)
    return front


def _telling(points: dict[str, tuple[float, float]], measure: str) -> list[str]:
    """The labels worth naming: removals of several blocks, the front thinned to five, and the two worst."""
    front, worst = _front(points, measure), sorted(points, key=lambda n: MEASURES[measure].loss(points[n][1]))[-2:]
    thinned = np.linspace(0, len(front) - 1, min(5, len(front))).round().astype(int).tolist()
    several = [label for label in points if place(label) == "other"]
    return list(dict.fromkeys([*several, *(front[i] for i in thinned), *worst]))


def tradeoff(view: ScanView, measure: str) -> Figure:
    """Quality against parameters, MACs and latency saved, in percent of the teacher; intervals upright."""
    figure = new_figure(13, 4.9)
    heading = f"What each removal saves, and what it costs: {MEASURES[measure].title}"
    title(figure, heading, "The dashed line joins the removals that no other beats in both.")
    total = view.graph.total
    costs = {label: view.graph.cost(view.archs[label]) for label in view.removals}
    ratios = {label: r for label in view.removals if (r := view.value(label, "latency_ratio")) is not None}
    panels = {
        "U-Net parameters saved (%)": {n: 100 * (1 - c.params / total.params) for n, c in costs.items()},
        "MACs saved (%, thop convention)": {n: 100 * (1 - c.thop / total.thop) for n, c in costs.items()},
        "step latency saved (%, timed in turn)": {n: 100 * (1 - r) for n, r in ratios.items()},
    }
    drawn: list[dict[str, tuple[float, float]]] = []
    for ax, (name, xs) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        tidy(ax)
        ax.set_xlabel(name, fontsize=8.5, color=INK)
        drawn.append(_points(ax, view, xs, measure))
        _teacher_band(ax, view, measure, "h")
        if not drawn[-1]:
            write(ax, 0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", color=MUTED, fontsize=10)
            ax.set_xticks([])
        line = [drawn[-1][label] for label in _front(drawn[-1], measure)]
        ax.plot([x for x, _ in line], [y for _, y in line], color=MUTED, lw=0.9, ls=(0, (4, 2)), zorder=0)
    for label, (_, y) in drawn[-1].items():
        if band := view.interval(label, "latency_ratio"):
            ax.hlines(y, 100 * (1 - band[1]), 100 * (1 - band[0]), color=PLACES[place(label)][0], lw=0.9, alpha=0.45)
    figure.subplots_adjust(left=0.065, right=0.985, top=0.83, bottom=0.2, wspace=0.07)
    figure.draw_without_rendering()
    for panel, points in zip(figure.axes, drawn, strict=True):
        panel.set_ylabel(panel.get_ylabel() if panel is figure.axes[0] else "")
        _name_points(panel, points, _telling(points, measure))
    _legend(figure, view.removals)
    return figure


def _teacher_band(ax: Axes, view: ScanView, measure: str, way: str) -> None:
    """The teacher's value as a line and its interval as a band, across the axis `way` ("h" or "v"); nothing when it has none."""
    value, band = view.value(TEACHER, measure), view.interval(TEACHER, measure)
    if value is None or MEASURES[measure].paired:
        return
    line: Callable[..., object] = ax.axhline if way == "h" else ax.axvline
    span: Callable[..., object] = ax.axhspan if way == "h" else ax.axvspan
    line(value, color=INK, lw=0.9, ls=":", zorder=0)
    if band:
        span(*band, color=FAINT, alpha=0.35, lw=0, zorder=0)


def sensitivity(view: ScanView) -> Figure:
    """Every removal as a bar with its interval, ranked by the main measure; up to three quality measures side by side."""
    order = ranked(view)
    measures = [m for m in view.measures if MEASURES[m].of_quality and ranked(view, m)][:3]
    n, k = len(order), len(measures)
    width, height = 2.1 + 3.3 * k, 1.55 + 0.19 * max(n, 5)
    figure = new_figure(width, height)
    explained = "Least lost first; lines are 95 % bootstrap intervals; the grey band is the teacher's own."
    title(figure, "How much each removal costs", explained)
    axes = figure.subplots(1, k, sharey=True, squeeze=False)[0]
    for ax, measure in zip(axes, measures, strict=True):
        _bars(ax, view, order, measure)
    axes[0].set_yticks(range(n), [plain(short(label)) for label in order], fontsize=7.5, color=INK)
    axes[0].set_ylim(n - 0.4, -0.6)
    figure.subplots_adjust(left=1.75 / width, right=1 - 0.25 / width, top=1 - 0.8 / height, bottom=0.6 / height, wspace=0.08)
    return figure


def _bars(ax: Axes, view: ScanView, order: Sequence[str], measure: str) -> None:
    tidy(ax)
    values = {i: v for i, label in enumerate(order) if (v := view.value(label, measure)) is not None}
    scale = loss_scale(values.values(), measure)
    _axis(ax, "x", list(values.values()), measure)
    ends = [e for label in order if (band := view.interval(label, measure)) for e in band] + list(values.values())
    # A logarithmic axis has no zero: bars start below the smallest value, so that only their ends carry meaning.
    base = min(e for e in ends if e > 0) / 1.6 if is_wide(list(values.values())) else 0.0
    colours = [colour_of(scale, v) for v in values.values()]
    ax.barh(list(values), [v - base for v in values.values()], left=base, height=0.72, color=colours)
    if base:
        ax.set_xlim(left=base)
    for i, label in enumerate(order):
        if i in values and (band := view.interval(label, measure)):
            ax.hlines(i, *band, color=INK, lw=1)
        elif i not in values:
            write(ax, 0.01, i, "not measured", transform=ax.get_yaxis_transform(), fontsize=6.5, color=MUTED, va="center")
    ax.grid(axis="x", color=FAINT, lw=0.5, alpha=0.6)
    ax.tick_params(axis="y", length=0)
    _teacher_band(ax, view, measure, "v")


def correlation(view: ScanView) -> Figure:
    """The cheap measure (`eps_mse`) against FID, one point per removal, with Kendall's tau."""
    figure = new_figure(6.6, 5.6)
    tau = rank_correlation(view, "eps_mse", "fid")
    sub = f"Kendall τ = {tau.tau:.2f} over {tau.n} removals" if tau else "too few removals for a rank correlation"
    title(figure, "Does the cheap measure rank like FID?", sub)
    ax = figure.subplots()
    tidy(ax)
    xs = {label: x for label in view.removals if (x := view.value(label, "eps_mse")) is not None}
    points = _points(ax, view, xs, "fid")
    _axis(ax, "x", [x for x, _ in points.values()], "eps_mse")
    for label, (_, y) in points.items():
        if band := view.interval(label, "eps_mse"):
            ax.hlines(y, *band, color=PLACES[place(label)][0], lw=0.9, alpha=0.45)
    _teacher_band(ax, view, "fid", "h")
    figure.subplots_adjust(left=0.115, right=0.97, top=0.86, bottom=0.16)
    figure.draw_without_rendering()
    order = ranked(view, "fid")
    _name_points(ax, points, [label for label in dict.fromkeys([*order[:2], *order[-2:]]) if label in points])
    _legend(figure, view.removals)
    return figure
