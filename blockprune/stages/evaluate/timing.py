"""What `evaluate` measures of a network beside its images: step latency in turn with the teacher's, and the component table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from diffusers import UNet2DConditionModel

from blockprune.cost import latency
from blockprune.cost.components import pipeline_costs, random_unet, time_components, unet_inputs, unet_part
from blockprune.cost.table import Component, components
from blockprune.measures.score import Score
from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.stages.evaluate.plan import EvaluationPlan
from blockprune.stages.evaluate.protocol import Setting

Row = Mapping[str, Any]
NetworkOf = Callable[[Setting], UNet2DConditionModel]


def rows(plan: EvaluationPlan, there: Sequence[Row], network_of: NetworkOf, tick: Callable[[], None]) -> Iterator[Row]:
    """The rows that the request asks for and that are not there yet; `tick` hears of each network that was timed."""
    for group in _networks(plan, there):
        yield from _latency(plan, group, network_of)
        tick()
    if _lacks_components(plan, there):
        for component in _components(plan, network_of(plan.settings[0])):
            yield {"kind": "component", **component.to_json()}
        tick()


def n_timings(plan: EvaluationPlan, there: Sequence[Row]) -> int:
    """How often `rows` ticks."""
    return len(_networks(plan, there)) + _lacks_components(plan, there)


def _lacks_components(plan: EvaluationPlan, there: Sequence[Row]) -> bool:
    return plan.request.components and not any(row["kind"] == "component" for row in there)


def _networks(plan: EvaluationPlan, there: Sequence[Row]) -> list[list[Setting]]:
    """The settings whose network has no latency yet, those of one network together."""
    timed = {row["setting"] for row in there if row["kind"] == "score" and row["measure"] == "latency"}
    groups: dict[tuple[str, int | None], list[Setting]] = {}
    for setting in plan.settings if plan.request.latency else ():
        if setting.label not in timed:
            groups.setdefault((setting.quantize, setting.checkpoint), []).append(setting)
    return list(groups.values())


def _teacher(plan: EvaluationPlan) -> UNet2DConditionModel:
    """A network of the teacher's shape for timing; None where the teacher is not known."""
    model = plan.model
    return random_unet(plan.subject.configs.unet, Architecture(), model.device, model.dtype) if plan.subject.graph else None


def _latency(plan: EvaluationPlan, group: Sequence[Setting], network_of: NetworkOf) -> Iterator[Row]:
    """Step latency at batch 1 of one network, and a row for each setting that it serves."""
    request = plan.request
    for measure, found in _timed(plan, network_of(group[0]), _teacher(plan)).items():
        for setting in group:
            row = (plan.arch(setting).key, request.title)
            score = Score(*row, measure, found[0], request.rounds, request.seed, *found[1:])
            yield {"kind": "score", "setting": setting.label, **score.to_json()}


def _timed(plan: EvaluationPlan, network: UNet2DConditionModel, teacher: UNet2DConditionModel) -> dict[str, tuple[Any, ...]]:
    """measure => value and, where there is one, its interval; the latency last, which marks that the others are there."""
    model, configs = plan.model, plan.subject.configs
    inputs = unet_inputs(configs.unet, model.latent, configs.n_tokens, 1, model.device, model.dtype)
    models: dict[str, latency.Model] = {} if teacher is None else {"teacher": partial(surgery.removed, teacher, Architecture())}
    models["student"] = partial(surgery.removed, network, Architecture())
    found = latency.measure(models, inputs, plan.request.rounds, 2, model.device)
    own = found["student"]
    values: dict[str, tuple[Any, ...]] = {"memory": (own.mem_bytes,)}
    if teacher is not None:
        values["latency_ratio"] = latency.ratio(found["teacher"], own)
    return values | {"latency": (own.median_s, *latency.median_interval(own.latency_s))}


def _components(plan: EvaluationPlan, network: UNet2DConditionModel) -> Iterator[Component]:
    """Each part and the whole: the teacher beside the student; one that lacks nothing stands alone, as the teacher."""
    s, latent, steps = plan.subject, plan.model.latent, plan.settings[0].steps
    arch = plan.arch(plan.settings[0])
    if s.graph is None:  # a stock folder that does not say what it was cut from
        costs = {"student": unet_part(s.configs, Architecture(), latent).count()[""]}
    else:
        costs = {"teacher": s.graph.total} | ({"student": s.graph.cost(arch)} if arch else {})
    nets: dict[str, tuple[UNet2DConditionModel, Architecture]] = {who: (network, Architecture()) for who in costs}
    if s.graph is not None and arch:
        nets["teacher"] = (_teacher(plan), Architecture())
    timings = time_components(s.configs, nets, latent, steps, plan.request.rounds)
    return components(pipeline_costs(s.configs, latent), costs, steps, timings)
