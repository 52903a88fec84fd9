"""What a personalisation's run holds, as files and as a table of several runs. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from blockprune.measures.intervals import interval, mean_statistic, value_of
from blockprune.measures.measure import measure
from blockprune.measures.score import Score
from blockprune.reports.curves import curves
from blockprune.runs import AnyRun, Readable

COLUMNS = ("dino", "clip_i", "clip_t", "train_time", "train_memory")


def last_scores(run: Readable) -> dict[str, Score]:
    """The scores after the last update by measure, and what the training took; of a benchmark those over its subjects."""
    subjects = by_subject(run)
    if subjects:
        return over_subjects(list(subjects.values()))
    rows = (row for row in run.rows() if row["kind"] in ("validation", "cost"))
    return {score.measure: score for score in (Score.from_json(row["score"]) for row in rows)}


def by_subject(run: Readable) -> dict[str, dict[str, Score]]:
    """The scores of each subject of a benchmark, in the order in which they were learnt; none for any other run."""
    found: dict[str, dict[str, Score]] = {}
    for row in run.rows():
        if row["kind"] == "subject":
            found.setdefault(row["subject"], {})[row["score"]["measure"]] = Score.from_json(row["score"])
    return found


def over_subjects(subjects: Sequence[Mapping[str, Score]]) -> dict[str, Score]:
    """The mean of each measure over subjects, with the interval that other subjects would give; none below four of them."""
    found = {}
    for name in subjects[0]:
        scores = [of_subject[name] for of_subject in subjects if name in of_subject and of_subject[name].value is not None]
        if scores:
            statistic, n = mean_statistic([score.value for score in scores]), len(scores)
            low, high = interval(statistic, n, scores[0].seed) or (None, None)
            found[name] = replace(scores[0], value=value_of(statistic, n), n=n, low=low, high=high)
    return found


def report_files(run: AnyRun) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of scores.json, of subjects.json where there are several, and losses.svg."""
    yield "scores.json", _json([score.to_json() for score in last_scores(run).values()])
    if subjects := by_subject(run):
        yield "subjects.json", _json({name: [s.to_json() for s in scores.values()] for name, scores in subjects.items()})
    for name, figure in curves(run.rows()):
        yield name, figure.encode()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def side_by_side(scores: Mapping[str, Mapping[str, Score]]) -> list[str]:
    """The lines of a Markdown table: a row for each name, a column for each of COLUMNS that any has."""
    columns = [name for name in COLUMNS if any(name in of_model for of_model in scores.values())]
    lines = ["| | " + " | ".join(measure(name).heading for name in columns) + " |", "| --- |" + " ---: |" * len(columns)]
    return lines + [
        f"| {label} | " + " | ".join(cell(of_model.get(name)) for name in columns) + " |" for label, of_model in scores.items()
    ]


def cell(score: Score | None) -> str:
    """A score in a table: seconds and MiB as whole numbers, others with their interval."""
    if score is None or score.finite is None:
        return "-"
    if score.measure == "train_time":
        return f"{score.finite:,.0f} s"
    if score.measure == "train_memory":
        return f"{score.finite / 2**20:,.0f} MiB"
    low_high = score.interval
    return f"{score.finite:.3f}" + (f" [{low_high[0]:.3f}, {low_high[1]:.3f}]" if low_high else "")
