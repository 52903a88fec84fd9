"""What a student draws along its training, and what judges say of it."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from diffusers import UNet2DConditionModel

from blockprune.measures.images import judge
from blockprune.measures.measure import measure
from blockprune.measures.runner import FULL, Images, MeasureRunner, Plan
from blockprune.measures.score import Score
from blockprune.model.architecture import Architecture
from blockprune.model.model import Model
from blockprune.model.sampling import Protocol, check_schedule
from blockprune.stages.fields import Measuring
from blockprune.stages.plan import plan_of, possible
from blockprune.stages.train.request import TrainRequest


class Validation:
    """Draws with students of one model at fixed prompts and seeds, and scores the images by every measure that has what it needs.

    Measures that pair with the teacher's images are left out.
    """

    def __init__(self, model: Model, request: TrainRequest) -> None:
        self.model = model
        self.asked = Measuring(
            n_images=request.n_images,
            steps=request.denoising_steps,
            cfg_scale=request.cfg_scale,
            scheduler=request.scheduler,
            seed=request.seed,
            prompts=request.validation_prompts,
        ).filled(model.defaults)

    def check(self) -> None:
        """Raises UserError where the images could not be drawn."""
        a = self.asked
        n_images, steps, cfg_scale = a.n_images or 1, a.steps or 1, a.cfg_scale or 0.0
        check_schedule(self.model.pipe, Protocol(n_images, steps, cfg_scale, a.seed, self.model.latent, a.scheduler or ""))

    @cached_property
    def plan(self) -> Plan:
        """All images for the judges; without any, those that are shown."""
        plan = plan_of(self.model, self.asked, ["params"])
        there = [m for m in possible(plan.judges, guided=False) if measure(m).kind == "images" and not measure(m).paired]
        n_images = plan.protocol.n_images if there else plan.n_pictures
        return replace(plan, measures=there, protocol=replace(plan.protocol, n_images=n_images))

    def look(self, student: UNet2DConditionModel, arch: Architecture, label: str) -> tuple[Images, list[Score]]:
        """The first images (k, H, W, 3) of a student, and its scores. Raises NotFinite."""
        with self.model.running(student):
            seen, pictures = MeasureRunner(self.model, self.plan).observe(Architecture(), FULL)
        plan = self.plan
        return pictures, list(judge(arch.key, label, plan.measures, seen, None, plan.judges, plan.protocol.seed))
