"""Which finalists are worth more updates: successive halving (arXiv 1502.07943), by Optuna's pruner."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import optuna
from optuna.pruners import BasePruner, PercentilePruner
from optuna.trial import TrialState, create_trial

from blockprune.runs.records import Candidate, Evaluation

SHARE = 1 / 3  # of the finalists that go on


def best_third() -> BasePruner:
    """Prunes what is worse than a third of all that were tried."""
    return PercentilePruner(100 * SHARE, n_startup_trials=0)


def survivors(evaluations: Sequence[Evaluation], pruner: BasePruner | None = None) -> list[Candidate]:
    """Those that the pruner lets go on, best first; it sees the ranks of all after the same updates, what
    breaks a bound last, none of what failed."""
    sound = sorted((e for e in evaluations if e.score.value is not None), key=lambda e: (not e.fits, e.loss))
    study = optuna.create_study(pruner=pruner or best_third())
    study.add_trials([create_trial(value=rank, intermediate_values={0: rank}) for rank in range(len(sound))])
    going = list[Candidate]()
    for rank, e in enumerate(sound):
        trial = study.ask()
        trial.report(rank, step=0)
        if not trial.should_prune():
            going.append(e.candidate)
        study.tell(trial, state=TrialState.FAIL)
    return going


def updates_of(n: int, recover: Sequence[int]) -> int:
    """How many updates a recovery of `n` finalists takes in all, at most."""
    total = 0
    for before, updates in pairwise((0, *recover)):
        total += n * (updates - before)
        n = math.ceil(n * SHARE)
    return total
