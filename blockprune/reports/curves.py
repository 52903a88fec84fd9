"""The curves of distillations: every term of the loss, and scores along training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from blockprune.measures.score import Score
from blockprune.reports.canvas import axis_title
from blockprune.reports.plot import SHAPES, Axis, Line, Mark, Plot, Rule, Sheet, series
from blockprune.reports.svg import Svg
from blockprune.reports.table import with_interval

TERMS = {"loss": "s4", "task": "s0", "output": "s1", "feature": "s2"}
VALIDATED = ("fid", "is", "clip_score")
POINTS = 60  # of a curve
Rows = Sequence[Mapping[str, Any]]
Along = Sequence[tuple[int, Score]]


def curves(rows: Rows) -> Iterator[tuple[str, Svg]]:
    """(file name, figure) of what the rows of one run have: losses, and validation scores where there are any."""
    if trained(rows):
        yield "losses.svg", losses({"": trained(rows)}).file()
    scores = validated(rows)
    if any(s.measure in VALIDATED for _, s in scores):
        yield "validation.svg", validations({"": scores}).file()


def trained(rows: Rows) -> list[Mapping[str, Any]]:
    """The rows of optimiser steps."""
    return [row for row in rows if row["kind"] == "train"]


def validated(rows: Rows) -> list[tuple[int, Score]]:
    """(step, score) of every validation."""
    return [(row["step"], Score.from_json(row["score"])) for row in rows if row["kind"] == "validation"]


def losses(runs: Mapping[str, Rows]) -> Sheet:
    """A chart for each run with every term, unweighted, as a running mean over a fiftieth of the updates, on one scale."""
    means = {run: {term: points for term in TERMS if (points := _mean(rows, term))} for run, rows in runs.items()}
    axis = Axis.over("", [y for of in means.values() for points in of.values() for _, y in points], log=True)
    plots = [
        Plot(
            run or "Terms of the loss",
            Axis.over("updates", [x for points in of.values() for x, _ in points]),
            axis,
            lines=[Line(points, TERMS[term]) for term, points in of.items()],
            keys={f"{TERMS[term]} dot": term for term in of},
            alt="Loss terms over updates: " + ", ".join(f"{term} ends at {points[-1][1]:.3g}" for term, points in of.items()),
        )
        for run, of in means.items()
        if of
    ]
    return Sheet(
        "Training losses", "Unweighted; running mean over a fiftieth of the updates. Judge a student by its images.", plots
    )


def _mean(rows: Rows, term: str) -> list[tuple[float, float]]:
    """(update, running mean) of a term at up to `POINTS` updates; none for a term that is not there throughout."""
    y = np.array([row["losses"].get(term, 0.0) for row in rows])
    if not (y > 0).all():
        return []
    width = max(1, len(rows) // 50)
    smooth = np.convolve(y, np.ones(width) / width, "valid")
    at = np.unique(np.linspace(0, len(smooth) - 1, min(POINTS, len(smooth))).round().astype(int))
    return [(float(rows[i + width - 1]["step"]), float(smooth[i])) for i in at]


def validations(runs: Mapping[str, Along], heading: str = "Scores along training") -> Sheet:
    """FID, IS and CLIP score along training with their intervals, a chart each with a curve for each run."""
    entries = [entry for scores in runs.values() for entry in scores]
    measures = [m for m in VALIDATED if any(s.measure == m and s.finite is not None for _, s in entries)]
    note = "95 % intervals."
    if len(runs) == 1:
        note += " Dotted: the best FID and the last; they need not be the same."
    return Sheet(heading, note, [_along(runs, m) for m in measures])


def _along(runs: Mapping[str, Along], measure: str) -> Plot:
    points = {
        name: [(step, s) for step, s in scores if s.measure == measure and s.finite is not None] for name, scores in runs.items()
    }
    points = {name: of for name, of in points.items() if of}
    marks = [
        Mark(step, s.value or 0.0, series(i), _said(name, step, s), SHAPES[i % len(SHAPES)], band=s.interval)
        for i, (name, of) in enumerate(points.items())
        for step, s in of
    ]
    lines = [Line([(step, s.value or 0.0) for step, s in of], series(i), name) for i, (name, of) in enumerate(points.items())]
    ends = [e for m in marks for e in (m.band or (m.y, m.y))]
    rules = [Rule("x", step, text) for step, text in _told(next(iter(runs.values()))).items()] if len(runs) == 1 else []
    return Plot(axis_title(measure), Axis.over("updates", [m.x for m in marks]), Axis.over("", ends), marks, lines, rules)


def _said(name: str, step: int, score: Score) -> str:
    value = with_interval(score.value, *(score.interval or (None, None)))
    return f"{name or 'student'} after {step:,} updates\n{score.measure}: {value} (n = {score.n})"


def _told(scores: Along) -> dict[float, str]:
    """The updates of the last scores and of the best FID of one run."""
    fid = [(s.value, step) for step, s in scores if s.measure == "fid" and s.value is not None]
    return {float(max(step for step, _ in scores)): "last"} | ({float(min(fid)[1]): "best FID"} if fid else {})


def finding(runs: Mapping[str, Along]) -> str:
    """The best and the worst of the first measure that all runs end with, in a line; "" without validations."""
    last = {name: {s.measure: s for step, s in along if step == max(step for step, _ in along)} for name, along in runs.items()}
    measure = next((m for m in VALIDATED if runs and all((s := of.get(m)) and s.finite is not None for of in last.values())), "")
    if not measure:
        return f"{len(runs)} runs have validations." if runs else "No validation was made."
    order = sorted(last, key=lambda name: last[name][measure].loss)
    ends = [f"{last[name][measure].value:.3g} (`{name}`)" for name in (order[0], order[-1])]
    span = " to ".join(ends[: len(order)])
    n = last[order[0]][measure].n
    title = axis_title(measure).partition(" (")[0]
    return f"{title} at the last validation: {span}. On {n:,} images it shows progress, and does not compare models."
