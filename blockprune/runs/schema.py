"""What is read of the records in a run directory: run.json by command, and the rows by command and kind. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from blockprune.cost.table import Component
from blockprune.decode import Natural, Positive, Whole, checked
from blockprune.errors import UserError
from blockprune.measures.measure import Kind, Measure
from blockprune.measures.score import Score
from blockprune.model.graph import GraphRecord
from blockprune.runs.records import EvaluationRecord, SeenRecord, SettingScore, SubjectScore, TrainRecord, ValidationRecord


class Asked(msgspec.Struct, kw_only=True):
    """Terms of a request by the names that every command gives them."""

    teacher: str | None = None
    teacher_model: str | None = None
    model: str | None = None
    measures: list[str] | None = None
    detector: str | None = None
    n_images: Natural | None = None
    seed: Whole | None = None


class AnyRun(msgspec.Struct):
    """run.json of any command."""

    command: str
    asked: dict[str, Any]


class MeasureRecord(msgspec.Struct):
    """A measure by its description."""

    name: str
    unit: str
    direction: Literal["down", "up"]
    title: str
    kind: Kind
    needs: tuple[str, ...] = ()
    paired: bool = False

    def value(self) -> Measure:
        return Measure(self.name, self.unit, self.direction, self.title, self.kind, self.needs, self.paired)


class Noted(msgspec.Struct, kw_only=True):
    """What every run notes beside the request; old ones do not."""

    made_with: dict[str, str] = {}
    measures: list[MeasureRecord] = []
    pictured_prompts: list[str] = []


class ScanRun(Noted, kw_only=True):
    """run.json of a scan."""

    asked: Asked
    archs: dict[str, list[str]]
    graph: GraphRecord


class SearchAsked(Asked, kw_only=True):
    """What a search was asked for."""

    objective: str
    budget: list[str]
    macs: Literal["thop", "conv_linear", "with_attention"]
    scope: Literal["pipeline", "unet"]
    pareto: Literal["params", "macs", "latency"] | None


class SearchRun(Noted, kw_only=True):
    """run.json of a search."""

    asked: SearchAsked
    graph: GraphRecord
    outside_params: Natural
    model: str


class DistillRun(Noted, kw_only=True):
    """run.json of a distillation; old ones have no graph, no costs and no prompts."""

    asked: Asked
    arch: list[str]
    graph: GraphRecord | None = None
    outside_params: Natural | None = None


class PhaseRecord(msgspec.Struct):
    """Optimiser steps `first` (exclusive) to `last` with one teacher and one architecture."""

    teacher: str
    arch: list[str]
    first: Natural
    last: Positive


class TrainedAsked(Asked, kw_only=True):
    """What a distillation was asked for, as far as its checkpoints depend on it."""

    teacher: str
    teacher_model: str
    phases: Annotated[list[PhaseRecord], Meta(min_length=1)]


class TrainedRun(Noted, kw_only=True):
    """run.json of a distillation whose checkpoints are looked at."""

    asked: TrainedAsked


class ProtocolRecord(msgspec.Struct):
    """How a model was evaluated, as far as a report says it."""

    name: str | None = None
    hash: str | None = None
    n_images: Natural | None = None
    seed: Whole | None = None
    detector: str | None = None
    clip: str | None = None


class SettingRecord(msgspec.Struct):
    """One way of drawing the images."""

    label: str
    steps: Positive
    cfg_scale: float
    scheduler: str
    quantize: str = ""
    checkpoint: Natural | None = None
    strength: float | None = None


class EvaluateRun(Noted, kw_only=True):
    """run.json of an evaluation."""

    label: str
    protocol: ProtocolRecord
    settings: list[SettingRecord]
    arch: list[str]
    model: str | None = None
    teacher: str | None = None
    teacher_id: str | None = None
    graph: GraphRecord | None = None
    outside_params: Natural | None = None


class PersonaliseRun(Noted, kw_only=True):
    """run.json of a personalisation, of one subject or of a benchmark's."""

    asked: Asked
    model: str


RUNS: Mapping[str, type[Noted]] = {
    "scan": ScanRun,
    "search": SearchRun,
    "distill": DistillRun,
    "personalise": PersonaliseRun,
    "evaluate": EvaluateRun,
}
# the forms of a row by its command and its kind; a row of a scan has no kind
ROWS: Mapping[str, Mapping[str | None, tuple[type, ...]]] = {
    "scan": {None: (Score,)},
    "search": {
        **dict.fromkeys(("search", "random", "heard", "final", "recovered"), (EvaluationRecord,)),
        "timing": (Score,),
        "seen": (SeenRecord,),
    },
    "distill": {"train": (TrainRecord,), "validation": (ValidationRecord,)},
    "personalise": {
        "train": (TrainRecord,),
        "validation": (ValidationRecord,),
        "cost": (ValidationRecord,),
        "subject": (SubjectScore,),
    },
    "evaluate": {"score": (SettingScore, Score), "component": (Component,)},
}


def check_row(command: str, row: Mapping[str, Any], what: str, remedy: str) -> None:
    """Raises UserError, which calls the row `what`, unless it is one that this command writes."""
    forms = ROWS[command]
    kind = row.get("kind")
    if not (kind is None or isinstance(kind, str)) or kind not in forms:
        known = ", ".join(str(name) for name in forms if name)
        raise UserError(f"cannot read {what}: $.kind: expected {known or 'no kind'}, got {str(kind)[:60]!r}; {remedy}")
    for form in forms[kind]:
        checked(row, form, what, remedy)
