"""Run directories read back for a report: of any kind and age. What an older run lacks is left out and said to be."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from blockprune.arch import Architecture, BlockGraph
from blockprune.cli import outputs
from blockprune.errors import UserError
from blockprune.records import MEASURES, Evaluation, Score
from blockprune.report.dossier import Component, Dossier, ModelView, Setting, TrainingView, View
from blockprune.report.search_view import SearchView
from blockprune.report.view import ScanView
from blockprune.store import read_rows, read_run

COMMANDS = ("scan", "search", "distill", "evaluate")
T = TypeVar("T")


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
    said = read_run(folder)
    command = said.get("command")
    if command not in COMMANDS:
        raise UserError(f"{str(folder)!r} holds a {command!r} run: a report is made of {', '.join(COMMANDS)} runs")
    read: dict[str, Callable[[Path, list[str]], View]] = {
        "scan": _scan,
        "search": _search,
        "distill": _training,
        "evaluate": _model,
    }
    try:
        return read[command](folder, unread)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, OSError) as err:
        why = f"it lacks {err}" if isinstance(err, KeyError) else str(err) or type(err).__name__
        raise UserError(
            f"the {command} run in {str(folder)!r} cannot be read ({why[:200]}): leave it out, or run it again"
        ) from None


def _scan(folder: Path, unread: list[str]) -> View:
    return outputs.view_of(folder, _sound(folder, read_rows(folder), lambda row: (Score.from_json(row), row)[1], unread), unread)


def _search(folder: Path, unread: list[str]) -> View:
    rows = _sound(folder, read_rows(folder), lambda row: (_searched(row), row)[1], unread)
    return outputs.search_view_of(folder, rows, unread)


def _searched(row: Mapping[str, Any]) -> object:
    if row["kind"] == "seen":
        return [Score.from_json(score) for score in row["scores"]]
    return Score.from_json(row) if row["kind"] == "timing" else Evaluation.from_json(row)


def _training(folder: Path, unread: list[str]) -> View:
    said = read_run(folder)
    kinds: Mapping[str, Callable[[Mapping[str, Any]], object]] = {"train": _trained, "validation": _validated}
    rows = [row for row in read_rows(folder) if row.get("kind") in kinds]
    sound = _sound(folder, rows, lambda row: (kinds[row["kind"]](row), row)[1], unread)
    prompts = said.get("pictured_prompts") or []
    steps = {int(found[1]): file for file in folder.glob("images/step-*.png") if (found := re.search(r"-(\d+)\.png$", file.name))}
    shown = sorted({*sorted(steps)[:1], *sorted(steps)[-2:]})
    return TrainingView(
        protocol={**said["asked"], **said.get("made_with", {})},
        arch=Architecture(frozenset(said["arch"])),
        graph=_graph(said),
        outside_params=said.get("outside_params"),
        rows=sound,
        images={step: images for step in shown if (images := outputs.strip_images(steps[step], len(prompts), unread)) is not None},
        prompts=prompts,
    )


def _trained(row: Mapping[str, Any]) -> object:
    return row["step"] + 0, [value + 0 for value in row["losses"].values()]


def _validated(row: Mapping[str, Any]) -> object:
    return row["step"] + 0, Score.from_json(row["score"])


def _model(folder: Path, unread: list[str]) -> View:
    said, rows = read_run(folder), read_rows(folder)
    scored = [row for row in rows if row.get("kind") == "score" and row.get("measure") in MEASURES]
    scores: dict[str, dict[str, Score]] = {}
    for setting, score in _sound(folder, scored, lambda row: (row["setting"], Score.from_json(row)), unread):
        scores.setdefault(setting, {})[score.measure] = score
    components = _sound(folder, [row for row in rows if row.get("kind") == "component"], _component, unread)
    settings = [Setting(**{k: s[k] for k in Setting.__dataclass_fields__ if k in s}) for s in said["settings"]]
    prompts = said.get("pictured_prompts") or []
    strips = {s.label: file for s in settings if (file := _strip_file(folder, s.label)) is not None}
    return ModelView(
        label=str(said["label"]),
        protocol=said["protocol"],
        made_with=said.get("made_with", {}),
        teacher=str(said.get("teacher") or ("" if said["arch"] else said.get("model")) or ""),
        teacher_id=str(said.get("teacher_id") or ""),
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
    return Component(str(row["name"]), str(row["who"]), int(row["params"]), dict(row["macs"]), row.get("latency_s"))


def _graph(said: Mapping[str, Any]) -> BlockGraph | None:
    return BlockGraph.from_json(said["graph"]) if said.get("graph") else None


def _strip_file(folder: Path, setting: str) -> Path | None:
    """The picture of a setting, whose file is named after the words of its label."""
    words = re.findall(r"[a-z0-9]+", setting.lower())
    files = {tuple(re.findall(r"[a-z0-9]+", file.stem.lower())): file for file in folder.glob("images/*.png")}
    return files.get(tuple(words))


def _sound(folder: Path, rows: Sequence[Mapping[str, Any]], read: Callable[[Mapping[str, Any]], T], unread: list[str]) -> list[T]:
    """What `read` makes of each row; rows that lack something are counted in `unread`."""
    found, lacking = [], 0
    for row in rows:
        try:
            found.append(read(row))
        except (KeyError, TypeError, AttributeError, ValueError):
            lacking += 1
    if lacking:
        unread.append(f"{lacking} of {len(rows)} rows of {folder.name!r} lack what this version reads, and are left out.")
    return found
