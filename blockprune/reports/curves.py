"""The curves of distillations: every term of the loss, and scores along training; one curve for each run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from blockprune.measures.score import Score
from blockprune.reports.canvas import INK, MARKERS, MUTED, SERIES, axis_title, legend, named, new_figure, tidy, title, write

TERMS = {"loss": "#1c2733", "task": "#0072b2", "output": "#d55e00", "feature": "#009e73"}
VALIDATED = ("fid", "is", "clip_score")
Rows = Sequence[Mapping[str, Any]]
Along = Sequence[tuple[int, Score]]


def curves(rows: Rows) -> Iterator[tuple[str, Figure]]:
    """(file name, figure) of what the rows of one run have: losses, and validation scores where there are any."""
    if trained(rows):
        yield "losses.png", loss_figure({"": trained(rows)})
    scores = validated(rows)
    if any(s.measure in VALIDATED for _, s in scores):
        yield "validation.png", validation_figure({"": scores})


def trained(rows: Rows) -> list[Mapping[str, Any]]:
    """The rows of optimiser steps."""
    return [row for row in rows if row["kind"] == "train"]


def validated(rows: Rows) -> list[tuple[int, Score]]:
    """(step, score) of every validation."""
    return [(row["step"], Score.from_json(row["score"])) for row in rows if row["kind"] == "validation"]


def loss_figure(runs: Mapping[str, Rows]) -> Figure:
    """Each term, unweighted, on a logarithmic axis; a running mean over a fiftieth of the steps over the raw values.

    One run has its terms in one panel; several have a panel for each term.
    """
    sub = "Unweighted; thin: each update, thick: running mean. Judge a student by its images."
    if len(runs) == 1:
        figure = new_figure(7.4, 4.4)
        title(figure, "Training losses", sub)
        panels = {name: figure.axes[0] if figure.axes else figure.add_axes((0.1, 0.13, 0.87, 0.7)) for name in TERMS}
        styles = {(run, term): (TERMS[term], term) for run in runs for term in TERMS}
    else:
        figure = new_figure(7.4, 6.2)
        title(figure, "Training losses, one curve a run", sub)
        grid = figure.subplots(2, 2).ravel()
        figure.subplots_adjust(left=0.09, right=0.98, top=0.84, bottom=0.14, hspace=0.32, wspace=0.2)
        panels = dict(zip(TERMS, grid, strict=True))
        styles = {(run, term): (SERIES[i % len(SERIES)], run) for i, run in enumerate(runs) for term in TERMS}
        for term, ax in panels.items():
            write(ax, 0.0, 1.03, term, transform=ax.transAxes, fontsize=8.5)
    for (run, term), (colour, label) in styles.items():
        _loss(panels[term], runs[run], term, colour, label)
    for ax in dict.fromkeys(panels.values()):
        tidy(ax)
        ax.set_yscale("log")
    for ax in list(panels.values())[-2:]:
        ax.set_xlabel("updates", fontsize=8.5, color=INK)
    _legend(figure, next(iter(panels.values())), len(runs) > 1)
    return figure


def _loss(ax: Axes, rows: Rows, term: str, colour: str, label: str) -> None:
    x = np.array([row["step"] for row in rows])
    y = np.array([row["losses"].get(term, 0.0) for row in rows])
    if not (y > 0).all():
        return
    width = max(1, len(rows) // 50)
    ax.plot(x, y, color=colour, lw=0.5, alpha=0.35)
    smooth = np.convolve(y, np.ones(width) / width, "valid")
    ax.plot(x[width - 1 :], smooth, color=colour, lw=1.7, label=named(label))


def _legend(figure: Figure, ax: Axes, under: bool) -> None:
    """One run: in its axes; several: under all of them."""
    if under:
        legend(figure, *ax.get_legend_handles_labels(), loc="lower left", ncols=3, bbox_to_anchor=(0.02, 0.0))
    else:
        legend(ax, ncols=4)


def validation_figure(runs: Mapping[str, Along], heading: str = "Scores along training") -> Figure:
    """FID, IS and CLIP score along training with their intervals; of a single run, best FID and last checkpoint are marked."""
    everything = [entry for scores in runs.values() for entry in scores]
    measures = [m for m in VALIDATED if any(s.measure == m and s.value is not None for _, s in everything)]
    several = len(runs) > 1
    foot = 0.55 + 0.25 * several
    height = 0.55 + foot + 2.1 * len(measures)
    figure = new_figure(7.4, height)
    sub = "95 % intervals." if several else "95 % intervals. Dashed: best FID; dotted: last. They need not be the same."
    title(figure, heading, sub)
    for i, m in enumerate(measures):
        ax = figure.add_axes((0.1, (foot + 2.1 * (len(measures) - 1 - i)) / height, 0.87, 1.55 / height))
        tidy(ax)
        for k, (name, scores) in enumerate(runs.items()):
            _along(
                ax, [(step, s) for step, s in scores if s.measure == m], SERIES[k % len(SERIES)], MARKERS[k % len(MARKERS)], name
            )
        if not several:
            _mark(ax, everything)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        write(ax, 0.0, 1.03, axis_title(m), transform=ax.transAxes, fontsize=8.5)
    figure.axes[-1].set_xlabel("updates", fontsize=8.5, color=INK)
    if several:
        _legend(figure, figure.axes[0], under=True)
    return figure


def _along(ax: Axes, scores: Along, colour: str, marker: str, name: str) -> None:
    points = [(step, s) for step, s in scores if s.value is not None]
    values = [s.value or 0.0 for _, s in points]
    ax.plot([step for step, _ in points], values, color=colour, marker=marker, ms=4, lw=1.3, label=named(name))
    for step, s in points:
        if s.low is not None and s.high is not None:
            ax.vlines(step, s.low, s.high, color=colour, lw=0.8, alpha=0.5)


def _mark(ax: Axes, scores: Along) -> None:
    """The best FID and the last checkpoint of one run."""
    fid = [(s.value, step) for step, s in scores if s.measure == "fid" and s.value is not None]
    if fid:
        ax.axvline(min(fid)[1], color=MUTED, lw=0.9, ls="--")
    ax.axvline(max(step for step, _ in scores), color=MUTED, lw=0.9, ls=":")
