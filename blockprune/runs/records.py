"""The rows that searches and trainings yield. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from blockprune.decode import AGAIN, Natural, checked
from blockprune.measures.score import Score
from blockprune.model.architecture import Architecture

SCAN, PRESET, GIVEN, EXACT = "scan", "preset", "given", "exact"  # sources of candidates, besides the sampler that proposed one


@dataclass(frozen=True)
class Candidate:
    """An architecture that a search may score, and why: `source` is scan, exact, preset, given, or the sampler that proposed it.

    `params` says of each unit of the space whether it goes (empty when the architecture is no union of units); `over` is by how
    much of each budget the architecture exceeds it, at most 0 when it fits; `costs` are the U-Net's exact ones.
    """

    arch: Architecture
    label: str
    source: str
    params: Mapping[str, bool]
    over: Mapping[str, float]
    costs: Mapping[str, float]

    @property
    def fits(self) -> bool:
        return all(excess <= 0 for excess in self.over.values())


@dataclass(frozen=True)
class BoundCheck:
    """A bound on a measure: its text, by how much it is broken (relative, at most 0 where it holds), and the score that says so."""

    text: str
    excess: float
    score: Score

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text, "excess": self.excess, "score": self.score.to_json()}


@dataclass(frozen=True)
class Evaluation:
    """A candidate with its scores, one for each number of samples that it was tried on, the last of which counts.

    `ended` is a time in seconds since the epoch, `seconds` what the evaluation took. After a short distillation there is one for
    each number of `updates` that it stopped at. `bounds` are what must hold besides the budgets, checked where it could win.
    """

    trial: int
    candidate: Candidate
    tiers: tuple[Score, ...]
    ended: float
    seconds: float
    updates: int = 0
    bounds: tuple[BoundCheck, ...] = ()

    @property
    def score(self) -> Score:
        return self.tiers[-1]

    @property
    def loss(self) -> float:
        return self.score.loss

    @property
    def keeps_bounds(self) -> bool:
        return all(check.excess <= 0 for check in self.bounds)

    @property
    def fits(self) -> bool:
        """True when the budgets and the bounds hold."""
        return self.candidate.fits and self.keeps_bounds

    def to_json(self) -> dict[str, Any]:
        c, later = self.candidate, {"updates": self.updates, "bounds": [s.to_json() for s in self.bounds]}
        return {
            "trial": self.trial,
            "source": c.source,
            "removed": c.arch.terms,
            "params": dict(c.params),
            "over": dict(c.over),
            "costs": dict(c.costs),
            "ended": self.ended,
            "seconds": self.seconds,
            "tiers": [s.to_json() for s in self.tiers],
        } | {name: value for name, value in later.items() if value}

    @classmethod
    def from_json(cls, data: object) -> Evaluation:
        """The evaluation of `to_json`; UserError on any other shape."""
        record = checked(data, EvaluationRecord, "an evaluation", AGAIN)
        costs = record.params, record.over, record.costs
        candidate = Candidate(Architecture(frozenset(record.removed)), record.tiers[-1].label, record.source, *costs)
        return cls(record.trial, candidate, record.tiers, record.ended, record.seconds, record.updates, record.bounds)


def deaf(evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Those that follow captions worse than every design by hand, beyond the intervals; none where there is no such design."""
    designs = [e.score for e in evaluations if e.candidate.source == PRESET and e.score.value is not None]
    if not designs:
        return []
    worst = max(designs, key=lambda score: score.loss)
    return [e for e in evaluations if e.score.clearly_worse(worst)]


class EvaluationRecord(msgspec.Struct):
    """An Evaluation in JSON."""

    trial: Natural
    source: str
    removed: list[str]
    params: dict[str, bool]
    over: dict[str, float]
    costs: dict[str, float]
    ended: float
    seconds: float
    tiers: Annotated[tuple[Score, ...], Meta(min_length=1)]
    updates: Natural = 0
    bounds: tuple[BoundCheck, ...] = ()


@dataclass(frozen=True)
class TrainState:
    """One optimiser step: every term of the loss, how many images went in over all processes, and the seconds it took."""

    step: Natural
    losses: Mapping[str, float]
    n_images: Natural
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"losses": dict(self.losses)}

    @classmethod
    def from_json(cls, data: object) -> TrainState:
        """The state of `to_json`, or of a row that holds more; UserError on any other shape."""
        return checked(data, cls, "a step of training", AGAIN)


class TrainRecord(msgspec.Struct):
    """What is read of a TrainState in JSON."""

    step: Natural
    losses: dict[str, float]


class ValidationRecord(msgspec.Struct):
    """A score of a student in training."""

    step: Natural
    score: Score


class SubjectScore(ValidationRecord):
    """A score of one subject of a benchmark."""

    subject: str


class SettingScore(msgspec.Struct):
    """The setting that a score of an evaluated model holds under; the row holds the score itself beside it."""

    setting: str


class SeenRecord(msgspec.Struct):
    """What was seen in the images of one model of a search: its scores, or why there are none."""

    label: str
    scores: list[Score]
    error: str = ""
