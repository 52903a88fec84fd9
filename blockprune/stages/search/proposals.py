"""What to score next: what an Optuna sampler asks for, or a neighbour of the best, repaired to the budget, never the same twice."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property
from operator import itemgetter

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from blockprune.errors import UserError
from blockprune.runs.records import Evaluation
from blockprune.stages.search.space import Choice, Space

KEPT = "kept"
PATIENCE = 16
JITTER = 0.5
N_BEST = 5
SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=1),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed, n_startup_trials=1),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=20),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}


def sampler_of(name: str, seed: int) -> BaseSampler:
    """The sampler of that name; UserError lists those there are."""
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}: choose from {', '.join(SAMPLERS)}")
    return SAMPLERS[name](seed % 2**32)  # NumPy's older generator, which Optuna draws from, takes no larger ones


class Proposer:
    """Asks a sampler over the units of a space and, every other time, looks around the best that is known.

    It has a study of its own in memory, so that the shared one holds no trial but what was scored, and proposes again for free
    where repair ends at an architecture that is known.

    `scores` are what the removal of each unit alone loses; repair goes by them.
    """

    def __init__(self, space: Space, sampler: str, seed: int, scores: Mapping[str, float]) -> None:
        self.space, self.scores, self.draw = space, scores, np.random.default_rng(seed)
        self.study = optuna.create_study(sampler=sampler_of(sampler, seed))
        self.cached = 0
        self._asked: dict[Choice, Trial] = {}
        self._told: set[int] = set()
        self._best: list[tuple[float, Choice]] = []
        self.name, self._turn = sampler, 0

    def tell(self, evaluations: Iterable[Evaluation]) -> None:
        """Lets the sampler learn of scores, its own proposals' and others'."""
        for e in evaluations:
            if e.trial in self._told or not e.candidate.params:
                continue
            self._told.add(e.trial)
            state = TrialState.COMPLETE if e.score.value is not None else TrialState.FAIL
            choice = frozenset(label for label, on in e.candidate.params.items() if on)
            if state == TrialState.COMPLETE and self.space.holds(e.candidate.arch) and e.keeps_bounds:
                self._best = sorted([*self._best, (e.loss, choice)], key=itemgetter(0))[:N_BEST]
            asked = self._asked.pop(choice, None)
            if asked is not None:
                for check in e.bounds:
                    asked.set_constraint(check.text, check.excess)
                self.study.tell(asked, e.loss if state == TrialState.COMPLETE else None, state=state)
            elif state == TrialState.COMPLETE:
                self.study.add_trial(self._trial(e))

    def ask(self, known: Collection[str]) -> tuple[str, Choice] | None:
        """Where it comes from, and a choice within the budget whose architecture is not among the `known` keys; None for none.

        Where repair to a smallest set keeps ending at what is known, larger sets and then random ones are tried.
        """
        self._turn += 1
        if self._turn % 2 == 0 and (near := self._neighbour(known)) is not None:
            return "near", near
        asked = self._sampled(known)
        return None if asked is None else (self.name, asked)

    def _neighbour(self, known: Collection[str]) -> Choice | None:
        """One of the best with one to three units changed, repaired; None when nothing new is found."""
        for _ in range(PATIENCE if self._best else 0):
            base = self._best[self.draw.integers(len(self._best))][1]
            changed = self.draw.permutation(self.space.labels)[: self.draw.integers(1, 4)]
            choice = self.space.repair(base ^ frozenset(changed.tolist()), self._jittered(JITTER))
            if choice is not None and self.space.arch(choice).key not in known:
                return choice
            self.cached += choice is not None
        return None

    def _sampled(self, known: Collection[str]) -> Choice | None:
        """What the sampler asks for, repaired."""
        for attempt in range(PATIENCE):
            trial = self.study.ask()
            wanted = (trial.suggest_categorical(name, [KEPT, *labels]) for name, labels in self.space.choices.items())
            asked = [label for label in wanted if label != KEPT]
            scores, minimal = self._jittered(JITTER * (1 + attempt / 5)), attempt < PATIENCE // 2
            choice = self.space.repair(asked, scores, minimal)
            if choice is not None and self.space.arch(choice).key not in known:
                self._asked[choice] = self._corrected(trial, choice)
                return choice
            self.study.tell(trial, state=TrialState.FAIL)
            self.cached += choice is not None
        drawn = (self.space.repair(self._subset(), self._jittered(JITTER), minimal=False) for _ in range(4 * PATIENCE))
        return next((c for c in drawn if c is not None and self.space.arch(c).key not in known), None)

    def _subset(self) -> list[str]:
        """Units at random, as many as it happens."""
        share = self.draw.random()
        return [label for label in self.space.labels if self.draw.random() < share]

    def _jittered(self, sigma: float) -> dict[str, float]:
        """The scores with log-normal noise, so that repair does not send all that is asked to one place."""
        noise = np.exp(sigma * self.draw.standard_normal(len(self.scores)))
        return {label: score * float(f) for (label, score), f in zip(self.scores.items(), noise, strict=True)}

    def _corrected(self, trial: Trial, choice: Choice) -> Trial:
        """The trial as if the sampler had proposed what repair made of it."""
        values, kinds = self._values(choice), self._distributions
        for name, value in values.items():
            trial.storage.set_trial_param(trial._trial_id, name, kinds[name].to_internal_repr(value), kinds[name])
        for text, excess in self.space.over(self.space.arch(choice)).items():
            trial.set_constraint(text, excess)
        return trial

    def _trial(self, e: Evaluation) -> FrozenTrial:
        values = self._values([label for label, on in e.candidate.params.items() if on])
        over = self.space.over(e.candidate.arch) | {check.text: check.excess for check in e.bounds}
        return create_trial(value=e.loss, params=values, distributions=dict(self._distributions), constraints=over)

    @cached_property
    def _distributions(self) -> dict[str, CategoricalDistribution]:
        """What the sampler chooses for each block: that it stays, goes, or goes with a fit in its place."""
        return {name: CategoricalDistribution([KEPT, *labels]) for name, labels in self.space.choices.items()}

    def _values(self, choice: Collection[str]) -> dict[str, str]:
        return {name: next((c for c in labels if c in choice), KEPT) for name, labels in self.space.choices.items()}
