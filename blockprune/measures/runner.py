"""What is measured of any masked model, and by which protocol: one path for a scan, a search and an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor, from_numpy

from blockprune.errors import UserError
from blockprune.measures import intervals
from blockprune.measures.denoising import Denoiser, NoisySamples
from blockprune.measures.images import Judges, judge, stack
from blockprune.measures.measure import measure
from blockprune.measures.score import TEACHER, Score
from blockprune.model.architecture import Architecture
from blockprune.model.families import Condition
from blockprune.model.fit import Fitter, at_a_time
from blockprune.model.model import Model
from blockprune.model.sampling import NotFinite, Protocol, batches_of, teacher_fails

Arrays = dict[str, NDArray[Any]]
Images = NDArray[np.uint8]
FULL = TEACHER
N_TIMINGS = 10  # rounds in which steps are timed
FIT_SEED = 10**6  # noise and timesteps of the samples that are fitted on are other ones than those that are scored


@dataclass(frozen=True)
class Plan:
    """What a scan measures: `measures` by name, images by `protocol`, `n_noisy` samples for the denoising error.

    `clean` are data latents (M, C, h, w) with their captions; None stands for the teacher's own images of `protocol`.
    `tick` hears how many images or samples were just done, and of what.
    """

    measures: Sequence[str]
    protocol: Protocol
    prompts: Sequence[str]
    n_noisy: int = 256
    clean: tuple[Tensor, Sequence[str]] | None = None
    judges: Judges = field(default_factory=Judges)
    batch_size: int = 16
    n_pictures: int = 6
    n_timings: int = N_TIMINGS
    tick: Callable[[str, int], None] = lambda what, n: None

    def __post_init__(self) -> None:
        object.__setattr__(self, "measures", with_ratio(self.measures))
        for name in self.measures:
            if "guidance" in measure(name).needs and self.protocol.cfg_scale <= 1:
                given = f"--cfg-scale {self.protocol.cfg_scale:g}"
                raise UserError(f"measure {name!r} needs guidance: got {given}; give one above 1, or take eps_mse")
            if not measure(name).computable:
                raise UserError(f"nothing computes the measure {name!r}: give it a compute, or leave it out of --measures")

    @property
    def denoising_measures(self) -> list[str]:
        return [m for m in self.measures if measure(m).kind == "denoising"]

    @property
    def observed(self) -> dict[str, tuple[int, ...] | None]:
        """The arrays that `MeasureRunner.observe` gives for each image, and their shapes where these are known beforehand."""
        detector, names = self.judges.detector, ("image", "text") if self.judges.scorer else ()
        seen: dict[str, tuple[int, ...] | None] = dict.fromkeys(("latents", *names))
        seen |= {m.name: () for m in self.judges.own}
        return seen | ({"features": (detector.n_features,)} if detector else {})

    @property
    def image_measures(self) -> list[str]:
        return [m for m in self.measures if measure(m).kind == "images"]


def with_ratio(measures: Sequence[str]) -> list[str]:
    """`measures` with "latency_ratio" beside "latency": the one is the teacher's alone, the other that of what lacks blocks."""
    out = list[str]()
    for name in measures:
        out += ["latency", "latency_ratio"] if name in ("latency", "latency_ratio") else [name]
    return list(dict.fromkeys(out))


