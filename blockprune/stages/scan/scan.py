"""Stage: score the teacher and every removal without retraining."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from blockprune.cost import latency
from blockprune.cost.components import unet_inputs
from blockprune.measures.denoising import denoising_errors
from blockprune.measures.images import failed, judge, stack
from blockprune.measures.measure import names
from blockprune.measures.runner import FULL, Arrays, MeasureRunner, Plan, check_kept, compared, error_score
from blockprune.measures.score import Score
from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.model.model import Model
from blockprune.model.sampling import NotFinite

TIMESTEPS = "timesteps"  # the part that says at which timestep each noisy sample is


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


@dataclass(frozen=True)
class Part:
    """Work done that later rows are computed from; the caller keeps it and `recall` gives it back to a resumed scan."""

    name: str
    arrays: Arrays


@dataclass(frozen=True)
class Picture:
    """The first images of one architecture, (k, H, W, 3) uint8, at the same seeds and prompts for all."""

    label: str
    images: NDArray[np.uint8]


Record = Score | Part | Picture


class Scan:
    """One scan: a model, labelled removals, a plan, and what an earlier attempt left.

    `done` holds the (label, measure) pairs that have a row already; `recall` returns the arrays of a Part, or None. Denoising
    errors are also compared, sample by sample, with those of the architecture labelled `base`, where there is one.
    """

    def __init__(
        self,
        model: Model,
        archs: Mapping[str, Architecture],
        plan: Plan,
        done: Collection[tuple[str, str]] = (),
        recall: Callable[[str], Arrays | None] = lambda name: None,
        base: str = "",
        by_timestep: bool = False,
    ) -> None:
        plan.judges.check(plan.image_measures)
        self.model, self.plan = model, plan
        self.runner = MeasureRunner(model, plan)
        self.archs = {FULL: Architecture(), **archs}
        self.done, self.recall, self.base, self.by_timestep = set(done), recall, base, by_timestep
        self.parts: dict[str, Arrays] = {}

    def __iter__(self) -> Iterator[Record]:
        """Costs at once; the teacher; what is fitted; the denoising errors of all; timings; the images of each, in this order."""
        yield from self._new(self._costs())
        yield from self._teacher()
        self._fit()
        for measure in names("denoising"):
            yield from self._denoising(measure)
        if self.by_timestep and self.plan.denoising_measures and self._part(TIMESTEPS) is None:
            yield self._made(TIMESTEPS, {"timestep": self.runner.noisy(self._part("teacher") or {}).timesteps.numpy()})
        yield from self._speed()
        yield from self._images()

    def _new(self, scores: Iterable[Score]) -> Iterator[Score]:
        return (s for s in scores if s.measure in self.plan.measures and (s.label, s.measure) not in self.done)

    def _missing(self, measures: Iterable[str]) -> dict[str, list[str]]:
        """label => those of the measures that have no row yet."""
        wanted = [m for m in measures if m in self.plan.measures]
        missing = {label: [m for m in wanted if (label, m) not in self.done] for label in self.archs}
        return {label: left for label, left in missing.items() if left}

    def _costs(self) -> Iterator[Score]:
        for label, arch in self.archs.items():
            yield from cost_scores(self.model.graph, arch, label, self.model.dtype.itemsize, self.plan.protocol.seed)

    @property
    def _fits(self) -> bool:
        return any(arch.fits for arch in self.archs.values())

    def _fit(self) -> None:
        """From here on what is fitted has its weights."""
        if self._fits:
            self.model = replace(self.model, fits=self.runner.fitter(self._part("teacher") or {}))
            self.runner = MeasureRunner(self.model, self.plan)

    def _teacher(self) -> Iterator[Record]:
        """The teacher's images, unless nothing is measured on images and the denoising error has data of its own."""
        needed = self.plan.image_measures or ((self.plan.denoising_measures or self._fits) and self.plan.clean is None)
        if not needed or self._part("teacher") is not None:
            return
        seen, pictures = self.runner.teacher()
        yield Picture(FULL, pictures)
        yield self._made("teacher", seen)

    def _part(self, name: str) -> Arrays | None:
        """A part of this scan or of an earlier attempt at it; None when it is still to be made."""
        if name not in self.parts and (kept := self.recall(name)) is not None:
            if name == "teacher":
                self.parts[name] = check_kept(name, kept, self.plan.observed, self.plan.protocol.n_images)
            elif name == TIMESTEPS:
                self.parts[name] = check_kept(name, kept, {"timestep": ()}, self.plan.n_noisy)
            else:
                self.parts[name] = check_kept(name, kept, dict.fromkeys((label for label in self.archs if label != FULL), ()))
        return self.parts.get(name)

    def _made(self, name: str, arrays: Arrays) -> Part:
        self.parts[name] = arrays
        return Part(name, arrays)

    def _denoising(self, measure: str) -> Iterator[Record]:
        if not any(label != FULL for label in self._missing([measure])):
            return
        plan, parts = self.plan, list[Arrays]()
        archs = {label: self.archs[label] for label in self.archs if label != FULL}
        while (part := self._part(f"{measure}-{len(parts):05d}")) is not None:
            parts.append(part)
        start = sum(len(next(iter(part.values()))) for part in parts)
        samples = self.runner.noisy(self._part("teacher") or {}, measure)
        model = self.model
        for batch in denoising_errors(model.network, model.graph, archs, samples, plan.batch_size, start, fits=model.fits):
            yield self._made(f"{measure}-{len(parts):05d}", batch)
            parts.append(batch)
            plan.tick(measure, len(next(iter(batch.values()))) * len(archs))
        errors = stack(parts)
        for label in archs:  # in the scan's order: a part that was read back has its own
            score = error_score(measure, archs[label], label, errors[label], plan.protocol.seed)
            base = errors.get(self._base_of(label))
            yield from self._new([score if base is None else compared(score, errors[label], base)])

    def _base_of(self, label: str) -> str:
        """What an architecture is compared with: the base, with the same fits where those are scanned."""
        fitted = f"{self.base}~{label.partition('~')[2]}"
        return fitted if fitted in self.archs else self.base

    def _speed(self) -> Iterator[Score]:
        """Step latency and memory at batch 1, each architecture in turn with the teacher, round by round."""
        unet, plan = self.model.network, self.plan
        inputs = unet_inputs(unet.config, plan.protocol.latent, self.model.graph.n_tokens, 1, unet.device, unet.dtype)
        for label, arch in self.archs.items():
            wanted = [m for m in speed_measures(label) if m in plan.measures and (label, m) not in self.done]
            if not wanted:
                continue
            models: dict[str, latency.Model] = {
                FULL: partial(surgery.removed, unet, Architecture()),
                label: partial(surgery.removed, unet, arch),
            }
            memory = [label] if "memory" in wanted else []
            timings = latency.measure(models, inputs, plan.n_timings, 2, unet.device, memory)
            yield from (s for s in step_scores(arch, label, timings, plan.protocol.seed) if s.measure in wanted)
            plan.tick("latency", 1)

    def _images(self) -> Iterator[Record]:
        missing = self._missing(names("images"))
        if not missing:
            return
        plan, teacher = self.plan, self._part("teacher") or {}
        for label, measures in missing.items():
            arch = self.archs[label]
            row = (arch.key, label)
            try:
                seen, pictures = (teacher, None) if label == FULL else self.runner.observe(arch, label)
                scores = list(judge(*row, plan.image_measures, seen, teacher, plan.judges, plan.protocol.seed))
            except NotFinite as err:
                yield from self._new(failed(*row, measures, plan.protocol.n_images, plan.protocol.seed, str(err)))
                continue
            if pictures is not None:
                yield Picture(label, pictures)
            yield from self._new(scores)
