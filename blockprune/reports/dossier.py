"""Runs about one teacher as one value: what a page is made of, in which order. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockprune.cost.table import Component
from blockprune.errors import UserError
from blockprune.measures.score import Score
from blockprune.model.architecture import Architecture, BlockGraph, Cost
from blockprune.reports.search_view import SearchView
from blockprune.reports.view import ScanView

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Setting:
    """How images were drawn: one line of a result table. `quantize` is "" for none, `checkpoint` the step it was taken at."""

    label: str
    steps: int
    cfg_scale: float
    scheduler: str
    quantize: str = ""
    checkpoint: int | None = None


@dataclass(frozen=True)
class ModelView:
    """What an evaluate directory says about one model.

    `arch` is empty for a teacher; `graph` is the teacher's, None when it is not known; `scores` maps a setting's label to its rows
    by measure; `images` maps it to (k, H, W, 3) uint8 images at fixed seeds, captioned by `prompts`. `protocol["hash"]` is equal
    for runs whose numbers compare. `model` is what was given to be evaluated.
    """

    label: str
    protocol: Mapping[str, Any]
    made_with: Mapping[str, Any]
    teacher: str
    teacher_id: str
    arch: Architecture
    graph: BlockGraph | None
    outside_params: int | None
    settings: Sequence[Setting]
    scores: Mapping[str, Mapping[str, Score]]
    components: Sequence[Component]
    images: Mapping[str, Images]
    prompts: Sequence[str]
    model: str = ""

    def value(self, setting: Setting, measure: str) -> float | None:
        """The number; None when it was not measured, failed, or is not finite."""
        score = self.scores.get(setting.label, {}).get(measure)
        return score.finite if score else None

    def step_times(self, setting: Setting) -> tuple[float | None, float | None]:
        """(seconds, ratio) of a U-Net step: the teacher's in seconds, all else as the ratio to a teacher timed in turn with it."""
        timed, plain = self.scores.get(setting.label, {}), not setting.quantize and setting.checkpoint is None
        own, teacher = (
            self.part("U-Net x 1"),
            next((c for c in self.components if c.name == "U-Net x 1" and c.who == "teacher"), None),
        )
        if not self.arch and plain:
            return timed["latency"].finite if "latency" in timed else own.latency_s if own else None, None
        if "latency_ratio" in timed:
            return None, timed["latency_ratio"].finite
        return None, own.over(teacher) if own and teacher and plain else None

    def part(self, name: str) -> Component | None:
        """The row of one component of this model itself; None when it was not recorded."""
        who = "student" if self.arch else "teacher"
        return next((c for c in self.components if c.name == name and c.who == who), None)

    @property
    def cost(self) -> Cost | None:
        """Of the U-Net, from the graph, else as the components were recorded; None when neither is there."""
        if self.graph is not None:
            return self.graph.cost(self.arch)
        unet = self.part("U-Net x 1")
        return Cost(params=unet.params, **unet.macs) if unet else None

    @property
    def whole_params(self) -> int | None:
        """Parameters of text encoders, U-Net and VAE decoder."""
        if (whole := self.part("whole")) is not None:
            return whole.params
        return self.cost.params + self.outside_params if self.cost and self.outside_params is not None else None


@dataclass(frozen=True)
class TrainingView:
    """What a distill directory says: its rows, and images at the last validation, captioned by `prompts` where these are known."""

    protocol: Mapping[str, Any]
    arch: Architecture
    graph: BlockGraph | None
    outside_params: int | None
    rows: Sequence[Mapping[str, Any]]
    images: Mapping[int, Images]
    prompts: Sequence[str]


View = ScanView | SearchView | TrainingView | ModelView


@dataclass(frozen=True)
class Dossier:
    """Runs by name, about one teacher; evaluated models with the teacher first, then from the largest to the smallest.

    `unread` says what could not be read, a sentence each. Raises UserError when two runs are about different teachers, or when
    evaluated models were judged differently and `allow_mismatch` is not set.
    """

    scans: Mapping[str, ScanView] = field(default_factory=dict)
    searches: Mapping[str, SearchView] = field(default_factory=dict)
    trainings: Mapping[str, TrainingView] = field(default_factory=dict)
    models: Mapping[str, ModelView] = field(default_factory=dict)
    unread: Sequence[str] = ()
    allow_mismatch: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "models", dict(sorted(self.models.items(), key=lambda item: _order(*item))))
        self._check_teachers()
        if not self.allow_mismatch:
            self._check_protocols()

    def _check_teachers(self) -> None:
        known = {name: teacher_of(view) for name, view in self.runs.items()}
        first: tuple[str, tuple[str, str]] | None = None
        for name, (identity, model) in known.items():
            if not identity:
                continue
            if first is None:
                first = name, (identity, model)
            elif identity != first[1][0]:
                mine, theirs = f"{model or 'a model'} ({identity})", f"{first[1][1] or 'a model'} ({first[1][0]})"
                raise UserError(
                    f"the runs are about different teachers: {name!r} has {mine}, {first[0]!r} has {theirs}; make a report for each"
                )

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
        return {**self.scans, **self.searches, **self.trainings, **self.models}

    @property
    def groups(self) -> dict[str, dict[str, ModelView]]:
        """Evaluated models that may be compared with each other, by the hash of their protocol."""
        groups: dict[str, dict[str, ModelView]] = {}
        for name, view in self.models.items():
            groups.setdefault(str(view.protocol.get("hash", "")), {})[name] = view
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
        found: dict[Architecture, list[str]] = {}
        for arch, label in self._students():
            names = found.setdefault(arch, [])
            if arch and label not in names:
                names.append(label)
        found.pop(Architecture(), None)
        graph = self.graph
        return dict(sorted(found.items(), key=lambda item: -graph.cost(item[0]).params if graph else len(item[0])))

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


def _order(name: str, view: ModelView) -> tuple[float, bool, str]:
    """No student is larger than its teacher."""
    size = view.whole_params or (view.cost.params if view.cost else 0)
    return -float(size or (0 if view.arch else math.inf)), bool(view.arch), name


def mismatch(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What two protocols say differently, a phrase each; the hashes alone when all that they spell out is equal."""
    names = [n for n in dict.fromkeys([*first, *second]) if n != "hash" and first.get(n) != second.get(n)]
    return [f"{n} {first.get(n)} and {second.get(n)}" for n in names or ["hash"]]
