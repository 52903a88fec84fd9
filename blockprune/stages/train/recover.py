"""A short distillation of a finalist, so that a search can choose what is best after training."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property

from diffusers import UNet2DConditionModel

from blockprune.model.architecture import Architecture
from blockprune.model.model import Model
from blockprune.stages.train.distill import Distiller, Sampler, Settings, student_of
from blockprune.stages.train.launch import accelerated
from blockprune.stages.train.recipe import read_recipe
from blockprune.stages.train.samples import data_of, provider_of, samples_of

LEARNING_RATE = 5e-4  # higher than the papers': a recovery is short


@dataclass
class Recovery:
    """The same few updates for every finalist: `updates` of `batch_size` images, in one order, with one noise.

    The model stays as it was: what training changes of its network (layout, precision) it changes of a copy.
    """

    model: Model
    data: str | None
    updates: int
    batch_size: int
    seed: int

    @cached_property
    def samples(self) -> Sampler:
        """The training pairs, encoded once."""
        data = data_of(self.model.name, self.model.defaults, self.data, "--train-data")
        return samples_of(self.model, provider_of(self.model, data), self.seed)

    def student(self, arch: Architecture) -> UNet2DConditionModel:
        """The student after its updates, in float32 and for inference. Raises FloatingPointError when the loss is not finite."""
        recipe = replace(read_recipe("bk-sdm"), learning_rate=LEARNING_RATE)
        teacher = copy.deepcopy(self.model.network).float()
        student = student_of(teacher, arch, "teacher", 0)
        with accelerated(str(self.model.device)) as accelerator:
            settings = Settings(self.batch_size, seed=self.seed)
            run = Distiller(accelerator, teacher, student, self.model.graph, arch, self.samples, recipe, settings)
            try:
                for _ in run.run(self.updates):
                    pass
            finally:
                run.close()
        return student.eval().requires_grad_(False)
