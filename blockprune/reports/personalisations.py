"""What a personalisation's run holds, as files and as a table of several runs. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from blockprune.measures.measure import measure
from blockprune.measures.score import Score
from blockprune.reports.curves import curves
from blockprune.runs import AnyRun, Readable

COLUMNS = ("dino", "clip_i", "clip_t", "train_time", "train_memory")


def last_scores(run: Readable) -> dict[str, Score]:
    """The scores after the last update by measure, and what the training took."""
    rows = (row for row in run.rows() if row["kind"] in ("validation", "cost"))
    return {score.measure: score for score in (Score.from_json(row["score"]) for row in rows)}


def report_files(run: AnyRun) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of scores.json and losses.png."""
    from blockprune.reports.canvas import png

    yield "scores.json", (json.dumps([score.to_json() for score in last_scores(run).values()], indent=2) + "\n").encode()
    for name, figure in curves(run.rows()):
        yield name, png(figure)


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
