"""The phases of a recipe as they will run."""

from __future__ import annotations

import pytest
import tiny

from blockprune.errors import UserError
from blockprune.model.presets import preset
from blockprune.model.trace import trace
from blockprune.stages.train.phases import planned
from blockprune.stages.train.recipe import Phase, Recipe
from blockprune.stages.train.request import TrainRequest

GRAPH = trace(tiny.config("sd1"))


def test_one_phase_is_the_whole_run() -> None:
    (phase,) = planned(Recipe(), TrainRequest(arch="bk-sdm-small", max_train_steps=7), GRAPH)
    assert (phase.teacher, phase.arch, phase.first, phase.last) == ("tiny-digits", preset("bk-sdm-small"), 0, 7)
    assert phase.to_json() == {"teacher": "tiny-digits", "arch": list(preset("bk-sdm-small")), "first": 0, "last": 7}


def test_open_phases_share_what_is_left_and_the_last_of_them_takes_the_rest() -> None:
    recipe = Recipe(phases=(Phase(None, None, "bk-sdm-base"), Phase(2, "other"), Phase()))
    found = planned(recipe, TrainRequest(arch="bk-sdm-small", teacher=("one",), max_train_steps=9), GRAPH)
    assert [(p.teacher, p.first, p.last) for p in found] == [("one", 0, 3), ("other", 3, 5), ("other", 5, 9)]
    assert [p.arch for p in found] == [preset("bk-sdm-base"), preset("bk-sdm-small"), preset("bk-sdm-small")]


def test_several_teachers_are_a_phase_each() -> None:
    found = planned(Recipe(), TrainRequest(arch="mid-removed", teacher=("one", "two"), max_train_steps=5), GRAPH)
    assert [(p.teacher, p.first, p.last) for p in found] == [("one", 0, 2), ("two", 2, 5)]
    with pytest.raises(UserError, match="name the teachers in the recipe's phases"):
        planned(Recipe(phases=(Phase(), Phase())), TrainRequest(arch="mid-removed", teacher=("one", "two")), GRAPH)
