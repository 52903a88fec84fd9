"""How long a run of any stage will take, before it begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from blockprune.cost.estimate import Estimate, assumed, measured
from blockprune.cost.work import Work
from blockprune.model.device import device_of
from blockprune.request import Request
from blockprune.stages.evaluate.request import EvaluateRequest
from blockprune.stages.evaluate.work import model_of
from blockprune.stages.evaluate.work import work as evaluate_work
from blockprune.stages.outline import Outline, outline_of
from blockprune.stages.personalise.request import PersonaliseRequest
from blockprune.stages.personalise.work import work as personalise_work
from blockprune.stages.scan.request import ScanRequest
from blockprune.stages.scan.work import work as scan_work
from blockprune.stages.search.request import SearchRequest
from blockprune.stages.search.work import work as search_work
from blockprune.stages.train.request import TrainRequest
from blockprune.stages.train.work import work as train_work

WORKS: dict[type[Request], Callable[[Any, Outline], Work]] = {
    ScanRequest: scan_work,
    SearchRequest: search_work,
    TrainRequest: train_work,
    EvaluateRequest: evaluate_work,
    PersonaliseRequest: personalise_work,
}


def estimate(request: Request, assume: str | None = None) -> Estimate:
    """How long a scan, search, distillation, evaluation or personalisation will take, its passes, memory and disk; nothing is run.

    A pass is measured on this device for about two seconds, with random weights, or reckoned from what is stated of the device
    `assume`, such as "H100 fp16". Raises UserError where the run would before it begins, and for a device that is not known.

    >>> import blockprune as bp
    >>> from blockprune.stages.scan.request import ScanRequest
    >>> asked = ScanRequest(model="sd-v1-4", unit="stage", measures=("eps_mse",), data="photos", batch_size=8, eps_samples=64)
    >>> bp.estimate(asked, assume="H100 fp16").work.n_passes
    88
    """
    outline = outline_of(*_network(request))
    work = WORKS[type(request)](request, outline)
    if assume is not None:
        return assumed(work, outline.configs, outline.graph, assume)
    device, dtype = device_of(getattr(request, "device", None)), getattr(torch, getattr(request, "dtype", "float32"))
    return measured(work, outline.configs, outline.graph, device, dtype)


def _network(request: Any) -> tuple[str, str | None]:
    """The model that a request is about, and its resolution."""
    if isinstance(request, TrainRequest):
        return request.teacher[0], request.resolution
    if isinstance(request, EvaluateRequest):
        return model_of(request), request.resolution
    return request.model, request.resolution
