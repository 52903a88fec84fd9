"""One number about one architecture. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from blockprune.decode import AGAIN, Natural, Whole, checked
from blockprune.measures.measure import measure

TEACHER = "full"  # the label of the model that lacks nothing


@dataclass(frozen=True)
class Score:
    """One number about one architecture.

    `arch` is `Architecture.key`, `label` its readable name; `n` counts samples (images, or image-timestep pairs); `low` and `high`
    bound a 95 % bootstrap interval where there is one; `delta` is the paired difference to the teacher on the same seeds (of a
    denoising error to the architecture that a scan goes around), with its interval. A measurement that failed has `value` None and
    says why in `error`.
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

    def clearly_worse(self, other: Score) -> bool:
        """True when the whole interval is worse than that of another score of the same measure."""
        return self.bounds[0] > other.bounds[1]

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


def flat_score(name: str, score: Score | None) -> dict[str, Any]:
    """A score as entries of a flat row: its value, interval and count."""
    low, high = (score.interval if score else None) or (None, None)
    value, n = (score.finite, score.n) if score else (None, None)
    return {name: value, f"{name}_low": low, f"{name}_high": high, f"{name}_n": n}


def timed_in_turn(scores: Iterable[Score]) -> list[Score]:
    """The scores without the seconds of a student's step, which runs of earlier versions hold: only its ratio was measured in turn
    with the teacher, and seconds that were taken minutes apart do not compare."""
    return [s for s in scores if s.measure != "latency" or s.label == TEACHER]
