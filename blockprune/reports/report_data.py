"""Runs of any kind and age about one teacher, as the one value that a report is made of. Needs no torch.

What an older run lacks is left out, and a sentence says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from blockprune.errors import UserError
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.reports.evaluations import evaluation_view
from blockprune.reports.model_view import ModelView, TrainingView
from blockprune.reports.models import Model, models_of
from blockprune.reports.scans import scan_view
from blockprune.reports.search_view import SearchView
from blockprune.reports.searches import search_view
from blockprune.reports.trainings import training_view
from blockprune.reports.view import ScanView
from blockprune.runs import Readable
from blockprune.runs.directory import Stored

View = ScanView | SearchView | TrainingView | ModelView
READ: Mapping[str, Callable[[Readable, list[str]], View]] = {
    "scan": scan_view,
    "search": search_view,
    "distill": training_view,
    "evaluate": evaluation_view,
}


@dataclass(frozen=True)
class ReportData:
    """Runs by name, about one teacher; the models that evaluations are of have one name each.

    `unread` says what could not be read, a sentence each; `folders` where a run lies that is on disk, as it was given. Raises
    UserError when two runs are about different teachers, or when evaluated models were judged differently and `allow_mismatch` is
    not set.
    """

    scans: Mapping[str, ScanView] = field(default_factory=dict)
    searches: Mapping[str, SearchView] = field(default_factory=dict)
    trainings: Mapping[str, TrainingView] = field(default_factory=dict)
    evaluations: Mapping[str, ModelView] = field(default_factory=dict)
    unread: Sequence[str] = ()
    folders: Mapping[str, Path] = field(default_factory=dict)
    allow_mismatch: bool = False

    def __post_init__(self) -> None:
        self._check_teachers()
        if not self.allow_mismatch:
            self._check_protocols()

    def _check_teachers(self) -> None:
        first: dict[str, str] = {}
        for name, view in self.runs.items():
            identity, model = teacher_of(view)
            if identity:
                first.setdefault(identity, f"{name!r} has {model or 'a model'} ({identity})")
        if len(first) > 1:
            one, other = list(first.values())[:2]
            raise UserError(f"the runs are about different teachers: {other}, {one}; make a report for each")

    def _check_protocols(self) -> None:
        groups = list(self.groups.values())
        if len(groups) > 1:
            (a, first), (b, second) = (next(iter(group.items())) for group in groups[:2])
            raise UserError(
                f"{a!r} and {b!r} were evaluated differently ({'; '.join(mismatch(first.protocol, second.protocol))}): evaluate "
                "them alike, or give --allow-mismatch for a table each"
            )

    @property
    def runs(self) -> dict[str, View]:
        """Every run by its name."""
        return {**self.scans, **self.searches, **self.trainings, **self.evaluations}

    @cached_property
    def models(self) -> dict[str, Model]:
        """Evaluated models by name, the teacher first, then from the largest to the smallest."""
        return models_of(self.evaluations, self.trainings)

    @cached_property
    def students_of(self) -> dict[str, str]:
        """Distillation => the name of the model that came of it, its own where that was not evaluated."""
        known = {model.training: name for name, model in self.models.items() if model.training}
        return {name: known.get(name, name) for name in self.trainings}

    @property
    def groups(self) -> dict[str, dict[str, ModelView]]:
        """Evaluated models that may be compared with each other, by the hash of their protocol."""
        groups: dict[str, dict[str, ModelView]] = {}
        for name, model in self.models.items():
            for protocol, view in model.views.items():
                groups.setdefault(protocol, {})[name] = view
        return groups

    @property
    def teacher(self) -> str:
        """The teacher's name as a run knows it; "" when none does."""
        return next((model for _, model in map(teacher_of, self.runs.values()) if model), "")

    @property
    def teacher_id(self) -> str:
        return next((identity for identity, _ in map(teacher_of, self.runs.values()) if identity), "")

    @property
    def graph(self) -> BlockGraph | None:
        """The teacher's U-Net, from the first run that has it."""
        return next((view.graph for view in self.runs.values() if view.graph is not None), None)

    @property
    def outside_params(self) -> int | None:
        """Parameters of the pipeline outside its U-Net, from the first run that has them."""
        views = [view for view in self.runs.values() if not isinstance(view, ScanView)]
        return next((view.outside_params for view in views if view.outside_params is not None), None)

    @property
    def students(self) -> dict[Architecture, list[str]]:
        """Every architecture that was chosen, trained or evaluated, with what it is called; the smallest removal first."""
        students: dict[Architecture, list[str]] = {}
        for arch, label in self._students():
            names = students.setdefault(arch, [])
            if arch and label not in names:
                names.append(label)
        students.pop(Architecture(), None)
        graph = self.graph
        return dict(sorted(students.items(), key=lambda item: -graph.cost(item[0]).params if graph else len(item[0])))

    def _students(self) -> Iterator[tuple[Architecture, str]]:
        for name, model in self.models.items():
            yield model.arch, name
        for name, training in self.trainings.items():
            yield training.arch, name
        for search in self.searches.values():
            chosen = [*search.chosen, search.nearest_preset] if search.ranked else []
            for e in chosen:
                if e is not None:
                    yield e.candidate.arch, e.score.label


