"""The figures of a scan's report. Nothing is shown or written here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from blockprune.measures.measure import MEASURES
from blockprune.measures.score import TEACHER
from blockprune.model.architecture import Architecture
from blockprune.reports.canvas import axis_title, colour_of, is_wide, loss_scale
from blockprune.reports.image_grid import grid_figure, scan_rows
from blockprune.reports.plot import Axis, Band, Bar, Line, Mark, Plot, Rule, Sheet
from blockprune.reports.svg import Svg
from blockprune.reports.table import with_interval
from blockprune.reports.timesteps import binned, timestep_figure
from blockprune.reports.unet import scan_svg
from blockprune.reports.view import ScanView, rank_correlation, ranked, short

# a removal's place in the U-Net => its colour, its shape, and the legend
PLACES = {
    "down": ("s0", "dot", "down path"),
    "mid": ("s2", "diamond", "mid stage"),
    "up": ("s1", "square", "up path"),
    "other": ("s4", "star", "several"),
}


def figures(view: ScanView, removed: Architecture | None = None) -> Iterator[tuple[str, Figure | Svg]]:
    """(file name, figure) of every figure for which the scan has data; blocks of `removed` are hatched in the U-Net."""
    yield "unet.svg", scan_svg(view, removed)
    if view.main_measure:
        yield "tradeoff.svg", tradeoff(view, view.main_measure).file()
        yield "sensitivity.svg", sensitivity(view).file()
    if view.prompts and any(len(view.images.get(label, ())) for label in view.removals):
        sub = "Teacher first, then from the least to the most quality lost."
        yield "grid.png", grid_figure("The same prompts and seeds, block by block", sub, view.prompts, scan_rows(view))
    if sum(view.value(n, "eps_mse") is not None and view.value(n, "fid") is not None for n in view.removals) >= 2:
        yield "correlation.svg", correlation(view).file()
    if binned(view)[1]:
        yield "timesteps.png", timestep_figure(view)


def place(label: str) -> str:
    """Where in the U-Net a removal lies: a key of `PLACES`."""
    return next((p for p in PLACES if label.startswith((f"{p}_block", f"{p}_blocks"))), "other")


def _keys(labels: Sequence[str]) -> dict[str, str]:
    used = {place(label) for label in labels}
    return {f"{look} {shape}": text for p, (look, shape, text) in PLACES.items() if p in used}


def _axis(values: Sequence[float | None], measure: str) -> Axis:
    known = [v for v in values if v is not None]
    return Axis.over(axis_title(measure), known, is_wide(known))


def _marks(view: ScanView, xs: Mapping[str, float], measure: str, named: Sequence[str] = ()) -> Iterator[Mark]:
    """A mark for each label of `xs` that has a value, with its interval upright."""
    for label, x in xs.items():
        if (y := view.value(label, measure)) is not None:
            look, shape, _ = PLACES[place(label)]
            said = f"{label}\n{MEASURES[measure].title}: {with_interval(y, *(view.interval(label, measure) or (None, None)))}"
            yield Mark(x, y, look, said, shape, short(label) if label in named else "", view.interval(label, measure), name=label)


def _front(points: Mapping[str, tuple[float, float]], measure: str) -> list[str]:
    """The labels that no other beats in both quality and saving, best quality first."""
    front, loss = list[str](), MEASURES[measure].loss
    for label in sorted(points, key=lambda n: (loss(points[n][1]), -points[n][0])):
        if not front or points[label][0] > points[front[-1]][0]:
            front.append(label)
    return front


def _telling(points: Mapping[str, tuple[float, float]], measure: str) -> list[str]:
    """The labels worth naming: removals of several blocks, the front thinned to four, and the two worst."""
    front, worst = _front(points, measure), sorted(points, key=lambda n: MEASURES[measure].loss(points[n][1]))[-2:]
    thinned = np.linspace(0, len(front) - 1, min(4, len(front))).round().astype(int).tolist()
    several = [label for label in points if place(label) == "other"]
    return list(dict.fromkeys([*several, *(front[i] for i in thinned), *worst]))


def tradeoff(view: ScanView, measure: str) -> Sheet:
    """Quality against parameters, MACs and latency saved, in percent of the teacher; intervals upright."""
    total, convention = view.graph.total, "thop"
    costs = {label: view.graph.cost(view.archs[label]) for label in view.removals}
    ratios_saved = {n: 100 * (1 - r) for n in view.removals if (r := view.value(n, "latency_ratio")) is not None}
    saved = {
        "U-Net parameters saved (%)": {n: 100 * (1 - c.params / total.params) for n, c in costs.items()},
        f"MACs saved (%, {convention})": {n: 100 * (1 - c.thop / total.thop) for n, c in costs.items()},
        "step latency saved (%, timed in turn)": ratios_saved,
    }
    plots = []
    for title, xs in saved.items():
        points = {label: (x, y) for label, x in xs.items() if (y := view.value(label, measure)) is not None}
        if points:
            marks = list(_marks(view, xs, measure, _telling(points, measure)))
            if xs is ratios_saved:
                marks = [replace(m, x_band=_saved(view.interval(m.name, "latency_ratio"))) for m in marks]
            axes = Axis.over(title, [m.x for m in marks]), _axis([m.y for m in marks], measure)
            front = Line([points[label] for label in _front(points, measure)], "front untrained")
            keys = _keys(list(points))
            plots.append(Plot(title, *axes, marks, [front], list(_of_teacher(view, measure, "y")), keys=keys, height=300))
    heading = f"What each removal saves, and what it costs: {MEASURES[measure].title}"
    return Sheet(heading, "The dashed line joins the removals that no other beats in both. Upright: 95 % intervals.", plots)


def _saved(ratios: Band | None) -> Band | None:
    return (100 * (1 - ratios[1]), 100 * (1 - ratios[0])) if ratios else None


def _of_teacher(view: ScanView, measure: str, axis: str) -> Iterator[Rule]:
    """The teacher's value as a line and its interval as a band; nothing when it has none."""
    value = view.value(TEACHER, measure)
    if value is not None and not MEASURES[measure].paired:
        yield Rule(axis, value, "teacher" if axis == "y" else "", view.interval(TEACHER, measure))


