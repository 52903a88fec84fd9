"""Successive halving among finalists."""

from __future__ import annotations

import pytest
from optuna.pruners import NopPruner

from blockprune.measures.score import Score
from blockprune.model.architecture import Architecture
from blockprune.runs.records import Candidate, Evaluation
from blockprune.stages.search.halving import survivors, updates_of


def evaluation(i: int, value: float | None, measure: str = "eps_mse") -> Evaluation:
    arch = Architecture(frozenset({f"down_blocks.{i}.resnets.1"}))
    score = Score(arch.key, str(i), measure, value, 8, 0)
    return Evaluation(i, Candidate(arch, str(i), "tpe", {}, {}, {}), (score,), 0.0, 0.0)


@pytest.mark.parametrize("measure", ["eps_mse", "clip_score"])
def test_the_best_third_goes_on_best_first(measure: str) -> None:
    values = [0.5, 0.2, None, 0.9, 0.1, 0.4, 0.3, 0.8, 0.7, 0.6]
    going = [c.label for c in survivors([evaluation(i, v, measure) for i, v in enumerate(values)])]
    assert going == (["4", "1", "6"] if measure == "eps_mse" else ["3", "7", "8"])


@pytest.mark.parametrize(("n", "left"), [(1, 1), (2, 1), (3, 1), (4, 1), (9, 3)])
def test_of_few_one_goes_on(n: int, left: int) -> None:
    assert len(survivors([evaluation(i, float(i)) for i in range(n)])) == left


def test_another_pruner_may_decide() -> None:
    assert len(survivors([evaluation(i, float(i)) for i in range(9)], NopPruner())) == 9
    assert survivors([evaluation(0, None)]) == []


def test_updates_are_counted_before_the_start() -> None:
    assert updates_of(9, (50, 200, 800)) == 9 * 50 + 3 * 150 + 1 * 600
    assert updates_of(4, (200,)) == 800
    assert updates_of(4, ()) == 0
