"""An evaluation's run as one value, and the files made from it. Needs no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from blockprune.cost.table import Component
from blockprune.decode import AGAIN, checked
from blockprune.measures.measure import MEASURES, define
from blockprune.measures.score import Score, flat_score
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.reports.model_view import Images, ModelView, Setting
from blockprune.reports.table import to_csv
from blockprune.runs import Readable
from blockprune.runs.parts import INPUTS, paired_label
from blockprune.runs.reading import images_of, rows_of
from blockprune.runs.schema import MeasureRecord

SCORE = ("value", "low", "high", "delta", "delta_low", "delta_high", "n", "seed", "unit", "direction", "error")
SETTING = ("steps", "cfg_scale", "scheduler", "quantize", "checkpoint", "strength")


def evaluation_view(run: Readable, unread: list[str] | None = None) -> ModelView:
    """What an evaluation's run says of its model; sentences in `unread` tell of damaged rows and pictures."""
    about = run.about
    define_own(about)
    rows = rows_of(run, unread)
    scores: dict[str, dict[str, Score]] = {}
    for row in rows:
        if row["kind"] == "score" and row["measure"] in MEASURES:
            scores.setdefault(row["setting"], {})[row["measure"]] = Score.from_json(row)
    components = [Component.from_json(row) for row in rows if row["kind"] == "component"]
    settings = [Setting(**{k: s[k] for k in Setting.__dataclass_fields__ if k in s}) for s in about["settings"]]
    prompts = about.get("pictured_prompts") or []
    pictured = partial(_strip, run, n=len(prompts), unread=unread)
    return ModelView(
        label=about["label"],
        protocol=about["protocol"],
        made_with=about.get("made_with", {}),
        teacher=about.get("teacher") or ("" if about["arch"] else about.get("model")) or "",
        teacher_id=about.get("teacher_id") or "",
        arch=Architecture(frozenset(about["arch"])),
        graph=BlockGraph.from_json(about["graph"]) if about.get("graph") else None,
        outside_params=about.get("outside_params"),
        settings=settings,
        scores=scores,
        components=list({(c.name, c.who): c for c in components}.values()),
        images={s.label: strip for s in settings if (strip := pictured(s.label)) is not None},
        prompts=prompts,
        model=about.get("model") or "",
        teacher_images={s.label: strip for s in settings if (strip := pictured(paired_label(s.label))) is not None},
        inputs=pictured(INPUTS),
    )


def define_own(about: Mapping[str, Any]) -> None:
    """Makes a user's own measures known that a run was made with."""
    for described in checked(about.get("measures", []), list[MeasureRecord], "the measures of a run", AGAIN):
        if described.name not in MEASURES:
            define(described.value())


def _strip(run: Readable, label: str, n: int, unread: list[str] | None) -> Images | None:
    """The pictures under a label, whose file is named after its words; None without one, or for a damaged one."""
    words = re.findall(r"[a-z0-9]+", label.lower())
    files = (file for file in run.names("images") if re.findall(r"[a-z0-9]+", file.lower()) == [*words, "png"])
    file = next(files, None)
    return None if file is None else images_of(run, f"images/{file}", n, unread)


def report_files(view: ModelView) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of every file of an evaluation's report."""
    yield "evaluate.json", (json.dumps(_to_json(view), indent=2) + "\n").encode()
    yield "evaluate.csv", to_csv(flat_rows(view)).encode()


def _to_json(view: ModelView) -> dict[str, Any]:
    settings = []
    for setting in view.settings:
        scores = {m: score.to_json() for m, score in view.scores.get(setting.label, {}).items()}
        settings.append({**asdict(setting), "scores": {m: {key: s[key] for key in SCORE} for m, s in scores.items()}})
    names: dict[str, Any] = {"label": view.label, "model": view.model, "teacher": view.teacher if view.arch else ""}
    names |= {"arch": view.arch.terms, "protocol": view.protocol, "made_with": view.made_with}
    return {**names, "settings": settings, "components": [c.to_json() for c in view.components]}


def flat_rows(view: ModelView) -> list[dict[str, Any]]:
    """One flat row per setting: what it is, then each measure with its interval and count."""
    measures = list(dict.fromkeys(m for setting in view.settings for m in view.scores.get(setting.label, {})))
    rows = []
    for setting in view.settings:
        row: dict[str, Any] = {"model": view.label, "setting": setting.label, **{k: getattr(setting, k) for k in SETTING}}
        scores = view.scores.get(setting.label, {})
        for m in measures:
            row |= flat_score(m, scores.get(m))
        error = next((s.error for s in scores.values() if s.error), "")
        rows.append({**row, "protocol": view.protocol["hash"], "error": error})
    return rows
