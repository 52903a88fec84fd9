"""A scan read back as one value, and what follows from it: the ranking and the rank correlation of two measures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blockprune.errors import UserError
from blockprune.measures.intervals import kendall_tau
from blockprune.measures.measure import MEASURES, names, quality
from blockprune.measures.score import TEACHER, Score, flat_score
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph

PATHS = {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}
PARTS = {"resnets": "R", "attentions": "A", "transformer_blocks": "T", "downsamplers": "D", "upsamplers": "U"}


@dataclass(frozen=True)
class ScanView:
    """What a scan directory says.

    `archs` maps each label to its architecture, the teacher ("full") first. `scores` come in any order; of two rows with one
    label and measure the later counts. `images` maps a label to (k, H, W, 3) uint8 images at common seeds, captioned by `prompts`.
    `errors` are the denoising errors (n,) of each sample by measure and label, at the `timesteps` (n,); none unless asked for.
    Raises UserError without a teacher, or for a score whose label is not among `archs`.
    """

    protocol: Mapping[str, Any]
    graph: BlockGraph
    archs: Mapping[str, Architecture]
    scores: Sequence[Score]
    images: Mapping[str, NDArray[np.uint8]]
    prompts: Sequence[str]
    timesteps: NDArray[np.int64] | None = None
    errors: Mapping[str, Mapping[str, NDArray[np.float64]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if TEACHER not in self.archs:
            raise UserError(f"a scan has the teacher under the label {TEACHER!r}: got {', '.join(self.archs) or 'no label'}")
        for score in self.scores:
            if score.label not in self.archs:
                raise UserError(f"a row scores {score.label!r}, which this scan does not list: the rows are of another scan")
        object.__setattr__(self, "_index", {(s.label, s.measure): s for s in self.scores})

    def score(self, label: str, measure: str) -> Score | None:
        """The row of `label` and `measure`; None when it was not measured."""
        index: dict[tuple[str, str], Score] = self.__dict__["_index"]
        return index.get((label, measure))

    def value(self, label: str, measure: str) -> float | None:
        """The number of `label` and `measure`; None when it was not measured, failed, or is not finite."""
        score = self.score(label, measure)
        return score.finite if score else None

    def interval(self, label: str, measure: str) -> tuple[float, float] | None:
        """(low, high) of the 95 % interval; None when there is none."""
        score = self.score(label, measure)
        return score.interval if score else None

    def error(self, label: str) -> str:
        """Why measures of `label` failed, in one line; "" when none did."""
        rows = [s for m in MEASURES if (s := self.score(label, m)) and self.value(label, m) is None]
        reasons: dict[str, list[str]] = {}
        for row in rows:
            reasons.setdefault(" ".join(row.error.split()) or f"the value is {row.value}", []).append(row.measure)
        return "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())

    @property
    def removals(self) -> list[str]:
        return [label for label in self.archs if label != TEACHER]

    @property
    def measures(self) -> list[str]:
        """The measured quantities that have a row, those of quality first."""
        return [m for m in (*quality(), *names("timing")) if any(self.score(label, m) for label in self.archs)]

    @property
    def main_measure(self) -> str | None:
        """The first quality measure that has a value for a removal; None when there is none."""
        return next((m for m in quality() if any(self.value(label, m) is not None for label in self.removals)), None)


class Correlation(NamedTuple):
    """Kendall's tau-b of two measures over `n` removals; 1 when both rank quality alike."""

    tau: float
    n: int


def short(label: str) -> str:
    """A readable short name: "down_blocks.1.resnets.0" => "down 1 R0", "full" => "teacher"; a label of another kind as it is."""
    if label == TEACHER:
        return "teacher"
    words = label.split(".")
    if words[0] not in PATHS:
        return label
    stage = [PATHS[words[0]], *words[1:2]] if words[0] != "mid_block" else ["mid"]
    rest = words[2:] if words[0] != "mid_block" else words[1:]
    pairs = list(zip(rest[::2], rest[1::2], strict=False))
    last = rest[len(pairs) * 2 :]
    return " ".join([*stage, *(f"{PARTS[part]}{i}" if part in PARTS else f"{part} {i}" for part, i in pairs), *last])


def ranked(view: ScanView, measure: str | None = None) -> list[str]:
    """The removals that have a value, from the least to the most quality lost.

    `measure` None means the main one; without any quality measure the order is by parameters saved, most first.
    """
    by = measure or view.main_measure
    if by is None:
        return sorted(view.removals, key=lambda label: view.graph.cost(view.archs[label]).params)
    values = {label: v for label in view.removals if (v := view.value(label, by)) is not None}
    return sorted(values, key=lambda label: MEASURES[by].loss(values[label]))


def ranking(view: ScanView) -> list[dict[str, Any]]:
    """One flat row per architecture: the teacher (rank 0), then from least to most quality lost, then the unscored (rank None).

    `_low` and `_high` bound 95 % intervals; `_delta` is the difference to the teacher on the same seeds, with its own interval.
    `macs_thop` and `macs_saved_thop` count one U-Net step at batch 1; `latency` is the teacher's step in seconds, `latency_ratio`
    that of a removal over it, timed in turn; below 1 is faster.
    """
    return [_row(view, rank, label) for rank, label in places_of(view)]


def places_of(view: ScanView) -> list[tuple[int | None, str]]:
    """(rank, label) in the order of the ranking."""
    order = ranked(view)
    scored = set(order)
    failed = [label for label in view.removals if label not in scored]
    failed.sort(key=lambda label: bool(view.error(label)))
    return [(0, TEACHER), *enumerate(order, 1), *((None, label) for label in failed)]


def _row(view: ScanView, rank: int | None, label: str) -> dict[str, Any]:
    arch = view.archs[label]
    total, cost = view.graph.total, view.graph.cost(arch)
    row: dict[str, Any] = {"rank": rank, "label": label, "arch": arch.key, "removed": arch.terms}
    for m in view.measures:
        score = view.score(label, m)
        row |= flat_score(m, score)
        if MEASURES[m].of_quality and not MEASURES[m].paired:
            deltas = (score.delta, score.delta_low, score.delta_high) if score else (None,) * 3
            row |= dict(zip((f"{m}_delta", f"{m}_delta_low", f"{m}_delta_high"), deltas, strict=True))
    row |= {"params": cost.params, "params_saved": total.params - cost.params}
    row |= {"macs_thop": cost.thop, "macs_saved_thop": total.thop - cost.thop}
    return row | {"error": view.error(label)}


def rank_correlation(view: ScanView, first: str, second: str) -> Correlation | None:
    """Kendall's tau-b between two measures over the removals that have both; None for fewer than three or when one is constant."""
    common = [n for n in ranked(view, first) if view.value(n, second) is not None]
    if len(common) < 3:
        return None
    tau = kendall_tau(*([MEASURES[m].loss(view.value(n, m) or 0.0) for n in common] for m in (first, second)))
    return Correlation(tau, len(common)) if tau is not None else None
