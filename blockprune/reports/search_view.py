"""What a search found, read back as one value, and what follows from it: the choice, its rivals, the front. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockprune.errors import UserError
from blockprune.measures.score import TEACHER, Score
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph, Cost
from blockprune.runs.records import PRESET, SCAN, Evaluation, deaf


@dataclass(frozen=True)
class SearchView:
    """What a search directory says.

    `search` are the evaluations in the order of trials, `random` those of random sets for comparison (none unless asked for),
    `finals` those of the finalists on fresh seeds, `recovered` those of finalists after a short distillation (none unless asked
    for; then these decide), `heard` how finalists and designs by hand follow captions with fits in place of their blocks. `limits`
    are the budgets: text => (quantity, limit for the U-Net alone). `scores` holds timings and image measures of finalists, by label
    then measure; `images` maps a label to (k, H, W, 3) uint8 images at common seeds, captioned by `prompts`.
    """

    protocol: Mapping[str, Any]
    graph: BlockGraph
    outside_params: int
    limits: Mapping[str, tuple[str, float]]
    search: Sequence[Evaluation]
    random: Sequence[Evaluation]
    finals: Sequence[Evaluation]
    recovered: Sequence[Evaluation]
    heard: Sequence[Evaluation]
    scores: Mapping[str, Mapping[str, Score]]
    images: Mapping[str, NDArray[np.uint8]]
    prompts: Sequence[str]

    @property
    def measure(self) -> str:
        return str(self.protocol["objective"])

    @property
    def convention(self) -> str:
        return str(self.protocol["macs"])

    def cost(self, e: Evaluation) -> Cost:
        return self.graph.cost(e.candidate.arch)

    @property
    def scope(self) -> str:
        """What parameters are counted of, in this search and wherever it is shown: "whole pipeline" or "U-Net"."""
        return "U-Net" if self.protocol.get("scope") == "unet" else "whole pipeline"

    def params(self, cost: Cost) -> int:
        """The parameters of a U-Net of that cost, in the scope of the search."""
        return cost.params + (0 if self.scope == "U-Net" else self.outside_params)

    def share(self, e: Evaluation, quantity: str) -> float:
        """What an architecture has of the teacher's parameters (in the search's scope), MACs in the run's convention, or step
        latency: measured, else as the search predicted it, NaN where it did not."""
        if quantity == "params":
            return self.params(self.cost(e)) / self.params(self.graph.total)
        if quantity == "latency":
            return self.latency_ratio(e) or self.predicted_ratio(e) or math.nan
        return self.cost(e).macs(self.convention) / self.graph.total.macs(self.convention)

    def latency_ratio(self, e: Evaluation) -> float | None:
        """Measured step latency over the teacher's; None when it was not measured."""
        score = self.scores.get(e.score.label, {}).get("latency_ratio")
        return score.value if score else None

    def predicted_ratio(self, e: Evaluation) -> float | None:
        """The step latency over the teacher's that the search expected; None where it expected none."""
        full, seconds = self.scores.get(TEACHER, {}).get("latency"), e.candidate.costs.get("latency_s")
        return seconds / full.value if full and full.value and seconds else None

    def holds(self, e: Evaluation) -> bool:
        """True when every budget holds, latency by measurement where there is one, and so does what else was asked to hold."""
        full, ratio = self.scores.get(TEACHER, {}).get("latency"), self.latency_ratio(e)
        if full is None or full.value is None or ratio is None:
            return self.judged(e).fits
        seconds = full.value * ratio
        return self.judged(e).keeps_bounds and all(
            seconds <= self.limits[text][1] if self.limits[text][0] == "latency" else excess <= 0
            for text, excess in e.candidate.over.items()
        )

    @property
    def n_taken_over(self) -> int:
        """How many evaluations another run had made: they took no time here."""
        return sum(e.seconds == 0 for e in self.search)

    @property
    def seconds(self) -> float:
        """What scoring took, all processes together, from the first architecture to the last finalist."""
        return sum(e.seconds for kind in (self.search, self.random, self.heard, self.finals, self.recovered) for e in kind)

    @property
    def bounds(self) -> list[str]:
        """What was asked to hold besides the budgets, such as clip_score>=0.7."""
        return list(self.protocol.get("bounds", ()))

    @cached_property
    def ranked(self) -> list[Evaluation]:
        """The finalists that hold the budgets, best first on fresh seeds; after recovery where there was one, what got most
        updates first."""
        sound = [e for e in self.finals if self.holds(e) and e.score.value is not None]
        return sorted(sound, key=self._rank)

    def _rank(self, e: Evaluation) -> tuple[bool, int, float]:
        last = self.judged(e)
        return last.score.value is None, -last.updates, last.loss

    def judged(self, e: Evaluation) -> Evaluation:
        """What decides about a finalist: its score after recovery, else the one on fresh seeds."""
        return self.after(e) or e

    def after(self, e: Evaluation) -> Evaluation | None:
        """What a finalist scored after recovery, with as many updates as it got; None when it was not recovered."""
        recovered = (r for r in self.recovered if r.candidate.arch == e.candidate.arch)
        return max(recovered, key=lambda r: r.updates, default=None)

    @property
    def stops(self) -> list[int]:
        """The numbers of updates after which finalists were compared."""
        return sorted({e.updates for e in self.recovered})

    @property
    def is_front(self) -> bool:
        """True for a sweep without any budget: among architectures of all sizes none is the best, only a front."""
        return bool(self.protocol["pareto"]) and not self.limits

    @property
    def chosen(self) -> list[Evaluation]:
        """What the search answers: the winner, or the front, smallest first. Raises UserError when there is none."""
        if not self.is_front:
            return [self.best]
        if not (front := self.front(str(self.protocol["pareto"]))):
            raise UserError(f"no finalist has a score ({len(self.finals)} tried): raise --trials")
        return front

    @property
    def order(self) -> list[Evaluation]:
        """Every finalist: what the search answers first, then what holds the budgets by score, then the others."""
        first = self.chosen if self.is_front else self.ranked
        return [*first, *(e for e in self.ranked if e not in first), *(e for e in self.finals if e not in [*first, *self.ranked])]

    @property
    def left_out(self) -> list[Evaluation]:
        """What scored well enough for a finalist, but hardly hears the prompt."""
        finals = {e.candidate.arch for e in self.finals}
        return [e for e in deaf(self.heard) if e.candidate.arch not in finals]

    def hearing(self, e: Evaluation) -> Evaluation | None:
        """How a finalist follows captions with fits, where it follows them worse than the designs by hand; None otherwise."""
        return next((h for h in deaf(self.heard) if h.candidate.arch == e.candidate.arch), None)

    def caption(self, e: Evaluation | None) -> Score | None:
        """How well images follow their captions, the teacher's for None; None where nothing measured it."""
        return self.scores.get(e.score.label if e else TEACHER, {}).get("clip_score")

    @property
    def best(self) -> Evaluation:
        """The winner of the finals. Raises UserError when no finalist holds the budgets, or there is none to hold."""
        if self.is_front:
            raise UserError("a front without a budget has no best: choose by pareto.json, or give a budget")
        if not self.ranked:
            measured = "as measured " if any(q == "latency" for q, _ in self.limits.values()) else ""
            bounded = f" and {', '.join(self.bounds)}" if self.bounds else ""
            raise UserError(
                f"no finalist holds the budgets{bounded} {measured}({len(self.finals)} tried{self._nearest}): raise the budget or "
                f"--trials{', or ask for less' if bounded else ''}"
            )
        return self.ranked[0]

    @property
    def _nearest(self) -> str:
        """What of each bounded measure the finalists reached, in words."""
        seen = [check.score for e in self.finals for check in self.judged(e).bounds if check.score.value is not None]
        best = {
            name: min((s for s in seen if s.measure == name), key=lambda s: s.loss)
            for name in dict.fromkeys(s.measure for s in seen)
        }
        return "".join(f", the best {name} is {score.value:.4g}" for name, score in best.items())

    @property
    def nearest_preset(self) -> Evaluation | None:
        """The preset among the finalists whose parameters are nearest to the winner's; None for a front."""
        if self.is_front:
            return None
        known = [e for e in self.finals if e.candidate.source == PRESET and e.candidate.arch != self.best.candidate.arch]
        return min(known, key=lambda e: abs(self.cost(e).params - self.cost(self.best).params), default=None)

    def against(self, preset: Evaluation) -> Evaluation | None:
        """The best finalist no larger than a preset in what is budgeted, other than a preset; None when there is none."""
        ours = [e for e in self.finals if e.candidate.source != PRESET and e.score.value is not None]
        small = [e for e in ours if all(self.share(e, q) <= self.share(preset, q) for q in self.quantities)]
        return min(small, key=lambda e: self.judged(e).loss, default=None)

    @property
    def quantities(self) -> list[str]:
        """What is budgeted: parameters, MACs or latency."""
        swept = [self.protocol["pareto"]] if self.protocol["pareto"] else []
        return list(dict.fromkeys([*(quantity for quantity, _ in self.limits.values()), *swept]))

    @property
    def quantity(self) -> str:
        """What quality is shown against."""
        return str(self.protocol["pareto"] or next(iter(self.quantities), "params"))

    def frequency(self) -> dict[str, float]:
        """unit => the share in which it is removed among the best tenth of what fits."""
        fitting = sorted((e for e in self.search if e.fits and e.candidate.params), key=lambda e: e.loss)
        top = fitting[: max(1, math.ceil(len(fitting) / 10))]
        labels = top[0].candidate.params if top else {}
        return {label: sum(e.candidate.params[label] for e in top) / len(top) for label in labels}

    def front(self, quantity: str) -> list[Evaluation]:
        """What no other finalist beats in both the measure and the quantity, smallest first."""
        front: list[Evaluation] = []
        sound = [e for e in self.finals if e.score.value is not None and self.judged(e).keeps_bounds]
        for e in sorted(sound, key=lambda e: (self.share(e, quantity), e.loss)):
            if not front or e.loss < front[-1].loss:
                front.append(e)
        return front

    @property
    def knee(self) -> Evaluation | None:
        """Where the front bends most: the finalist furthest below the line between its ends, both axes scaled to these; None where
        there is none below."""
        front = self.front(self.quantity)
        if len(front) < 3:
            return None
        sizes, losses = ([value(e) for e in front] for value in (lambda e: self.share(e, self.quantity), lambda e: e.loss))
        x, y = ((np.array(v) - v[-1]) / (v[0] - v[-1]) for v in (sizes, losses))
        return front[int(np.argmin(y - x))] if (y - x).min() < 0 else None

    @property
    def known_designs(self) -> list[Evaluation]:
        """The presets among the finalists."""
        return [e for e in self.finals if e.candidate.source == PRESET]

    def losses(self) -> dict[Architecture, float]:
        """What each single removal scored, for the colours of the drawing."""
        return {e.candidate.arch: e.score.value for e in self.search if e.candidate.source == SCAN and e.score.value is not None}


def history(evaluations: Sequence[Evaluation]) -> list[float]:
    """The best loss so far after each evaluation, infinite while nothing fits."""
    best, out = math.inf, list[float]()
    for e in evaluations:
        best = min(best, e.loss) if e.fits else best
        out.append(best)
    return out
