"""Run directories read back for a report: of any kind and age. What an older run lacks is left out and said to be."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from blockprune.cli import outputs
from blockprune.errors import UserError
from blockprune.model.architecture import Architecture, BlockGraph
from blockprune.reports.dossier import Component, Dossier, ModelView, Setting, TrainingView, View
from blockprune.reports.search_view import SearchView
from blockprune.reports.view import ScanView
from blockprune.runs.directory import read_rows, read_run
from blockprune.runs.records import MEASURES, Score
from blockprune.runs.schema import RUNS, check_row


def dossier_of(folders: Sequence[Path], allow_mismatch: bool = False) -> Dossier:
    """The runs in `folders`, each under the name of its folder, or its model's label where that is another's name too.

    Raises UserError for what is no run directory, for damaged files, and for runs that do not belong together.
    """
    unread: list[str] = []
    views: dict[str, View] = {}
    for i, folder in enumerate(folders):
        if any(folder.resolve() == other.resolve() for other in folders[:i]):
            raise UserError(f"{str(folder)!r} is given twice")
        view = _view(folder, unread)
        name = _name(folder, view, views)
        views[name] = view
    return Dossier(
        scans={name: v for name, v in views.items() if isinstance(v, ScanView)},
        searches={name: v for name, v in views.items() if isinstance(v, SearchView)},
        trainings={name: v for name, v in views.items() if isinstance(v, TrainingView)},
        models={name: v for name, v in views.items() if isinstance(v, ModelView)},
        unread=unread,
        allow_mismatch=allow_mismatch,
    )


def _name(folder: Path, view: View, taken: Mapping[str, object]) -> str:
    """An evaluated model by its label, another run by its folder; with more of the path where that name is taken."""
    parts = folder.resolve().parts
    first = view.label if isinstance(view, ModelView) else parts[-1]
    paths = ("/".join(parts[-n:]) for n in range(1, len(parts) + 1))
    longer = (f"{first} ({path})" if isinstance(view, ModelView) else path for path in paths)
    return next(name for name in (first, *longer) if name not in taken)


def _view(folder: Path, unread: list[str]) -> View:
    if not folder.is_dir():
        raise UserError(f"{str(folder)!r} is not a run directory: there is no such folder")
    command = read_run(folder)["command"]
    if command not in RUNS:
        raise UserError(f"{str(folder)!r} holds a {command!r} run: a report is made of {', '.join(RUNS)} runs")
    said = read_run(folder, RUNS[command])
    read: dict[str, Callable[[Path, Mapping[str, Any], list[str]], View]] = {
        "scan": lambda folder, said, unread: outputs.view_of(folder, _sound(folder, said, unread), unread),
        "search": lambda folder, said, unread: outputs.search_view_of(folder, _sound(folder, said, unread), unread),
        "distill": _training,
        "evaluate": _model,
    }
    return read[command](folder, said, unread)


def _training(folder: Path, said: Mapping[str, Any], unread: list[str]) -> View:
    prompts = said.get("pictured_prompts") or []
    steps = {int(found[1]): file for file in folder.glob("images/step-*.png") if (found := re.search(r"-(\d+)\.png$", file.name))}
    shown = sorted({*sorted(steps)[:1], *sorted(steps)[-2:]})
    return TrainingView(
        protocol={**said["asked"], **said.get("made_with", {})},
        arch=Architecture(frozenset(said["arch"])),
        graph=_graph(said),
        outside_params=said.get("outside_params"),
        rows=_sound(folder, said, unread),
        images={step: images for step in shown if (images := outputs.strip_images(steps[step], len(prompts), unread)) is not None},
        prompts=prompts,
    )


def _model(folder: Path, said: Mapping[str, Any], unread: list[str]) -> View:
    rows = _sound(folder, said, unread)
    scores: dict[str, dict[str, Score]] = {}
    for row in rows:
        if row["kind"] == "score" and row["measure"] in MEASURES:
            scores.setdefault(row["setting"], {})[row["measure"]] = Score.from_json(row)
    components = [_component(row) for row in rows if row["kind"] == "component"]
    settings = [Setting(**{k: s[k] for k in Setting.__dataclass_fields__ if k in s}) for s in said["settings"]]
    prompts = said.get("pictured_prompts") or []
    strips = {s.label: file for s in settings if (file := _strip_file(folder, s.label)) is not None}
    return ModelView(
        label=said["label"],
        protocol=said["protocol"],
        made_with=said.get("made_with", {}),
        teacher=said.get("teacher") or ("" if said["arch"] else said.get("model")) or "",
        teacher_id=said.get("teacher_id") or "",
        arch=Architecture(frozenset(said["arch"])),
        graph=_graph(said),
        outside_params=said.get("outside_params"),
        settings=settings,
        scores=scores,
        components=list({(c.name, c.who): c for c in components}.values()),
        images={
            label: images
            for label, file in strips.items()
            if (images := outputs.strip_images(file, len(prompts), unread)) is not None
        },
        prompts=prompts,
    )


def _component(row: Mapping[str, Any]) -> Component:
    return Component(row["name"], row["who"], row["params"], row["macs"], row.get("latency_s"))


def _graph(said: Mapping[str, Any]) -> BlockGraph | None:
    return BlockGraph.from_json(said["graph"]) if said.get("graph") else None


def _strip_file(folder: Path, setting: str) -> Path | None:
    """The picture of a setting, whose file is named after the words of its label."""
    words = re.findall(r"[a-z0-9]+", setting.lower())
    files = {tuple(re.findall(r"[a-z0-9]+", file.stem.lower())): file for file in folder.glob("images/*.png")}
    return files.get(tuple(words))


def _sound(folder: Path, said: Mapping[str, Any], unread: list[str]) -> list[dict[str, Any]]:
    """The rows that are what this version reads; others are counted in `unread`. UserError for a line that is no row at all."""
    rows, found = read_rows(folder), []
    for row in rows:
        with suppress(UserError):
            check_row(said["command"], row, "a row", "run it again")
            found.append(row)
    if lacking := len(rows) - len(found):
        unread.append(f"{lacking} of {len(rows)} rows of {folder.name!r} lack what this version reads, and are left out.")
    return found
