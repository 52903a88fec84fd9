"""Who still hears the prompt, by what a student with fits draws."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blockprune.measures.runner import MeasureRunner
from blockprune.measures.score import Score
from blockprune.model.architecture import Architecture
from blockprune.model.model import Model, load_model
from blockprune.runs.records import PRESET, Candidate, Evaluation, deaf
from blockprune.stages.fields import Measuring
from blockprune.stages.plan import plan_of
from blockprune.stages.search.hearing import Hearing


def heard(label: str, low: float, high: float, source: str = "tpe", measure: str = "clip_score") -> Evaluation:
    arch = Architecture(frozenset({label}))
    score = Score(arch.key, label, measure, (low + high) / 2, 64, 0, low, high)
    return Evaluation(0, Candidate(arch, label, source, {}, {}, {}), (score,), 0.0, 0.0)


def labels(evaluations: list[Evaluation]) -> list[str]:
    return [e.candidate.label for e in deaf(evaluations)]


def test_deaf_is_who_is_worse_than_every_design_beyond_the_intervals() -> None:
    designs = [heard("base", 0.6, 0.7, PRESET), heard("tiny", 0.2, 0.3, PRESET)]
    assert labels([*designs, heard("a", 0.0, 0.1), heard("b", 0.1, 0.21), heard("c", 0.4, 0.5)]) == ["a"]
    assert labels([heard("a", 0.0, 0.1)]) == []
    errors = [heard("tiny", 0.2, 0.3, PRESET, "guided_mse"), heard("a", 0.4, 0.5, measure="guided_mse")]
    assert labels([*errors, heard("b", 0.0, 0.1, measure="guided_mse")]) == ["a"]
    lost = heard("c", 0.0, 0.1)
    assert labels([*designs, replace(lost, tiers=(replace(lost.score, value=None, low=None, high=None),))]) == ["c"]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("tiny-digits")


@pytest.mark.parametrize("cfg_scale", [3.0, 1.0])
def test_what_hearing_is_scored_by(model: Model, cfg_scale: float) -> None:
    asked = Measuring(n_images=32, steps=4, cfg_scale=cfg_scale, eps_samples=64).filled(model.defaults)
    plan = plan_of(model, asked, ["eps_mse"])
    deafened = replace(plan, judges=replace(plan.judges, scorer=None))
    assert Hearing(model, plan, {}).measure == "clip_score"
    assert Hearing(model, deafened, {}).measure == ("guided_mse" if cfg_scale > 1 else "")
    if cfg_scale == 1:
        return
    fitting = replace(model, fits=MeasureRunner(model, plan).fitter({}))
    where_heard = Architecture(frozenset({"mid_block", "down_blocks.2.attentions.0"}))  # where captions are heard
    elsewhere = Architecture(frozenset({"down_blocks.3.resnets.0", "down_blocks.3.resnets.1"}))
    for of in (plan, deafened):
        (lost,), (kept,) = (Hearing(fitting, of, {})(Candidate(a, "a", "tpe", {}, {}, {})) for a in (where_heard, elsewhere))
        assert lost.arch == where_heard.key
        assert lost.clearly_worse(kept)
