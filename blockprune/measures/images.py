"""Scores of generated images: what detectors see in them, and each measure as a statistic of that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from blockprune.errors import UserError
from blockprune.measures import statistics
from blockprune.measures.statistics import Detector, Statistic, Stats
from blockprune.runs.records import Score

Observed = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Judges:
    """Who looks at the images: a detector with the reference it is compared to, and a CLIP scorer. Either may be missing.

    `is_splits` is over how many parts of the images the Inception Score is averaged.
    """

    detector: Detector | None = None
    reference: Stats | None = None
    scorer: Any = None
    is_splits: int = 1

    def look(self, images: Tensor, prompts: Sequence[str]) -> dict[str, NDArray[Any]]:
        """NCHW uint8 and their prompts => what was seen, arrays with one row per image."""
        seen: dict[str, NDArray[Any]] = {}
        if self.detector:
            features, probs = self.detector.features_and_probs(images)
            seen |= {"features": features} | ({} if probs is None else {"probs": probs})
        if self.scorer:
            seen |= {"image": self.scorer.image(images), "text": self.scorer.text(prompts)}
        return seen


def stack(batches: Iterable[Observed]) -> dict[str, NDArray[Any]]:
    """The observations of all batches, one below the other."""
    rows = list(batches)
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


# measure => (what is seen of the student, of the teacher's images of the same seeds, judges) => a statistic; `lacks` nothing
STATISTICS: dict[str, Callable[[Observed, Observed, Any], Statistic]] = {
    "fid": lambda seen, teacher, judges: statistics.fid_statistic(seen["features"], judges.reference),
    "kid": lambda seen, teacher, judges: statistics.kid_statistic(seen["features"], judges.reference.features),
    "is": lambda seen, teacher, judges: statistics.inception_statistic(_need_probs(seen), judges.is_splits),
    "clip_score": lambda seen, teacher, judges: statistics.mean_statistic(statistics.clip_score(seen["image"], seen["text"])),
    "feature_distance": lambda seen, teacher, judges: statistics.mean_statistic(
        statistics.feature_distance(seen["features"], teacher["features"])
    ),
}
OPTIONS = {"reference": "--reference DIR or stats.npz", "detector": "--detector", "scorer": "--clip DIR or id"}
NEEDS = {"fid": "reference", "kid": "reference", "is": "detector", "clip_score": "scorer", "feature_distance": "detector"}


def lacks(measure: str, judges: Judges) -> str:
    """What a measure needs and does not have, in words that say which option gives it; "" when nothing."""
    need = NEEDS.get(measure)
    if need and getattr(judges, need) is None:
        return f"a {need}: give {OPTIONS[need]}"
    if measure == "kid" and judges.reference is not None and judges.reference.features is None:
        return "a reference with its features: make one with `blockprune stats`"
    return ""


def check_judges(measures: Iterable[str], judges: Judges) -> None:
    """Raises UserError for a measure that lacks its detector, scorer or reference."""
    for measure in measures:
        if need := lacks(measure, judges):
            raise UserError(f"measure {measure!r} needs {need}, or leave it out of --measures")


def _need_probs(seen: Observed) -> NDArray[Any]:
    if "probs" not in seen:
        raise UserError(
            "the Inception Score needs a detector with classes: choose another --detector, or leave 'is' out of --measures"
        )
    return seen["probs"]


def judge(
    arch: str, label: str, measures: Iterable[str], seen: Observed, teacher: Observed | None, judges: Judges, seed: int
) -> Iterable[Score]:
    """A Score for each image measure, with its interval and, where there is a teacher, the paired difference to it."""
    n = len(next(iter(seen.values())))
    for measure in measures:
        statistic = STATISTICS[measure](seen, seen if teacher is None else teacher, judges)
        value = float(statistic(np.arange(n)[None])[0])
        score = Score(arch, label, measure, value, n, seed, *(statistics.interval(statistic, n, seed) or (None, None)))
        if teacher is None:
            yield score
            continue
        base = STATISTICS[measure](teacher, teacher, judges)
        below, above = statistics.paired_interval(statistic, base, n, seed) or (None, None)
        yield replace(score, delta=value - float(base(np.arange(n)[None])[0]), delta_low=below, delta_high=above)


def failed(arch: str, label: str, measures: Iterable[str], n: int, seed: int, error: str) -> Iterable[Score]:
    """A failed row for each measure."""
    return (Score(arch, label, measure, None, n, seed, error=error) for measure in measures)
