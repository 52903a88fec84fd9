"""Values: measures with their unit and direction, and the rows that every stage yields. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from blockprune.decode import Natural, Whole, checked
from blockprune.errors import UserError
from blockprune.model.architecture import Architecture

TEACHER = "full"  # the label of the model that lacks nothing
AGAIN = "leave the run out, or run it again"


@dataclass(frozen=True)
class Measure:
    """What a number means: its unit, whether "down" or "up" is better, and a line for tables and figures."""

    unit: str
    direction: str
    title: str


MEASURES: dict[str, Measure] = {
    "eps_mse": Measure("", "down", "denoising error against the teacher"),
    "guided_mse": Measure("", "down", "guided denoising error against the teacher"),
    "fid": Measure("", "down", "FID"),
    "kid": Measure("", "down", "KID"),
    "is": Measure("", "up", "Inception Score"),
    "clip_score": Measure("cosine", "up", "CLIP score"),
    "feature_distance": Measure("", "down", "feature distance to the teacher's image"),
    "params": Measure("parameters", "down", "U-Net parameters"),
    "macs": Measure("MACs", "down", "U-Net step MACs"),
    "latency": Measure("s", "down", "U-Net step latency"),  # of the teacher; of what lacks blocks the ratio
    "latency_ratio": Measure("x teacher", "down", "U-Net step latency relative to the teacher, interleaved"),
    "memory": Measure("bytes", "down", "peak memory of a U-Net step"),
    "weight_bytes": Measure("bytes", "down", "stored bytes of the U-Net's weights"),
}


def timed_in_turn(scores: Iterable[Score]) -> list[Score]:
    """The scores without the seconds of a student's step, which runs of earlier versions hold: only its ratio was measured in turn
    with the teacher, and seconds that were taken minutes apart do not compare."""
    return [s for s in scores if s.measure != "latency" or s.label == TEACHER]


def measure(name: str) -> Measure:
    """The measure of that name; UserError lists those there are."""
    if name not in MEASURES:
        raise UserError(f"unknown measure {name!r}: choose from {', '.join(MEASURES)}")
    return MEASURES[name]


@dataclass(frozen=True)
class Score:
    """One number about one architecture.

    `arch` is `Architecture.key`, `label` its readable name; `n` counts samples (images, or image-timestep pairs); `low` and `high`
    bound a 95 % bootstrap interval where there is one; `delta` is the paired difference to the teacher on the same seeds, with its
    interval. A measurement that failed has `value` None and says why in `error`.
    """

    arch: str
    label: str
    measure: str
    value: float | None
    n: Natural
    seed: Whole
    low: float | None = None
    high: float | None = None
    delta: float | None = None
    delta_low: float | None = None
    delta_high: float | None = None
    error: str = ""

    @property
    def loss(self) -> float:
        """The value with the sign that makes larger worse; infinite when the measurement failed."""
        if self.value is None:
            return float("inf")
        return self.value if measure(self.measure).direction == "down" else -self.value

    @property
    def bounds(self) -> tuple[float, float]:
        """The better and the worse end of the interval, as losses; the loss itself twice where there is no interval."""
        if self.low is None or self.high is None:
            return self.loss, self.loss
        return (self.low, self.high) if measure(self.measure).direction == "down" else (-self.high, -self.low)

    @property
    def finite(self) -> float | None:
        """The value; None when the measurement failed or is not finite."""
        return self.value if self.value is not None and math.isfinite(self.value) else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """(low, high) of the 95 % interval; None when there is none."""
        if self.low is None or self.high is None or not math.isfinite(self.low + self.high):
            return None
        return self.low, self.high

    def to_json(self) -> dict[str, Any]:
        kind = measure(self.measure)
        return asdict(self) | {"unit": kind.unit, "direction": kind.direction}

    @classmethod
    def from_json(cls, data: object) -> Score:
        """The score of `to_json`, or of a row that holds more; UserError on any other shape."""
        return checked(data, cls, "a score", AGAIN)


@dataclass(frozen=True)
class Candidate:
    """An architecture that a search may score, and why: `source` is scan, exact, preset, or the sampler that proposed it.

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
class Evaluation:
    """A candidate with its scores, one for each number of samples that it was tried on, the last of which counts.

    `ended` is a time in seconds since the epoch, `seconds` what the evaluation took.
    """

    trial: int
    candidate: Candidate
    tiers: tuple[Score, ...]
    ended: float
    seconds: float

    @property
    def score(self) -> Score:
        return self.tiers[-1]

    @property
    def loss(self) -> float:
        return self.score.loss

    def to_json(self) -> dict[str, Any]:
        c = self.candidate
        said = {"source": c.source, "removed": list(c.arch), "params": dict(c.params), "over": dict(c.over), "costs": dict(c.costs)}
        return {
            "trial": self.trial,
            **said,
            "ended": self.ended,
            "seconds": self.seconds,
            "tiers": [s.to_json() for s in self.tiers],
        }

    @classmethod
    def from_json(cls, data: object) -> Evaluation:
        """The evaluation of `to_json`; UserError on any other shape."""
        record = checked(data, EvaluationRecord, "an evaluation", AGAIN)
        costs = record.params, record.over, record.costs
        candidate = Candidate(Architecture(frozenset(record.removed)), record.tiers[-1].label, record.source, *costs)
        return cls(record.trial, candidate, record.tiers, record.ended, record.seconds)


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


@dataclass(frozen=True)
class TrainState:
    """One optimiser step: every term of the loss, how many images went in over all processes, and the seconds it took."""

    step: Natural
    losses: Mapping[str, float]
    n_images: Natural
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"losses": dict(self.losses)}


class TrainRecord(msgspec.Struct):
    """What is read of a TrainState in JSON."""

    step: Natural
    losses: dict[str, float]


class ValidationRecord(msgspec.Struct):
    """A score of a student in training."""

    step: Natural
    score: Score


class SettingScore(msgspec.Struct):
    """The setting that a score of an evaluated model holds under; the row holds the score itself beside it."""

    setting: str


class ComponentRecord(msgspec.Struct):
    """What one part of a pipeline costs."""

    name: str
    who: str
    params: Natural
    macs: dict[str, Natural]
    latency_s: float | None = None


class SeenRecord(msgspec.Struct):
    """What was seen in the images of one model of a search: its scores, or why there are none."""

    label: str
    scores: list[Score]
    error: str = ""
