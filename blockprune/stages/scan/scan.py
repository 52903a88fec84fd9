"""Stage: score the teacher and every removal without retraining. What a scan computes, piece by piece; no piece knows of others."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from blockprune.cost import latency
from blockprune.cost.components import unet_inputs
from blockprune.measures.denoising import denoising_errors
from blockprune.measures.images import judge
from blockprune.measures.measure import names
from blockprune.measures.runner import FULL, Arrays, Images, MeasureRunner, Plan, compared, error_score
from blockprune.measures.score import Score
from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.model.model import Model

Batches = Iterable[Sequence[int]]


def cost_scores(graph: BlockGraph, arch: Architecture, label: str, itemsize: int, seed: int) -> Iterator[Score]:
    """What needs no measurement: parameters, MACs, and the bytes of the weights at `itemsize` each."""
    cost = graph.cost(arch)
    for name, value in {"params": cost.params, "macs": cost.thop, "weight_bytes": cost.params * itemsize}.items():
        yield Score(arch.key, label, name, value, 0, seed)


def step_scores(arch: Architecture, label: str, timings: Mapping[str, latency.Timing], seed: int) -> Iterator[Score]:
    """`speed_measures` of an architecture from its timings beside the teacher's."""
    own, speed = timings[label], speed_measures(label)[0]
    alone = label == FULL
    value, low, high = (own.median_s, *latency.median_interval(own.latency_s)) if alone else latency.ratio(timings[FULL], own)
    yield Score(arch.key, label, speed, value, len(own.latency_s), seed, low, high)
    yield Score(arch.key, label, "memory", own.mem_bytes, 1, seed)


def speed_measures(label: str) -> tuple[str, str]:
    """What is measured of a step: the teacher's seconds, the ratio of any other to a teacher timed in turn with it; memory."""
    return ("latency" if label == FULL else "latency_ratio"), "memory"


def timings(model: Model, archs: Mapping[str, Architecture], plan: Plan, done: Collection[tuple[str, str]]) -> Iterator[Score]:
    """Step latency and memory at batch 1 of the teacher and of `archs`, each in turn with the teacher, round by round.

    Only the plan's measures, and none of the (label, measure) pairs that are `done`.
    """
    unet = model.network
    inputs = unet_inputs(unet.config, plan.protocol.latent, model.graph.n_tokens, 1, unet.device, unet.dtype)
    for label, arch in {FULL: Architecture(), **archs}.items():
        wanted = [m for m in speed_measures(label) if m in plan.measures and (label, m) not in done]
        if not wanted:
            continue
        models: dict[str, latency.Model] = {
            FULL: partial(surgery.removed, unet, Architecture()),
            label: partial(surgery.removed, unet, arch),
        }
        memory = [label] if "memory" in wanted else []
        timed = latency.measure(models, inputs, plan.n_timings, 2, unet.device, memory)
        yield from (s for s in step_scores(arch, label, timed, plan.protocol.seed) if s.measure in wanted)
        plan.tick("latency", 1)


@dataclass(frozen=True)
class Scan:
    """A model, labelled removals and a plan: what is seen of any batch of samples, and the scores of all that was seen.

    Denoising errors are also compared, sample by sample, with those of the architecture labelled `base`, where there is one.
    """

    model: Model
    removals: Mapping[str, Architecture]
    plan: Plan
    base: str = ""

    def __post_init__(self) -> None:
        self.plan.judges.check(self.plan.image_measures)

    @cached_property
    def archs(self) -> dict[str, Architecture]:
        """What is scored by its label, the teacher first."""
        return {FULL: Architecture(), **self.removals}

    @cached_property
    def runner(self) -> MeasureRunner:
        return MeasureRunner(self.model, self.plan)

    @property
    def fits(self) -> bool:
        """True where something is fitted."""
        return any(arch.fits for arch in self.removals.values())

    def measures_of(self, label: str) -> list[str]:
        """The measures that an architecture gets rows of."""
        never = [*names("denoising")] if label == FULL else []
        never += [m for m in names("timing") if m not in speed_measures(label)]
        return [m for m in self.plan.measures if m not in never]

    @property
    def needs_teacher(self) -> bool:
        """False when nothing is measured on images and denoising errors have data of their own."""
        plan = self.plan
        return bool(plan.image_measures) or (bool(plan.denoising_measures or self.fits) and plan.clean is None)

    def fitted(self, teacher: Arrays) -> Scan:
        """The scan in which what is fitted has its weights."""
        return replace(self, model=replace(self.model, fits=self.runner.fitter(teacher))) if self.fits else self

    def costs(self) -> Iterator[Score]:
        for label, arch in self.archs.items():
            yield from cost_scores(self.model.graph, arch, label, self.model.dtype.itemsize, self.plan.protocol.seed)

    def images(self, label: str, batches: Batches) -> Iterator[tuple[Arrays, Images]]:
        """What judges see of the images of each batch, and (N, H, W, 3) the images. Only the teacher's latents are kept."""
        for index, seen, images in self.runner.look(self.archs[label], label, batches):
            kept = {name: values for name, values in seen.items() if label == FULL or name != "latents"}
            yield {**kept, "index": np.array(index, dtype=np.int64)}, images

    def errors(self, measure: str, teacher: Arrays, batches: Batches) -> Iterator[Arrays]:
        """The denoising errors of each batch: "errors" (N, removals), a column for each removal in order."""
        model, samples = self.model, self.runner.noisy(teacher, measure)
        for index in batches:
            errors = denoising_errors(model.network, model.graph, self.removals, samples, index, fits=model.fits)
            yield {"errors": np.stack(list(errors.values()), 1), "index": np.array(index, dtype=np.int64)}
            self.plan.tick(measure, len(index) * len(self.removals))

    def error_scores(self, measure: str, errors: NDArray[np.float64]) -> Iterator[Score]:
        """The denoising error of every removal, from (n, removals) errors of all samples."""
        of = dict(zip(self.removals, errors.T, strict=True))
        for label, arch in self.removals.items():
            score = error_score(measure, arch, label, of[label], self.plan.protocol.seed)
            base = of.get(self._base_of(label))
            yield score if base is None else compared(score, of[label], base)

    def _base_of(self, label: str) -> str:
        """What an architecture is compared with: the base, with the same fits where those are scanned."""
        fitted = f"{self.base}~{label.partition('~')[2]}"
        return fitted if fitted in self.removals else self.base

    def timesteps(self, teacher: Arrays) -> Arrays:
        """At which timestep each noisy sample is."""
        return {"timestep": self.runner.noisy(teacher).timesteps.numpy()}

    def image_scores(self, label: str, measures: Sequence[str], seen: Arrays, teacher: Arrays) -> Iterable[Score]:
        """The measures of images of one architecture, from what was seen of its images and of as many of the teacher's."""
        return judge(self.archs[label].key, label, measures, seen, teacher, self.plan.judges, self.plan.protocol.seed)
