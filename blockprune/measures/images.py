"""Scores of generated images: what detectors see in them, and each measure as a statistic of that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from blockprune.errors import UserError
from blockprune.measures import intervals
from blockprune.measures.detectors import Scorer
from blockprune.measures.fid_kid import Detector, Stats
from blockprune.measures.intervals import Statistic
from blockprune.measures.measure import NEEDS, Measure, Seen, measure
from blockprune.measures.score import Score
from blockprune.measures.subject import Subject


@dataclass(frozen=True)
class Judges:
    """Who looks at the images: a detector with the reference it is compared to, a CLIP scorer, and a subject that they may show.
    Each may be missing.

    `is_splits` is over how many parts of the images the Inception Score is averaged. `own` are a user's measures, which look at the
    images themselves. `inputs` says that the images were made from others, which are shown beside them.
    """

    detector: Detector | None = None
    reference: Stats | None = None
    scorer: Scorer | None = None
    is_splits: int = 1
    own: tuple[Measure, ...] = ()
    inputs: bool = False
    subject: Subject | None = None

    def look(self, images: Tensor, prompts: Sequence[str], inputs: Tensor | None = None) -> dict[str, NDArray[Any]]:
        """NCHW uint8, their prompts, and what they were made from => what was seen, arrays with one row per image."""
        seen: dict[str, NDArray[Any]] = {}
        if self.detector:
            features, probs = self.detector.features_and_probs(images)
            seen |= {"features": features} | ({} if probs is None else {"probs": probs})
        if self.scorer:
            seen |= {"image": self.scorer.image(images), "text": self.scorer.text(prompts)}
        if inputs is not None:
            seen["input_l1"] = pixel_l1(images, inputs)
        if self.subject:
            seen |= self.subject.look(images, prompts, seen)
        return seen | {m.name: m.look(images, prompts) for m in self.own if m.look}

    def with_own(self, wanted: Iterable[str]) -> Judges:
        """These judges with those of the wanted measures that look at images themselves."""
        return replace(self, own=tuple(m for name in wanted if (m := measure(name)).look))

    def lacks(self, name: str) -> str:
        """What a measure needs and does not have, in words that say which option gives it; "" when nothing."""
        there = {"detector": self.detector is not None, "reference": self.reference is not None, "scorer": self.scorer is not None}
        there |= {"input": self.inputs}
        there |= {"reference features": self.reference is not None and self.reference.features is not None}
        there |= {"subject": self.subject is not None, "training": False}
        there |= {"vision": self.subject is not None and self.subject.vision is not None}
        return next((NEEDS[need] for need in measure(name).needs if not there.get(need, True)), "")

    def check(self, wanted: Iterable[str]) -> None:
        """Raises UserError for a measure that lacks its detector, scorer or reference."""
        for name in wanted:
            if need := self.lacks(name):
                raise UserError(f"measure {name!r} needs {need}, or leave it out of --measures")


def pixel_l1(images: Tensor, others: Tensor) -> NDArray[np.float64]:
    """NCHW uint8 twice => (N,) mean absolute differences of their pixels, of which black and white are 1 apart."""
    return np.asarray((images.double() - others.double()).abs().mean((1, 2, 3)) / 255)


def stack(batches: Iterable[Seen]) -> dict[str, NDArray[Any]]:
    """What was seen of all batches, one below the other."""
    rows = list(batches)
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def statistic_of(name: str, seen: Seen, teacher: Seen, judges: Judges) -> Statistic:
    """A measure of images as a statistic of what was seen of them, and of the teacher's; UserError for one that cannot be had."""
    about = measure(name)
    if about.compute is None:
        raise UserError(f"measure {name!r} is not computed from images: leave it out of --measures")
    if "classes" in about.needs and "probs" not in seen:
        raise UserError(f"measure {name!r} needs {NEEDS['classes']}, or leave it out of --measures")
    return about.compute(seen, teacher, judges)


def judge(
    arch: str, label: str, measures: Iterable[str], seen: Seen, teacher: Seen | None, judges: Judges, seed: int
) -> Iterable[Score]:
    """A Score for each image measure, with its interval and, where there is a teacher, the paired difference to it."""
    n = len(next(iter(seen.values())))
    for name in measures:
        statistic = statistic_of(name, seen, seen if teacher is None else teacher, judges)
        value = float(statistic(np.arange(n)[None])[0])
        score = Score(arch, label, name, value, n, seed, *(intervals.interval(statistic, n, seed) or (None, None)))
        if teacher is None:
            yield score
            continue
        base = statistic_of(name, teacher, teacher, judges)
        below, above = intervals.paired_interval(statistic, base, n, seed) or (None, None)
        yield replace(score, delta=value - float(base(np.arange(n)[None])[0]), delta_low=below, delta_high=above)


def failed(arch: str, label: str, measures: Iterable[str], n: int, seed: int, error: str) -> Iterable[Score]:
    """A failed row for each measure."""
    return (Score(arch, label, measure, None, n, seed, error=error) for measure in measures)
