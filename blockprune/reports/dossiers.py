"""Run directories of any kind and age as one dossier. What an older run lacks is left out and said to be. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from blockprune.errors import UserError
from blockprune.reports.dossier import Dossier, ModelView, TrainingView, View
from blockprune.reports.evaluations import evaluation_view
from blockprune.reports.scans import scan_view
from blockprune.reports.search_view import SearchView
from blockprune.reports.searches import search_view
from blockprune.reports.trainings import training_view
from blockprune.reports.view import ScanView
from blockprune.runs.directory import Stored

READ: Mapping[str, Callable[[Stored, list[str]], View]] = {
    "scan": scan_view,
    "search": search_view,
    "distill": training_view,
    "evaluate": evaluation_view,
}


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
        views[_name(folder, view, views)] = view
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
    run = Stored(folder)
    if run.command not in READ:
        raise UserError(f"{str(folder)!r} holds a {run.command!r} run: a report is made of {', '.join(READ)} runs")
    return READ[run.command](run, unread)
