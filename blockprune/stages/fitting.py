"""The weights that are fitted in place of an architecture's blocks, where nothing is trained."""

from __future__ import annotations

from pathlib import Path

from blockprune.measures.runner import MeasureRunner
from blockprune.model.architecture import Architecture
from blockprune.model.fit import Weights
from blockprune.model.model import Model
from blockprune.stages.fields import Measuring
from blockprune.stages.plan import plan_of


def fitted_weights(model: Model, arch: Architecture, data: str | Path | None = None) -> Weights:
    """The fitted weights of an architecture, none for one without fits: on noisy samples of `data`, a folder of images; of the
    model's own data, or of images that it draws, where that is None."""
    if not arch.fits:
        return {}
    request = Measuring(data=None if data is None else str(data)).filled(model.defaults)
    with model.undisturbed():
        runner = MeasureRunner(model, plan_of(model, request, ["eps_mse"]))
        return runner.fitter({} if runner.plan.clean else runner.teacher()[0])(arch)