def sensitivity(view: ScanView) -> Sheet:
    """Every removal as a bar with its interval, ranked by the main measure; up to three quality measures side by side."""
    order = ranked(view)
    measures = [m for m in view.measures if MEASURES[m].of_quality and ranked(view, m)][:3]
    note = "Least lost first; lines are 95 % bootstrap intervals; the grey band is the teacher's own."
    return Sheet("How much each removal costs", note, [_bars(view, order, m) for m in measures])


def _bars(view: ScanView, order: Sequence[str], measure: str) -> Plot:
    values = {label: v for label in order if (v := view.value(label, measure)) is not None}
    scale = loss_scale(values.values(), measure)
    ends = [e for label in order if (band := view.interval(label, measure)) for e in band] + list(values.values())
    # A logarithmic axis has no zero: bars start below the smallest value, so that only their ends carry meaning.
    log = is_wide(values.values())
    axis = Axis.over("", ends, log)
    axis = replace(axis, low=axis.low if log else min(axis.low, 0.0))
    bars = []
    for i, label in enumerate(order):
        value, band = values.get(label), view.interval(label, measure)
        said = f"{label}\n{MEASURES[measure].title}: {with_interval(value, *(band or (None, None)))}"
        bars.append(
            Bar(i, value, to_hex(colour_of(scale, value)) if value is not None else "", said, band if value is not None else None)
        )
    rows = Axis("", rows=[short(label) for label in order])
    alt = f"Bars, one for each removal, with 95 % intervals; {len(order)} removals."
    return Plot(
        axis_title(measure),
        axis,
        rows,
        bars=bars,
        rules=list(_of_teacher(view, measure, "x")),
        alt=alt,
        height=76 + 14 * max(len(order), 4),
    )


def correlation(view: ScanView) -> Sheet:
    """The cheap measure (`eps_mse`) against FID, one point per removal, with Kendall's tau."""
    tau = rank_correlation(view, "eps_mse", "fid")
    sub = f"Kendall τ = {tau.tau:.2f} over {tau.n} removals" if tau else "too few removals for a rank correlation"
    xs = {n: x for n in view.removals if (x := view.value(n, "eps_mse")) is not None}
    order = ranked(view, "fid")
    marks = [replace(m, x_band=view.interval(m.name, "eps_mse")) for m in _marks(view, xs, "fid", [*order[:2], *order[-2:]])]
    axes = _axis([m.x for m in marks], "eps_mse"), _axis([m.y for m in marks], "fid")
    keys = _keys(list(xs))
    heading = "Does the cheap measure rank like FID?"
    return Sheet(
        heading, sub, [Plot(heading, *axes, marks, rules=list(_of_teacher(view, "fid", "y")), keys=keys, alt=sub, height=320)]
    )
