"""What a search will do at most, counted from its request; what its candidates are shows only as it goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from pathlib import Path

import torch

from blockprune.cost.components import outside_params
from blockprune.cost.work import Passes, Work, recorded_bytes, share
from blockprune.measures.measure import measure
from blockprune.measures.runner import N_TIMINGS
from blockprune.model.architecture import Architecture
from blockprune.stages.counts import WARMUP, Counts
from blockprune.stages.outline import TRAINED, Outline
from blockprune.stages.search.halving import SHARE, updates_of
from blockprune.stages.search.problem import SWEEP, Problem
from blockprune.stages.search.request import SearchRequest
from blockprune.stages.search.run import N_CALIBRATIONS, scores_in
from blockprune.stages.search.worker import as_scored, tier_sizes
from blockprune.stages.train.recover import TIMED

UNKNOWN = 0.7  # the share of a network that is left where only a measured latency says what may go
FLOAT = 4


def work(request: SearchRequest, outline: Outline) -> Work:
    """The whole of a search by one worker, at most. UserError for budgets that nothing meets."""
    request = request.filled(outline.defaults)
    problem = Problem(outline.graph, request, outside_params(outline.configs))
    if not problem.timed:
        problem.check()
    sought = _Sought(request, outline, problem, Counts.of(outline, request))
    passes = list(sought.passes())
    itemsize = getattr(torch, request.dtype).itemsize
    kept = min(2**31, recorded_bytes(outline.graph, 2 * sought.counts.n_noisy * request.final_factor, itemsize))
    params = outline.graph.total.params
    training = params * FLOAT * (TRAINED + 1) if request.recover else 0
    decoded = sum(n for step, n in sought.images().items())
    disk_bytes = outline.image_bytes(decoded) + (sought.n_finals * params * FLOAT * TRAINED if request.recover else 0)
    mem_bytes = outline.scoring_bytes(passes, itemsize) + kept + training
    return Work(passes, decoded, 0, mem_bytes, disk_bytes, at_most=True)


@dataclass(frozen=True)
class _Sought:
    """A search as far as it is known beforehand."""

    request: SearchRequest
    outline: Outline
    problem: Problem
    counts: Counts

    @cached_property
    def typical(self) -> Architecture | None:
        """What candidates look like: the fewest units that meet the budgets; None where only a clock says what meets them."""
        if self.problem.timed:
            return None
        space = self.problem.spaces[len(self.problem.spaces) // 2]
        choice = next(space.best(dict.fromkeys(space.labels, 1.0), 1), None)
        return None if choice is None else space.arch(choice)

    @property
    def _denoises(self) -> bool:
        """True where what comes before the first removed block is replayed while architectures are scored."""
        return measure(self.request.measure).kind == "denoising"

    @property
    def of_network(self) -> float:
        """The share of the network that a candidate runs."""
        return UNKNOWN if self.typical is None else share(self.outline.graph, self.typical, self._denoises)

    @cached_property
    def units(self) -> list[Architecture]:
        """What is scored one by one: the units, unless their scores are taken over."""
        if self.request.from_scan:
            return []
        if self.problem.timed:
            return list(self.problem.units.values())[: self.request.trials]
        return [c.arch for c in self.problem.strategy(self.request.seed).alone()][: self.request.trials]

    @cached_property
    def n_candidates(self) -> int:
        """Architectures that are scored beside the units."""
        source = self.request.from_scan
        known = {arch.key for _, arch, _ in scores_in(Path(source), self.request.measure)} if source else self.units
        return max(0, self.request.trials - len(known)) + self.request.random

    @cached_property
    def n_designs(self) -> int:
        """Those by hand and those that are given."""
        by_hand = self.problem.presets if self.problem.timed else self.problem.strategy(0).known_designs()
        return len(by_hand) + len(self.problem.given)

    @property
    def n_finals(self) -> int:
        n_spaces = len(self.problem.spaces) if not self.problem.timed else len(SWEEP) if self.request.pareto else 1
        return self.request.finalists * n_spaces + self.n_designs

    @property
    def needs_teacher(self) -> bool:
        measures = [self.request.measure, *(bound.measure for bound in self.request.bounds)]
        return not self.counts.clean or any(measure(m).kind == "images" for m in measures)

    def images(self) -> dict[str, int]:
        """How many images are drawn for what, at most."""
        return {p.step: p.n * p.rows // self._rows_of_image for p in self.passes() if p.step.startswith("images")}

    @property
    def _rows_of_image(self) -> int:
        protocol = self.counts.protocol
        return self.outline.calls(protocol.n_steps, protocol.scheduler) * (1 + (protocol.cfg_scale > 1))

    def passes(self) -> Iterator[Passes]:
        """In the order in which they come."""
        counts, factor = self.counts, self.request.final_factor
        if self.problem.timed:
            sets = [Architecture()] + [next(iter(self.problem.units.values()))] * N_CALIBRATIONS
            yield from counts.timed([*sets, *self.problem.units.values()])
        if self.needs_teacher:
            yield from counts.drawn("images: teacher")
        yield from self._fits()
        yield from self._scored("search", counts.n_noisy, counts.protocol.n_images, self._sizes)
        yield from self._heard()
        if self.needs_teacher:
            yield from counts.drawn("images: teacher", factor * counts.protocol.n_images)
        yield from self._finals(factor)
        yield from self._recovered(factor)
        yield from self._looked_at()

    @property
    def _sizes(self) -> Sequence[int]:
        return tier_sizes(self.n, self.request)

    @property
    def n(self) -> int:
        """The samples of a score, or its images."""
        return self.counts.n_noisy if self._denoises else self.counts.protocol.n_images

    def _fits(self) -> Iterator[Passes]:
        """Of the units exactly; of candidates one for each, in one batch. The teacher's passes over the samples come once."""
        graph, kind = self.outline.graph, self.request.scored_with
        fitted = [as_scored(unit, graph, kind) for unit in self.units]
        yield from self.counts.fitted(fitted)
        if kind != "none" or self.request.fit:
            yield Passes("fits", self.n_candidates, self.counts.n_noisy, self.of_network / 2)
            if not any(arch.fits for arch in fitted):
                yield Passes("fits", 1, self.counts.n_noisy)

    def _scored(self, step: str, n_noisy: int, n_images: int, sizes: Sequence[int]) -> Iterator[Passes]:
        """Units and candidates on every tier of samples, candidates also by what must hold."""
        graph, name = self.outline.graph, self.request.measure
        if measure(name).kind == "denoising":
            yield from self.counts.denoised(name, n_noisy, step=step)
        for n in sizes:
            for unit in self.units:
                yield from self._by(name, n, share(graph, unit, self._denoises), 1, step)
            yield from self._by(name, n, self.of_network, self.n_candidates, step)
        for bound in self.request.bounds:
            whole = n_noisy if measure(bound.measure).kind == "denoising" else n_images
            yield from self._by(bound.measure, whole, self.of_network, self.n_candidates, f"{step}: {bound.text}")

    def _by(self, name: str, n: int, of_network: float, times: int, step: str) -> Iterator[Passes]:
        """Passes for `times` architectures on `n` samples by any measure."""
        if measure(name).kind == "denoising":
            size = self.counts.batch_size
            yield from self.counts.denoised(name, min(ceil(n / size) * size, max(n, self.counts.n_noisy)), of_network, times, step)
        else:
            protocol = replace(self.counts.protocol, n_images=n)
            yield from self.outline.drawing(f"images: {step}", protocol, self.counts.batch_size, of_network, times)

    def _heard(self) -> Iterator[Passes]:
        """Designs and finalists, by how they follow captions."""
        n = self.n_finals
        if self.counts.captions:
            yield from self.counts.drawn("images: captions", arch=self.typical or Architecture(), times=n)
        elif self.counts.protocol.cfg_scale > 1:
            yield from self.counts.denoised("guided_mse", self.counts.n_noisy, 1 + self.of_network, n, "captions")

    def _finals(self, factor: int) -> Iterator[Passes]:
        """Finalists on fresh seeds, and a picture of each."""
        counts, name = self.counts, self.request.measure
        if measure(name).kind == "denoising":
            yield from counts.denoised(name, factor * counts.n_noisy, step="finalists")
            yield from counts.denoised(name, factor * counts.n_noisy, self.of_network, self.n_finals, "finalists")
        else:
            yield from self._by(name, factor * counts.protocol.n_images, 1.0, self.n_finals, "finalists")
        for bound in self.request.bounds:
            n = factor * (counts.n_noisy if measure(bound.measure).kind == "denoising" else counts.protocol.n_images)
            yield from self._by(bound.measure, n, self.of_network, self.n_finals, f"finalists: {bound.text}")
        yield from counts.drawn("images: finalists", counts.n_pictures, self.typical or Architecture(), self.n_finals)

    def _recovered(self, factor: int) -> Iterator[Passes]:
        """The updates of finalists, those that are timed before, and their scores after."""
        request, part = self.request, UNKNOWN if self.typical is None else share(self.outline.graph, self.typical)
        if not request.recover:
            return
        n, rows = self.n_finals, request.recover_batch_size
        updates, timed, trainings = updates_of(n, request.recover), 1 + TIMED, 0
        for _ in request.recover:
            trainings += n
            yield from self._by(request.measure, factor * self.n, part, n, "recovered")
            n = ceil(n * SHARE)
        yield Passes("recovery: checks", 2 * (trainings + 1), 1)
        yield from (Passes("recovery: teacher", updates + timed, rows), Passes("recovery: student", timed, rows, learns=True))
        yield Passes("recovery: student", updates, rows, part, learns=True)

    def _looked_at(self) -> Iterator[Passes]:
        """Steps and images of the teacher and the finalists."""
        counts, some = self.counts, self.typical or Architecture()
        yield from counts.timed([Architecture()] if not self.problem.timed else [])
        yield Passes("latency", 2 * (WARMUP + N_TIMINGS) * self.n_finals, 1, (1 + share(self.outline.graph, some)) / 2)
        n = counts.protocol.n_images if counts.judged else counts.n_pictures
        yield from counts.drawn("images: teacher", n)
        yield from counts.drawn("images: finalists", n, some, self.n_finals)
