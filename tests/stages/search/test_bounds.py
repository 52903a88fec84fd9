"""What must hold besides the measure that is made best."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blockprune.errors import UserError
from blockprune.measures.score import Score
from blockprune.model.architecture import Architecture
from blockprune.runs.records import BoundCheck, Candidate, Evaluation
from blockprune.stages.search.bounds import FAILED, Bounded, read_bound, read_objective
from blockprune.stages.search.halving import survivors
from blockprune.stages.search.request import SearchRequest
from blockprune.stages.search.search import finalists
from blockprune.stages.search.storage import open_storage
from blockprune.stages.search.trials import Trials

BOUND = "clip_score>=0.5"
ASKED = {"objective": "guided_mse"}


def candidate(i: int, over: dict[str, float] | None = None) -> Candidate:
    return Candidate(Architecture(frozenset({f"down_blocks.{i}.resnets.1"})), str(i), "tpe", {}, over or {}, {})


def score(c: Candidate, value: float | None, measure: str = "guided_mse") -> Score:
    return Score(c.arch.key, c.label, measure, value, 8, 0)


def evaluation(i: int, loss: float, excess: float) -> Evaluation:
    c = candidate(i, {"65%params": -0.1})
    return Evaluation(i, c, (score(c, loss),), 0.0, 0.0, bounds=(BoundCheck(BOUND, excess, score(c, 0.5, "clip_score")),))


class Everything:
    """A space that holds whatever it is asked about."""

    def holds(self, arch: Architecture) -> bool:
        return True


@pytest.mark.parametrize(
    ("text", "value", "excess"),
    [
        ("clip_score>=0.5", 0.6, -0.2),
        ("clip_score >= 0.5", 0.4, 0.2),
        ("clip_score>=-0.5", -0.6, 0.2),
        ("fid<=20", 25.0, 0.25),
        ("fid<=20", 20.0, 0.0),
        ("fid<=20", None, FAILED),
    ],
)
def test_excess_is_relative_and_positive_where_the_bound_is_broken(text: str, value: float | None, excess: float) -> None:
    bound = read_bound(text)
    assert bound.excess(score(candidate(0), value, bound.measure)) == pytest.approx(excess)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ("vibes", "unknown --objective 'vibes'"),
        ("clip_score>=0.5", "unknown --objective 'clip_score>=0.5'"),
        ("guided_mse,clip_score", "cannot read the bound 'clip_score'"),
        ("guided_mse,params<=3", "cannot read the bound 'params<=3'"),
        ("guided_mse,clip_score>=high", "'high' is no number"),
        ("guided_mse,clip_score>=nan", "'nan' is no number"),
        ("guided_mse,clip_score<=0.5", "clip_score is better when higher; write clip_score>=0.5"),
        ("guided_mse,fid>=20", "fid is better when lower; write fid<=20"),
    ],
)
def test_what_cannot_be_read_is_one_line(objective: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        SearchRequest(budget=("65%params",), objective=objective)  # type: ignore[arg-type]


def test_the_first_is_made_best_and_the_others_hold() -> None:
    measure, bounds = read_objective(["guided_mse", "clip_score>=0.5", "fid<=20"])
    assert (measure, [b.text for b in bounds]) == ("guided_mse", ["clip_score>=0.5", "fid<=20"])


def test_only_what_may_win_is_measured() -> None:
    asked = list[str]()

    def measured(arch: Architecture, label: str) -> Score:
        asked.append(label)
        return score(candidate(int(label)), 0.4, "clip_score")

    bounded = Bounded([(read_bound(BOUND), measured)], n_tiers=2)
    good = candidate(0, {"65%params": -0.1})
    (check,) = bounded(good, [score(good, 1.0)] * 2)
    assert (check.text, check.score.value) == (BOUND, 0.4)
    assert check.excess == pytest.approx(0.2)
    large, stopped, failed = candidate(1, {"65%params": 0.1}), candidate(2), candidate(3)
    assert not bounded(large, [score(large, 1.0)] * 2)
    assert not bounded(stopped, [score(stopped, 1.0)])
    assert not bounded(failed, [score(failed, 1.0), score(failed, None)])
    assert asked == ["0"]


def test_trials_keep_what_was_measured_as_constraints_of_optuna() -> None:
    trials = Trials(open_storage(None, None), "s", "guided_mse", ASKED)
    trials.add([candidate(0, {"65%params": -0.1})])
    trial = trials.claim()
    assert trial is not None
    check = BoundCheck(BOUND, 0.2, score(candidate(0), 0.4, "clip_score"))
    done = trials.finish(trial, (score(candidate(0), 1.0),), [check])
    assert trials.trials()[0].constraints == {"65%params": -0.1, BOUND: 0.2}
    (kept,) = trials.evaluations()
    for e in (done, kept, Evaluation.from_json(kept.to_json())):
        assert e is not None
        assert e.bounds == (check,)
        assert e.candidate.over == {"65%params": -0.1}
        assert e.candidate.fits
        assert not e.fits


def test_what_holds_comes_first_among_finalists_and_goes_on_after_recovery() -> None:
    evaluations = [evaluation(0, 0.1, 0.3), evaluation(1, 0.4, -0.1), evaluation(2, 0.2, 0.1), evaluation(3, 0.3, -0.2)]
    assert [c.label for c in finalists(evaluations, [Everything()], 3)] == ["3", "1", "0"]  # type: ignore[list-item]
    assert [c.label for c in survivors(evaluations)] == ["3"]
    broken = [replace(e, bounds=(replace(e.bounds[0], excess=0.1),)) for e in evaluations]
    assert [c.label for c in survivors(broken)] == ["0"]
