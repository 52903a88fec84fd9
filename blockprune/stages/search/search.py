"""Stage: the best removal set under a budget, found with few evaluations."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import numpy as np

from blockprune.measures.runner import FULL
from blockprune.measures.score import Score
from blockprune.model.architecture import Architecture
from blockprune.runs.records import EXACT, GIVEN, PRESET, SCAN, Candidate, Evaluation
from blockprune.stages.search.bounds import Bounding, no_bounds
from blockprune.stages.search.proposals import Proposer
from blockprune.stages.search.space import Choice, Space
from blockprune.stages.search.trials import Trials

POLL_S = 0.2


class Objective(Protocol):
    """A score of an architecture on the first n samples, all of them when None."""

    def __call__(self, arch: Architecture, label: str, n: int | None = None) -> Score: ...


class Candidates(Protocol):
    """Where candidates come from: the next to score, given what is scored and which architectures are known; [] for none now."""

    def candidates(self, evaluations: Sequence[Evaluation], known: Collection[str]) -> list[Candidate]: ...


@dataclass
class Strategy:
    """First every unit alone; then what is `given`, the exact best sums of those scores, and the presets that fit; then what a
    sampler proposes and, in turn with it, neighbours of the best.

    `space` holds the budgets that every candidate is held against; `spaces` are where candidates are sought: that one alone, or
    for a front one for each step of its sweep. Without `scan` no unit is scored alone and all are taken for alike. `teacher` scores
    the full model as well, for measures that are not zero for it.
    """

    space: Space
    spaces: Sequence[Space]
    presets: Mapping[str, Architecture]
    sampler: str = "tpe"
    seed: int = 0
    n_exact: int = 8
    scan: bool = True
    teacher: bool = False
    given: Mapping[str, Architecture] = field(default_factory=dict)
    _proposers: list[Proposer] = field(default_factory=list)
    _second: list[Candidate] | None = None

    def candidates(self, evaluations: Sequence[Evaluation], known: Collection[str]) -> list[Candidate]:
        """The next to be scored; [] while others are at what comes first, or when all there is is known."""
        if alone := [c for c in self.alone() if c.arch.key not in known]:
            return alone
        if (losses := self._losses(evaluations)) is None:
            return []
        if self._second is None:
            given = [self.of(arch, GIVEN, name) for name, arch in self.given.items()]
            self._second = [*given, *self._exact(losses), *self.known_designs()]
            self._proposers = [Proposer(s, self.sampler, self.seed + i, losses) for i, s in enumerate(self.spaces)]
        if second := [c for c in self._second if c.arch.key not in known]:
            return second
        return self._proposed(evaluations, known)

    def solutions(self, evaluations: Sequence[Evaluation]) -> list[tuple[Candidate, float]]:
        """The exact best sums of the units' scores under every budget, with those sums; [] while a unit has no score."""
        losses = self._losses(evaluations)
        found = {c.arch: c for c in ([] if losses is None else self._exact(losses))}
        return [(c, sum(losses[label] for label, gone in c.params.items() if gone)) for c in found.values() if losses is not None]

    def _exact(self, losses: Mapping[str, float]) -> list[Candidate]:
        return [self.candidate(choice, EXACT) for space in self.spaces for choice in space.best(losses, self.n_exact)]

    def alone(self) -> list[Candidate]:
        """The units one by one, and the teacher where it is needed."""
        singles = [self.candidate(frozenset({label}), SCAN, label) for label in self.space.labels] if self.scan else []
        full = [self.candidate(frozenset(), SCAN, FULL)] if self.teacher else []
        return [*full, *singles]

    def known_designs(self) -> list[Candidate]:
        """The presets that fit somewhere."""
        fitting = {name: arch for name, arch in self.presets.items() if any(space.holds(arch) for space in self.spaces)}
        return [self.of(arch, PRESET, name) for name, arch in fitting.items()]

    def _losses(self, evaluations: Sequence[Evaluation]) -> dict[str, float] | None:
        """What each unit loses alone, above the teacher; None while some are not scored. One that failed loses more than any."""
        labels = self.space.labels
        if not self.scan:
            return dict.fromkeys(labels, 1.0)
        by_key = {e.candidate.arch.key: e.loss for e in evaluations}
        keys = {label: unit.key for label, unit in self.space.units.items()}
        if any(key not in by_key for key in keys.values()) or (self.teacher and Architecture().key not in by_key):
            return None
        base = by_key.get(Architecture().key, 0.0) if self.teacher else 0.0
        losses = {label: by_key[key] - base for label, key in keys.items()}
        most = max((abs(x) for x in losses.values() if x < float("inf")), default=1.0)
        return {label: min(x, 10 * most) for label, x in losses.items()}

    def _proposed(self, evaluations: Sequence[Evaluation], known: Collection[str]) -> list[Candidate]:
        """One proposal for each budget, in turn from one call to the next."""
        turn = len(known) % len(self.spaces)
        for proposer in self._proposers[turn:] + self._proposers[:turn]:
            proposer.tell(evaluations)
            if (proposal := proposer.ask(known)) is not None:
                source, choice = proposal
                return [self.candidate(choice, source)]
        return []

    @property
    def cached(self) -> int:
        """How many proposals ended at an architecture that was known, and cost nothing."""
        return sum(proposer.cached for proposer in self._proposers)

    def candidate(self, choice: Choice, source: str, label: str = "") -> Candidate:
        return self.of(self.space.arch(choice), source, label)

    def of(self, arch: Architecture, source: str, label: str = "") -> Candidate:
        """`arch` as a candidate, with its exact costs; named after its hash when it has no other name."""
        space = self.space
        choice = space.choice(arch)
        params = {} if choice is None else {label: label in choice for label in space.labels}
        cost = space.graph.cost(arch)
        costs = {"params": cost.params, "macs_thop": cost.thop} | ({"latency_s": space.latency(arch)} if space.latency_s else {})
        return Candidate(arch, label or f"{source}-{arch.key[:6]}", source, params, space.over(arch), costs)


