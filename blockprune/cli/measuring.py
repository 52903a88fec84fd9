"""What `scan` and `search` share: from options to a plan of measurement, and the terms under which its numbers compare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from blockprune.cli import options
from blockprune.runs.records import MEASURES

if TYPE_CHECKING:
    from blockprune.measures.examiner import Plan
    from blockprune.measures.images import Judges
    from blockprune.stages.inputs import Bench

N_PICTURES = 6


def plan_of(bench: Bench, opts: Mapping[str, Any], measures: Sequence[str] | None) -> Plan:
    """The plan that the options say: of `measures`, or of all that have what they need."""
    from blockprune.measures.examiner import DENOISING, Plan
    from blockprune.measures.images import check_judges
    from blockprune.model.sampling import Protocol, check_schedule
    from blockprune.stages import inputs

    batch_size = options.at_least("--batch-size", opts["batch_size"], 1)
    n_noisy = options.at_least("--eps-samples", opts["eps_samples"], 1)
    protocol = Protocol(opts["n_images"], opts["steps"], opts["cfg_scale"], opts["seed"], bench.latent, opts["scheduler"])
    check_schedule(bench.pipe, protocol)
    prompts = inputs.prompts_of(opts["prompts"], bench)
    judges = inputs.judges_of(bench, *(opts[name] for name in ("detector", "inception_weights", "clip", "reference")))
    measures = measures or [m for m in possible(judges) if m != "guided_mse" or opts["cfg_scale"] > 1]
    check_judges(measures, judges)
    wanted = any(m in DENOISING for m in measures)
    clean = inputs.clean_latents(bench, opts["data"], n_noisy, batch_size) if wanted else None
    return Plan(measures, protocol, prompts, n_noisy, clean, judges, batch_size, min(N_PICTURES, protocol.n_images))


def possible(judges: Judges) -> list[str]:
    """Every measure that has the judge it needs."""
    from blockprune.measures.images import lacks

    return [name for name in MEASURES if not lacks(name, judges)]


def terms(bench: Bench, opts: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Everything that changes a number, and nothing else: two runs with equal terms may share their rows."""
    from blockprune.stages import inputs

    same = ("model", "n_images", "steps", "cfg_scale", "scheduler", "seed", "eps_samples", "dtype")
    asked = {name: opts[name] for name in same}
    asked |= {"teacher": bench.identity, "latent": bench.latent, "device": bench.pipe.device.type}
    asked |= {"prompts": inputs.fingerprint(plan.prompts), **inputs.describe(plan.judges)}
    return asked | {"data": opts["data"] or "the teacher's own samples"}
