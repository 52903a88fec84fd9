"""Knowledge distillation: the losses of a pruned U-Net against its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import Accelerator, DistributedType
from diffusers import UNet2DConditionModel
from torch import Tensor

from blockprune.errors import UserError
from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.model.fit import Fits
from blockprune.model.graph import BlockGraph
from blockprune.model.pretrained import silence
from blockprune.stages.train import losses
from blockprune.stages.train.checkpoints import Snapshot
from blockprune.stages.train.recipe import Recipe
from blockprune.stages.train.samples import Batch, Sampler
from blockprune.stages.train.taps import Tap, Watch, taps_of
from blockprune.stages.train.trainer import Optimiser, Settings, Trainer


def student_of(
    teacher: UNet2DConditionModel, arch: Architecture, initialise: str, seed: int, fits: Fits | None = None
) -> UNet2DConditionModel:
    """A trainable float32 student without the blocks of `arch`: the teacher's weights, fitted ones where
    `fits` gives them, or random ones."""
    source = teacher
    if initialise == "random":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            source = UNet2DConditionModel.from_config(teacher.config)
    weights = fits(arch) if fits and source is teacher else None
    return surgery.prune(source, arch, weights).float().train().requires_grad_(True)


@dataclass(frozen=True)
class TeacherOutput:
    """A batch, and the teacher's answer to it: its output, and what its tapped modules gave."""

    batch: Batch
    output: Tensor
    taps: Mapping[str, Tensor]


class Distiller(Trainer):
    """One phase of training: teacher and student on the same noisy latents, task loss, output KD and feature KD.

    `start` continues a phase from a checkpoint; `offset` is how many optimiser steps earlier phases took.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        teacher: UNet2DConditionModel,
        student: UNet2DConditionModel,
        graph: BlockGraph,
        arch: Architecture,
        sampler: Sampler,
        recipe: Recipe,
        settings: Settings,
        offset: int = 0,
        start: Snapshot | None = None,
    ) -> None:
        self.recipe, self.sampler = recipe, sampler
        self.bare_teacher = self.teacher = teacher.requires_grad_(False).eval()
        self.taps: list[Tap] = taps_of(graph, arch, recipe.taps, recipe.self_attention) if recipe.feature else []
        self.theirs = Watch(teacher, [tap.teacher for tap in self.taps])
        self.mine = Watch(student, [tap.student for tap in self.taps])
        if settings.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        _place(accelerator, teacher, student)
        optimiser = Optimiser(recipe.learning_rate, recipe.weight_decay, recipe.max_grad_norm)
        super().__init__(accelerator, student, optimiser, settings, offset, start)
        self._check_taps()
        self._compile()  # after the check, whose batch of one would be compiled for as well

    def _compile(self) -> None:
        """Both models as torch.compile makes them; names, taps and weights stay those of the bare ones."""
        if self.settings.compiler:
            self.teacher, self.module = (torch.compile(m, backend=self.settings.compiler) for m in (self.teacher, self.module))

    def _check_taps(self) -> None:
        """One forward pass of each: UserError names a tap whose shapes differ."""
        if not self.taps:
            return
        batch = self.sampler.batch([0], self.accelerator.device)
        with torch.no_grad():
            theirs, (_, mine) = self._ask_teacher(batch).taps, self._ask_student(batch)
        for tap in self.taps:
            if tap.student not in mine or tap.teacher not in theirs:
                raise UserError(f"the tap {tap.student!r} gives no output in this U-Net: leave it out of the recipe's taps")
            shapes = tuple(theirs[tap.teacher].shape), tuple(mine[tap.student].shape)
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"the tap {tap.teacher!r} of the teacher has the shape {shapes[0][1:]}, {tap.student!r} of the student "
                    f"{shapes[1][1:]}: they must match; change the recipe's taps"
                )

    def _ask_teacher(self, batch: Batch) -> TeacherOutput:
        """The teacher's answer."""
        with torch.no_grad(), self.theirs.watching() as taps, self.accelerator.autocast():
            inputs = {"timestep": batch.timesteps, **batch.condition, "return_dict": False}
            output = self.teacher(batch.noisy.to(self.bare_teacher.dtype), **inputs)[0]
        return TeacherOutput(batch, output, dict(taps))

    def _ask_student(self, batch: Batch) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The student's output and taps."""
        with self.mine.watching() as taps, self.accelerator.autocast():
            output = self.module(batch.noisy, timestep=batch.timesteps, **batch.condition, return_dict=False)[0]
        return output, taps

    def terms(self, samples: range) -> dict[str, Tensor]:
        terms = self.losses(self.teacher_output(samples))
        return terms | {"loss": self.total(terms)}

    def teacher_output(self, samples: range) -> TeacherOutput:
        """A batch of those samples with the teacher's answer."""
        return self._ask_teacher(self.sampler.batch(samples, self.accelerator.device))

    def losses(self, taught: TeacherOutput) -> dict[str, Tensor]:
        """Every term of the loss, unweighted; features by tap as "feature/NAME", and their sum."""
        batch, expected, theirs = taught.batch, taught.output, taught.taps
        predicted, mine = self._ask_student(batch)
        weights = None
        if gamma := self.recipe.min_snr_gamma:
            schedule = self.sampler.schedule
            weights = losses.min_snr_weights(schedule.alphas_cumprod, batch.timesteps, gamma, schedule.config.prediction_type)
        terms = {"task": losses.task_loss(predicted, batch.target, weights), "output": losses.output_loss(predicted, expected)}
        pairs = {tap.student: theirs[tap.teacher] for tap in self.taps}
        features = losses.feature_losses({tap.student: mine[tap.student] for tap in self.taps}, pairs, self.recipe.normalise_taps)
        terms["feature"] = torch.stack(list(features.values())).sum() if features else predicted.new_zeros(())
        return terms | {f"feature/{name}": loss for name, loss in features.items()}

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        r = self.recipe
        weighted = [(r.task, terms["task"]), (r.output, terms["output"]), (r.feature, terms["feature"])]
        return torch.stack([weight * term.float() for weight, term in weighted if weight]).sum()

    def close(self) -> None:
        """Leaves the teacher as it was."""
        self.theirs.close()
        self.mine.close()


def _place(accelerator: Accelerator, teacher: UNet2DConditionModel, student: UNet2DConditionModel) -> None:
    """The teacher in the precision of the forward pass, the student in float32; channels last, unless FSDP is to shard them."""
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
    if (dtype := dtypes.get(accelerator.mixed_precision)) is not None:
        with silence():
            teacher.to(dtype)
    teacher.to(accelerator.device)
    student.to(accelerator.device)
    if accelerator.distributed_type != DistributedType.FSDP:
        for unet in (teacher, student):
            unet.to(memory_format=torch.channels_last)