class MeasureRunner:
    """One teacher under one plan: looks at its masked models, always at the same prompts, seeds, noise and timesteps."""

    def __init__(self, model: Model, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.prompts = [plan.prompts[i % len(plan.prompts)] for i in range(plan.protocol.n_images)]
        self._conditions: tuple[Condition, Condition] | None = None

    @property
    def conditions(self) -> tuple[Condition, Condition]:
        """The condition rows of the prompts, and the one of no prompt; computed once."""
        if self._conditions is None:
            self._conditions = self.model.encode(self.prompts)
        return self._conditions

    def observe(self, arch: Architecture, label: str, n: int | None = None) -> tuple[Arrays, Images]:
        """What the judges see of the first `n` images (None: all), with their latents; and the first images. Raises NotFinite."""
        plan, seen, first = self.plan, list[Arrays](), list[Images]()
        n_images = min(n or plan.protocol.n_images, plan.protocol.n_images)
        for _, arrays, images in self.look(arch, label, batches_of(n_images, plan.batch_size)):
            seen.append(arrays)
            first += list(images)[: max(0, plan.n_pictures - len(first))]
        return stack(seen), np.stack(first)

    def look(
        self, arch: Architecture, label: str, batches: Iterable[Sequence[int]]
    ) -> Iterator[tuple[Sequence[int], Arrays, Images]]:
        """Of each batch of numbers: these, what the judges see of its images, with their latents, and (N, H, W, 3) the images.

        The next batch is asked for when what was seen of the last has been taken. Raises NotFinite.
        """
        plan = self.plan
        with self.model.removed(arch):
            for index in batches:
                latents, images = self.model.draw(plan.protocol, *self.conditions, index)
                seen = plan.judges.look(images, [self.prompts[i] for i in index])
                yield index, {**seen, "latents": latents.float().cpu().numpy()}, images.permute(0, 2, 3, 1).numpy()
                plan.tick(label, len(index))

    def teacher(self) -> tuple[Arrays, Images]:
        """`observe` of the teacher itself; UserError when it gives no finite images."""
        try:
            return self.observe(Architecture(), FULL)
        except NotFinite as err:
            raise teacher_fails(err) from None

    def noisy(self, teacher: Arrays, name: str = "eps_mse") -> NoisySamples:
        """The samples of a denoising error: of the plan's clean latents, else of what the teacher drew."""
        clean, prompts = self.plan.clean or (from_numpy(teacher["latents"]), self.prompts)
        condition = self.model.encode(prompts)[0] if self.plan.clean else self.conditions[0]
        protocol, blank = self.plan.protocol, self.conditions[1] if "guidance" in measure(name).needs else None
        return NoisySamples(clean, condition, self.model.schedule, self.plan.n_noisy, protocol.seed, blank, protocol.cfg_scale)

    def fitter(self, teacher: Arrays) -> Fitter:
        """Fits stand-ins to the teacher's blocks, on as many noisy samples as a denoising error takes, of other noise."""
        model, samples = self.model, self.noisy(teacher)
        samples = replace(samples, seed=samples.seed + FIT_SEED)
        size = at_a_time(samples.n, model.latent, self.plan.batch_size)
        batches = [samples.batch(index, model.network) for index in batches_of(samples.n, size)]
        return Fitter(model.network, model.graph, batches)


def error_score(name: str, arch: Architecture, label: str, errors: NDArray[np.float64], seed: int) -> Score:
    """The denoising error of an architecture from its samples' (n,) errors."""
    n = len(errors)
    if not np.isfinite(errors).all():
        return Score(arch.key, label, name, None, n, seed, error="the U-Net's output is not finite")
    low, high = intervals.interval(intervals.mean_statistic(errors), n, seed) or (None, None)
    return Score(arch.key, label, name, float(errors.mean()), n, seed, low, high)


def compared(score: Score, errors: NDArray[np.float64], base: NDArray[np.float64]) -> Score:
    """A denoising error with its paired difference to another architecture's errors on the same samples."""
    differences = errors - base
    if not np.isfinite(differences).all():
        return score
    low, high = intervals.interval(intervals.mean_statistic(differences), len(errors), score.seed) or (None, None)
    return replace(score, delta=float(differences.mean()), delta_low=low, delta_high=high)


class Objective:
    """One measure of any architecture on the first n samples of a plan: noisy samples for a denoising error, images for others.

    `teacher` is what `MeasureRunner.teacher` saw; it may be empty for a denoising error on data.
    """

    def __init__(self, runner: MeasureRunner, name: str, teacher: Arrays) -> None:
        self.runner, self.measure, self.teacher = runner, name, teacher
        self.denoises = measure(name).kind == "denoising"
        plan = runner.plan
        if self.denoises:
            self.n = plan.n_noisy
            model, samples = runner.model, runner.noisy(teacher, name)
            self._denoiser = Denoiser(model.network, model.graph, samples, plan.batch_size, fits=model.fits)
        else:
            self.n = plan.protocol.n_images

    def __call__(self, arch: Architecture, label: str, n: int | None = None) -> Score:
        """The score of `arch` on the first `n` samples, all when None."""
        seed = self.runner.plan.protocol.seed
        if self.denoises:
            return error_score(self.measure, arch, label, self._denoiser.errors(arch, n), seed)
        return self._of_images(arch, label, n, masked=arch)

    def of(self, student: UNet2DConditionModel, arch: Architecture, label: str) -> Score:
        """The score of a U-Net of its own, such as a trained student of that architecture, on all samples."""
        if self.denoises:
            seed = self.runner.plan.protocol.seed
            return error_score(self.measure, arch, label, self._denoiser.errors_of(student), seed)
        with self.runner.model.running(student):
            return self._of_images(arch, label, None, masked=Architecture())

    def _of_images(self, arch: Architecture, label: str, n: int | None, masked: Architecture) -> Score:
        plan = self.runner.plan
        seed = plan.protocol.seed
        try:
            seen = self.teacher if not arch else self.runner.observe(masked, label, n)[0]
        except NotFinite as err:
            return Score(arch.key, label, self.measure, None, n or self.n, seed, error=str(err))
        rows = len(seen["latents"])
        base = {name: values[:rows] for name, values in self.teacher.items()}
        (score,) = judge(arch.key, label, [self.measure], seen, base, plan.judges, seed)
        return score