@dataclass
class Chance:
    """Sets drawn at random: units in random order go until the budget holds. What a search is compared with."""

    strategy: Strategy
    seed: int

    def candidates(self, evaluations: Sequence[Evaluation], known: Collection[str]) -> list[Candidate]:
        space = self.strategy.space
        for attempt in range(100):
            draw = np.random.default_rng([self.seed, len(known), attempt])
            order = {label: float(x) for label, x in zip(space.labels, draw.permutation(len(space.labels)), strict=True)}
            choice = space.drawn(sorted(order, key=order.__getitem__))
            if choice is not None and space.arch(choice).key not in known:
                return [self.strategy.candidate(choice, "random")]
        return []


@dataclass(frozen=True)
class Listed:
    """Candidates that are given beforehand: the finalists."""

    listed: Sequence[Candidate]

    def candidates(self, evaluations: Sequence[Evaluation], known: Collection[str]) -> list[Candidate]:
        return [c for c in self.listed if c.arch.key not in known]


@dataclass(frozen=True)
class Tiers:
    """Cheap before dear: an objective on few samples first, on all for those that may still be among the best `rank`.

    An architecture stops at a tier when its interval there is clear above that of the `rank`-th best at the same tier.
    """

    objective: Objective
    sizes: Sequence[int]
    rank: int = 8

    def __call__(self, candidate: Candidate, evaluations: Sequence[Evaluation]) -> tuple[Score, ...]:
        """The scores at every tier that was reached; the last one counts."""
        scores: list[Score] = []
        rivals = sorted((e for e in evaluations if len(e.tiers) == len(self.sizes) and e.fits), key=lambda e: e.loss)
        for i, n in enumerate(self.sizes):
            scores.append(self.objective(candidate.arch, candidate.label, n))
            if scores[-1].value is None or (len(rivals) >= self.rank and scores[-1].clearly_worse(rivals[self.rank - 1].tiers[i])):
                break
        return tuple(scores)


def search(
    trials: Trials,
    source: Candidates,
    score: Callable[[Candidate, Sequence[Evaluation]], tuple[Score, ...]],
    n_trials: int | None = None,
    bounded: Bounding = no_bounds,
    picture: Callable[[Candidate], bytes | None] = lambda candidate: None,
) -> Iterator[Evaluation]:
    """Scores candidates until `n_trials` architectures are known or there are no more, and yields those that this process scored.

    `bounded` measures what must hold besides; `picture` gives a PNG to go with a trial. Others may work on the same trials; this
    ends when nobody is at work any more.
    """
    while True:
        trials.recover()
        if (trial := trials.claim(n_trials)) is not None:
            with trials.beating(trial):
                scores = score(trials.candidate(trial), trials.evaluations())
                bounds = bounded(trials.candidate(trial), scores)
                if (png := picture(trials.candidate(trial))) is not None:
                    trials.attach(trial, png)
            if (done := trials.finish(trial, scores, bounds)) is not None:
                yield done
            continue
        known = trials.expected()
        if n_trials is None or len(known) < n_trials:
            new = source.candidates(trials.evaluations(), known)
            trials.add(new)
            if new:
                continue
        if not trials.busy():
            return
        time.sleep(POLL_S)


def finalists(
    evaluations: Sequence[Evaluation], spaces: Sequence[Space], k: int, holds: Callable[[Candidate], bool] = lambda candidate: True
) -> list[Candidate]:
    """The `k` best of every space, and every preset and given architecture that one of them holds.

    `holds` has the last word about a budget that can only be predicted before; it is asked from the best on, of 6 k at most.
    """
    chosen: dict[str, Candidate] = {}
    for space in spaces:
        inside = [e for e in evaluations if e.score.value is not None and space.holds(e.candidate.arch)]
        order = [e.candidate for e in sorted(inside, key=lambda e: (not e.fits, e.loss))]
        best = islice((c for c in order[: 6 * k] if holds(c)), k)
        known = (c for c in order if c.source in (PRESET, GIVEN))
        chosen |= {c.arch.key: c for c in [*best, *known]}
    return list(chosen.values())
