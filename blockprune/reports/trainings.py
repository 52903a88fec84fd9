"""A distillation's run as one value, its curves and what its model card says. Needs no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.reports.curves import curves
from blockprune.reports.model_view import TrainingView
from blockprune.runs import AnyRun, Readable
from blockprune.runs.reading import images_of, rows_of


def training_view(run: Readable, unread: list[str] | None = None) -> TrainingView:
    """What a distillation's run says; sentences in `unread` tell of damaged rows and pictures."""
    about = run.about
    prompts = about.get("pictured_prompts") or []
    steps = {int(match[1]): name for name in run.names("images") if (match := re.fullmatch(r"step-([0-9]+)\.png", name))}
    shown = sorted({*sorted(steps)[:1], *sorted(steps)[-2:]})
    images = {step: images_of(run, f"images/{steps[step]}", len(prompts), unread) for step in shown}
    return TrainingView(
        protocol={**about["asked"], **about.get("made_with", {})},
        arch=Architecture(frozenset(about["arch"])),
        graph=BlockGraph.from_json(about["graph"]) if about.get("graph") else None,
        outside_params=about.get("outside_params"),
        rows=rows_of(run, unread),
        images={step: strip for step, strip in images.items() if strip is not None},
        prompts=prompts,
    )


def card_of(run: AnyRun) -> dict[str, Any]:
    """The entries of the student's model card."""
    about, rows = run.about, run.rows()
    asked = about["asked"]
    graph, arch = BlockGraph.from_json(about["graph"]), Architecture(frozenset(about["arch"]))
    last = max((row["step"] for row in rows if row["kind"] == "validation"), default=None)
    return {
        "teacher": ", then ".join(dict.fromkeys(phase["teacher"] for phase in asked["phases"])),
        "data": about.get("data_source"),
        "steps": asked["phases"][-1]["last"],
        "batch": asked["batch"],
        "recipe": about.get("recipe_name"),
        "costs": {"teacher": graph.total.to_json(), "student": graph.cost(arch).to_json()},
        "scores": [_in_short(row["score"]) for row in rows if row["kind"] == "validation" and row["step"] == last],
    }


def _in_short(score: Mapping[str, Any]) -> dict[str, Any]:
    return {name: score[name] for name in ("measure", "value", "low", "high", "n")}


def report_files(run: AnyRun) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of the card's entries, losses.svg and, where there was a validation, validation.svg."""
    yield "card.json", (json.dumps(card_of(run), indent=2) + "\n").encode()
    for name, figure in curves(run.rows()):
        yield name, figure.encode()
