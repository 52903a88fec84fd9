"""What `evaluate` measures of a U-Net beside its images: step latency in turn with the teacher's, and the component table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from blockprune.cli import outputs
from blockprune.cost import latency
from blockprune.cost.components import (
    component_costs,
    component_title,
    pipeline_costs,
    random_unet,
    time_components,
    unet_inputs,
    unet_part,
)
from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.runs.directory import Run
from blockprune.runs.records import Score
from blockprune.stages.evaluate.protocol import Setting

if TYPE_CHECKING:
    from blockprune.cli.job import Job


def measure_all(job: Job, out: Run, unet_of: Callable[[Setting], Any]) -> None:
    """Appends the rows that the options ask for and that are not there yet."""
    if job.opts["latency"]:
        _latency(job, out, unet_of)
    if job.opts["components"] and not any(row["kind"] == "component" for row in out.rows()):
        for row in _components(job, unet_of(job.settings[0])):
            out.append(row)


def _teacher(job: Job) -> Any:
    """A U-Net of the teacher's shape for timing; None where the teacher is not known."""
    s = job.subject
    return random_unet(s.configs.unet, Architecture(), s.pipe.device, s.pipe.vae.dtype) if s.graph else None


def _latency(job: Job, out: Run, unet_of: Callable[[Setting], Any]) -> None:
    """Step latency at batch 1: measured once for each U-Net, and a row for each setting that it serves."""
    timed = {row["setting"] for row in out.rows() if row["kind"] == "score" and row["measure"] == "latency"}
    groups: dict[tuple[str, int | None], list[Setting]] = {}
    for setting in job.settings:
        if setting.label not in timed:
            groups.setdefault((setting.quantize, setting.checkpoint), []).append(setting)
    teacher = _teacher(job) if groups else None
    for settings in groups.values():
        for measure, row in _timed(job, unet_of(settings[0]), teacher).items():
            for setting in settings:
                score = Score(job.arch(setting).key, job.label, measure, row[0], job.opts["rounds"], job.opts["seed"], *row[1:])
                out.append({"kind": "score", "setting": setting.label, **score.to_json()})


def _timed(job: Job, unet: Any, teacher: Any) -> dict[str, tuple[Any, ...]]:
    """measure => value and, where there is one, its interval; the latency last, which marks that the others are there."""
    s = job.subject
    inputs = unet_inputs(s.configs.unet, s.latent, s.configs.n_tokens, 1, s.pipe.device, s.pipe.vae.dtype)
    models: dict[str, latency.Model] = {} if teacher is None else {"teacher": partial(surgery.removed, teacher, Architecture())}
    models["student"] = partial(surgery.removed, unet, Architecture())
    found = latency.measure(models, inputs, job.opts["rounds"], 2, s.pipe.device)
    own = found["student"]
    rows: dict[str, tuple[Any, ...]] = {"memory": (own.mem_bytes,)}
    if teacher is not None:
        rows["latency_ratio"] = latency.ratio(found["teacher"], own)
    return rows | {"latency": (own.median_s, *latency.median_interval(own.latency_s))}


def _components(job: Job, unet: Any) -> list[Mapping[str, Any]]:
    """Each part and the whole: the teacher beside the student; one that lacks nothing stands alone, as the teacher."""
    s, steps = job.subject, job.settings[0].steps
    arch = job.arch(job.settings[0])
    others = pipeline_costs(s.configs, s.latent)
    if s.graph is None:  # a stock folder that does not say what it was cut from
        costs = {"student": unet_part(s.configs, Architecture(), s.latent).count()[""]}
    else:
        costs = {"teacher": s.graph.total} | ({"student": s.graph.cost(arch)} if arch else {})
    nets: dict[str, tuple[Any, Architecture]] = {who: (unet, Architecture()) for who in costs}
    if s.graph is not None and arch:
        nets["teacher"] = (_teacher(job), Architecture())
    timings = time_components(s.configs, nets, s.latent, steps, job.opts["rounds"])
    return [
        outputs.component_row(component_title(name, steps), who, cost, timings[name][who].median_s)
        for who, unet_cost in costs.items()
        for name, cost in component_costs(others, unet_cost, steps).items()
        if steps > 1 or name != "unet_steps"
    ]
