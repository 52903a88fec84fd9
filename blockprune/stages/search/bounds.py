"""What a search makes best, and what it must not give up for it: `guided_mse,clip_score>=0.7`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blockprune.errors import UserError
from blockprune.measures.measure import measure, of_drawings
from blockprune.measures.score import Score
from blockprune.model.architecture import Architecture
from blockprune.request import shown
from blockprune.runs.records import BoundCheck, Candidate

_FORM = re.compile(r"(?P<measure>\w+)\s*(?P<sign><=|>=)\s*(?P<limit>\S+)")
BETTER = {"<=": "when lower", ">=": "when higher"}
FAILED = 1e6  # the excess of what could not be measured


@dataclass(frozen=True)
class Bound:
    """The worst value of a measure that is allowed; `text` is what the user said.

    >>> from blockprune.stages.search.bounds import read_bound
    >>> read_bound("clip_score>=0.7").limit
    0.7
    """

    text: str
    measure: str
    limit: float

    def excess(self, score: Score) -> float:
        """By how much a score is worse than the limit, relative to it; at most 0 where it holds."""
        worse = score.loss - measure(self.measure).loss(self.limit)
        return min(worse / max(abs(self.limit), 1e-12), FAILED)


def read_bound(text: str) -> Bound:
    """The bound that `text` says; UserError for anything else, and for one on the wrong side."""
    found = _FORM.fullmatch(text.strip())
    name = found["measure"] if found else ""
    if found is None or name not in of_drawings():
        raise UserError(
            f"cannot read the bound {text!r} of --objective: write MEASURE>=NUMBER or MEASURE<=NUMBER, with one of {_known()}"
        )
    try:
        limit = float(found["limit"])
    except ValueError:
        limit = math.nan
    if not math.isfinite(limit):
        raise UserError(f"cannot read the bound {text!r} of --objective: {found['limit']!r} is no number; write {name}>=0.7, say")
    sign = "<=" if measure(name).direction == "down" else ">="
    if found["sign"] != sign:
        raise UserError(
            f"the bound {text!r} of --objective asks for the worse: {name} is better {BETTER[sign]}; write {name}{sign}{limit:g}"
        )
    return Bound(re.sub(r"\s+", "", text), name, limit)


def _known() -> str:
    return ", ".join(of_drawings())


def read_objective(texts: Sequence[str]) -> tuple[str, tuple[Bound, ...]]:
    """The measure that is made best, which comes first, and the bounds that must hold; UserError for anything else."""
    first, *rest = [part.strip() for text in texts for part in text.split(",")] or [""]
    if first not in of_drawings():
        raise UserError(f"unknown --objective {shown(first)}: choose from {_known()}; bounds such as clip_score>=0.7 may follow")
    return first, tuple(read_bound(text) for text in rest)


Bounding = Callable[[Candidate, Sequence[Score]], Sequence[BoundCheck]]


@dataclass(frozen=True)
class Bounded:
    """Measures the bounds of a candidate that may win: within the budgets, and scored on all `n_tiers` numbers of samples."""

    bounds: Sequence[tuple[Bound, Callable[[Architecture, str], Score]]]
    n_tiers: int = 1

    def __call__(self, candidate: Candidate, tiers: Sequence[Score]) -> list[BoundCheck]:
        """Each bound as measured; none for a candidate that cannot win."""
        if not candidate.fits or len(tiers) < self.n_tiers or tiers[-1].value is None:
            return []
        scores = [(bound, score_of(candidate.arch, candidate.label)) for bound, score_of in self.bounds]
        return [BoundCheck(bound.text, bound.excess(score), score) for bound, score in scores]


def no_bounds(candidate: Candidate, tiers: Sequence[Score]) -> list[BoundCheck]:
    """Nothing must hold."""
    return []
