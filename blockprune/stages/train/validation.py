"""What a student draws along its training, and what judges say of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Validation:
    """Draws with networks of one model at fixed prompts and seeds, and scores the images by the measures that have what they need.

    `wanted` are the measures, all where there are none; those that pair with the teacher's images are left out. `prompts` are
    drawn in place of those that are `asked` for. `tick` hears how many images were just drawn.
    """

    model: Model
    asked: Measuring
    wanted: Sequence[str] = ()
    prompts: Sequence[str] = ()
    tick: Callable[[int], None] = lambda n: None

    def check(self) -> None:
        """Raises UserError where the images could not be drawn."""
        a = self.asked.filled(self.model.defaults)
        n_images, steps, cfg_scale = a.n_images or 1, a.steps or 1, a.cfg_scale or 0.0
        check_schedule(self.model.pipe, Protocol(n_images, steps, cfg_scale, a.seed, self.model.latent, a.scheduler or ""))

    @cached_property
    def plan(self) -> Plan:
        """All images for the judges; without any, those that are shown."""
        plan = plan_of(self.model, self.asked.filled(self.model.defaults), ["params"])
        there = [m for m in possible(plan.judges, guided=False) if measure(m).kind == "images" and not measure(m).paired]
        there = [m for m in there if not self.wanted or m in self.wanted]
        n_images = plan.protocol.n_images if there else plan.n_pictures
        protocol = replace(plan.protocol, n_images=n_images)
        prompts = self.prompts or plan.prompts
        return replace(plan, measures=there, protocol=protocol, prompts=prompts, tick=lambda what, n: self.tick(n))

    def look(self, student: UNet2DConditionModel, arch: Architecture, label: str) -> tuple[Images, list[Score]]:
        """The first images (k, H, W, 3) of a student, and its scores. Raises NotFinite."""
        with self.model.running(student):
            seen, pictures = MeasureRunner(self.model, self.plan).observe(Architecture(), FULL)
        plan = self.plan
        return pictures, list(judge(arch.key, label, plan.measures, seen, None, plan.judges, plan.protocol.seed))
