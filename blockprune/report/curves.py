"""The curves of a distillation: every term of the loss, and scores of validation images along training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from blockprune.records import Score
from blockprune.report.canvas import INK, MUTED, axis_title, new_figure, tidy, title, write

TERMS = {"loss": "#1c2733", "task": "#0072b2", "output": "#d55e00", "feature": "#009e73"}
VALIDATED = ("fid", "is", "clip_score")


def curves(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Figure]]:
    """(file name, figure) of what the rows of a run have: losses, and validation scores where there are any."""
    steps = [row for row in rows if row["kind"] == "train"]
    if steps:
        yield "losses.png", loss_figure(steps)
    scores = [(row["step"], Score.from_json(row["score"])) for row in rows if row["kind"] == "validation"]
    if any(s.measure in VALIDATED for _, s in scores):
        yield "validation.png", validation_figure(scores)


def loss_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Each term, unweighted, on a logarithmic axis; a running mean over a fiftieth of the steps over the raw values."""
    figure = new_figure(7.4, 4.4)
    title(
        figure,
        "Training losses",
        "Unweighted; thin: each update, thick: running mean. Judge a student by its images.",
    )
    ax = figure.add_axes((0.1, 0.13, 0.87, 0.7))
    tidy(ax)
    x = np.array([row["step"] for row in rows])
    width = max(1, len(rows) // 50)
    for name, colour in TERMS.items():
        y = np.array([row["losses"].get(name, 0.0) for row in rows])
        if not (y > 0).all():
            continue
        ax.plot(x, y, color=colour, lw=0.5, alpha=0.35)
        smooth = np.convolve(y, np.ones(width) / width, "valid")
        ax.plot(x[width - 1 :], smooth, color=colour, lw=1.7, label=name)
    ax.set_yscale("log")
    ax.set_xlabel("updates", fontsize=8.5, color=INK)
    ax.legend(fontsize=8, frameon=False, ncols=4)
    return figure


def validation_figure(scores: Sequence[tuple[int, Score]]) -> Figure:
    """FID, IS and CLIP score along training with their intervals; the best FID and the last checkpoint are marked."""
    measures = [m for m in VALIDATED if any(s.measure == m and s.value is not None for _, s in scores)]
    figure = new_figure(7.4, 1.0 + 2.1 * len(measures))
    title(figure, "Validation along training", "95 % intervals. Dashed: best FID; dotted: last. They need not be the same.")
    fid = [(s.value, step) for step, s in scores if s.measure == "fid" and s.value is not None]
    last = max(step for step, _ in scores)
    height = figure.get_figheight()
    for i, m in enumerate(measures):
        ax = figure.add_axes((0.1, (0.45 + 2.1 * (len(measures) - 1 - i)) / height, 0.87, 1.55 / height))
        tidy(ax)
        points = [(step, s) for step, s in scores if s.measure == m and s.value is not None]
        ax.plot([step for step, _ in points], [s.value or 0.0 for _, s in points], color="#0072b2", marker="o", ms=4, lw=1.3)
        for step, s in points:
            if s.low is not None and s.high is not None:
                ax.vlines(step, s.low, s.high, color="#0072b2", lw=0.8, alpha=0.5)
        if fid:
            ax.axvline(min(fid)[1], color=MUTED, lw=0.9, ls="--")
        ax.axvline(last, color=MUTED, lw=0.9, ls=":")
        write(ax, 0.0, 1.03, axis_title(m), transform=ax.transAxes, fontsize=8.5)
    return figure