def teacher_of(view: View) -> tuple[str, str]:
    """(identity, name) of the teacher that a run is about; "" for what it does not say."""
    if isinstance(view, ModelView):
        return view.teacher_id, view.teacher
    name = view.protocol.get("teacher_model") or view.protocol.get("model")
    return str(view.protocol.get("teacher") or ""), str(name or "")


def mismatch(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What two protocols say differently, a phrase each; the hashes alone when all that they spell out is equal."""
    names = [n for n in dict.fromkeys([*first, *second]) if n != "hash" and first.get(n) != second.get(n)]
    return [f"{n} {first.get(n)} and {second.get(n)}" for n in names or ["hash"]]


def report_data(runs: Sequence[str | Path | Readable], allow_mismatch: bool = False) -> ReportData:
    """The runs, each under the name of its folder, or its model's label where that is another's name too.

    Raises UserError for what is no run directory, for damaged files, and for runs that do not belong together.
    """
    unread: list[str] = []
    views: dict[str, View] = {}
    folders: dict[str, Path] = {}
    resolved: set[Path] = set()
    for source in runs:
        run = _opened(source) if isinstance(source, str | Path) else source
        if isinstance(run, Stored):
            if run.path.resolve() in resolved:
                raise UserError(f"{str(run.path)!r} is given twice")
            resolved.add(run.path.resolve())
        command = run.command if isinstance(run, Stored) else str(run.about["command"])
        view = READ[command](run, unread)
        name = next(name for name in _names(run, command, view) if name not in views)
        views[name] = view
        folders |= {name: run.path} if isinstance(run, Stored) else {}
    return ReportData(
        scans={name: v for name, v in views.items() if isinstance(v, ScanView)},
        searches={name: v for name, v in views.items() if isinstance(v, SearchView)},
        trainings={name: v for name, v in views.items() if isinstance(v, TrainingView)},
        evaluations={name: v for name, v in views.items() if isinstance(v, ModelView)},
        unread=unread,
        folders=folders,
        allow_mismatch=allow_mismatch,
    )


def _names(run: Readable, command: str, view: View) -> Iterator[str]:
    """An evaluated model by its label, another run by its folder; then with more of the path; a run in memory by its number."""
    parts = run.path.resolve().parts if isinstance(run, Stored) else (command,)
    paths = ["/".join(parts[-n:]) for n in range(1, len(parts) + 1)]
    yield from (view.label, *(f"{view.label} ({path})" for path in paths)) if isinstance(view, ModelView) else paths
    yield from (f"{paths[0]} {i}" for i in count(2))


def _opened(folder: str | Path) -> Stored:
    if not Path(folder).is_dir():
        raise UserError(f"{str(folder)!r} is not a run directory: there is no such folder")
    run = Stored(Path(folder))
    if run.command not in READ:
        raise UserError(f"{str(folder)!r} holds a {run.command!r} run: a report is made of {', '.join(READ)} runs")
    return run
