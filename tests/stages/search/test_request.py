"""What a search makes best where nothing is asked for."""

from __future__ import annotations

import pytest

from blockprune.model.defaults import defaults_of
from blockprune.stages.search.request import SearchRequest


@pytest.mark.parametrize(
    ("model", "given", "best"),
    [
        ("tiny-digits", {}, "feature_distance"),  # has a detector of its own
        ("CompVis/stable-diffusion-v1-4", {}, "guided_mse"),
        ("CompVis/stable-diffusion-v1-4", {"detector": "inception"}, "feature_distance"),
        ("CompVis/stable-diffusion-v1-4", {"reference": "photos"}, "feature_distance"),
        ("tiny-digits", {"objective": ("eps_mse",)}, "eps_mse"),
    ],
)
def test_the_objective_is_what_there_is_to_look_with(model: str, given: dict[str, str], best: str) -> None:
    request = SearchRequest(model=model, budget=("65%params",), **given)
    request.check()
    assert request.filled(defaults_of(model)).measure == best
