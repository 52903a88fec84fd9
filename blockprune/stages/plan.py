"""What scan, search and training measure with: from a request to a plan, and the terms under which its numbers compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from blockprune.measures.images import Judges
from blockprune.measures.measure import MEASURES, measure
from blockprune.measures.runner import Plan
from blockprune.model import sampling
from blockprune.model.model import Model
from blockprune.runs.provenance import fingerprint
from blockprune.stages import loading
from blockprune.stages.fields import Measuring

N_PICTURES = 6
OWN_SAMPLES = "the teacher's own samples"


def plan_of(model: Model, request: Measuring, measures: Sequence[str]) -> Plan:
    """The plan of a filled request: of `measures`, or of all that have what they need where there are none."""
    n_images, steps, cfg_scale = request.n_images or 1, request.steps or 1, request.cfg_scale or 0.0
    batch_size, n_noisy = request.batch_size or 1, request.eps_samples or 1
    protocol = sampling.Protocol(n_images, steps, cfg_scale, request.seed, model.latent, request.scheduler or "")
    sampling.check_schedule(model.pipe, protocol)
    judges = loading.judges_of(model, request.detector, request.inception_weights, request.clip, request.reference)
    judges = loading.with_subject(judges, model, request).with_own(measures)
    measures = measures or possible(judges, guided=cfg_scale > 1)
    judges.check(measures)
    denoises = any(measure(name).kind == "denoising" for name in measures)
    clean = loading.clean_latents(model, request.data, n_noisy, batch_size) if denoises else None
    prompts = loading.prompts_of(request.prompts, model)
    return Plan(measures, protocol, prompts, n_noisy, clean, judges, batch_size, min(N_PICTURES, n_images))


def possible(judges: Judges, guided: bool) -> list[str]:
    """Every measure that has what it needs."""
    looking = {m.name for m in judges.own}
    computable = (m for m in MEASURES.values() if m.computable and (m.look is None or m.name in looking))
    return [m.name for m in computable if not judges.lacks(m.name) and (guided or "guidance" not in m.needs)]


def terms(model: Model, plan: Plan, data: str | None) -> dict[str, Any]:
    """What changes numbers besides the request's own fields: two runs with equal fields and terms may share their rows."""
    of_model = {"teacher": model.identity, "latent": list(model.latent), "device": model.device.type}
    return of_model | {"prompts": fingerprint(plan.prompts), **loading.describe(plan.judges), "data": data or OWN_SAMPLES}


def pictured(plan: Plan) -> list[str]:
    """The prompts of the images that are kept."""
    return [plan.prompts[i % len(plan.prompts)] for i in range(plan.n_pictures)]
