"""Stage: train a pruned U-Net by knowledge distillation, exactly resumable."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import recursively_apply
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from blockprune.errors import UserError
from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.model.families import Condition, join, take
from blockprune.model.fit import Fits
from blockprune.model.graph import BlockGraph
from blockprune.model.pretrained import silence
from blockprune.runs.records import TrainState
from blockprune.stages.train import losses
from blockprune.stages.train.checkpoints import Snapshot
from blockprune.stages.train.recipe import Recipe
from blockprune.stages.train.taps import Tap, Watch, taps_of


class Data(Protocol):
    """Training pairs by index, encoded: clean latents' mean and log-variance, and the condition, one row for each."""

    def __len__(self) -> int: ...

    def latents(self, indices: Sequence[int], flips: Sequence[bool], noise: Tensor) -> tuple[Tensor, Condition]:
        """Latents (B, C, h, w) drawn from the posterior with that noise, as the U-Net takes them, and their condition."""
        ...


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, 0, epoch]).permutation(n)


@dataclass(frozen=True)
class Batch:
    """What one forward pass gets: noisy latents (B, C, h, w), timesteps, condition, and what was added or is asked for."""

    noisy: Tensor
    timesteps: Tensor
    condition: Condition
    target: Tensor


@dataclass(frozen=True)
class Sampler:
    """Data order, orientation, noise, timestep and dropped captions as functions of (seed, global sample index) alone."""

    data: Data
    schedule: DDPMScheduler
    blank: Condition
    seed: int
    latent: tuple[int, int, int]
    flip: bool = False
    caption_dropout: float = 0.0

    def index(self, g: int) -> int:
        """Which pair global sample `g` is: every epoch has an order of its own."""
        n = len(self.data)
        return int(_order(self.seed, g // n, n)[g % n])

    def batch(self, samples: Sequence[int], device: torch.device) -> Batch:
        draws = [np.random.default_rng([self.seed, 1, g]) for g in samples]
        chance = np.array([draw.random(3) for draw in draws])
        steps = self.schedule.config.num_train_timesteps
        t = torch.tensor(np.minimum(chance[:, 0] * steps, steps - 1).astype(np.int64))
        noise = torch.stack([self._noise(g) for g in samples])
        flips = [self.flip and bool(c < 0.5) for c in chance[:, 1]]
        clean, condition = self.data.latents([self.index(g) for g in samples], flips, noise[:, 1])
        noisy = self.schedule.add_noise(clean, noise[:, 0], t)
        velocity = self.schedule.config.prediction_type == "v_prediction"
        target = self.schedule.get_velocity(clean, noise[:, 0], t) if velocity else noise[:, 0]
        condition = self._dropped(condition, chance[:, 2] < self.caption_dropout)
        return Batch(noisy.to(device), t.to(device), _to(condition, device), target.to(device))

    def _noise(self, g: int) -> Tensor:
        """(2, C, h, w): what is added, and what the posterior is drawn with."""
        seed = int(np.random.SeedSequence([self.seed, 2, g]).generate_state(1, np.uint64)[0] >> 1)
        return torch.randn(2, *self.latent, generator=torch.Generator().manual_seed(seed))

    def _dropped(self, condition: Condition, drop: NDArray[np.bool_]) -> Condition:
        if not drop.any():
            return condition
        n = len(drop)
        return take(join(condition, self.blank), torch.arange(n).masked_fill(torch.from_numpy(drop), n))


def _to(condition: Condition, device: torch.device) -> Condition:
    """In float32, as the student's weights are, whatever the text encoder's precision was."""
    return recursively_apply(lambda t: t.to(device, torch.float32), condition)


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


@dataclass(frozen=True)
class Settings:
    """How a run is cut into steps: `batch_size` is of one process and one forward pass, `compiler` a backend of torch.compile."""

    batch_size: int
    accumulation: int = 1
    seed: int = 0
    ema: bool = False
    ema_decay: float = 0.9999
    gradient_checkpointing: bool = False
    compiler: str = ""


class Distiller:
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
        self.accelerator, self.recipe, self.settings, self.sampler = accelerator, recipe, settings, sampler
        self.offset, self.step = offset, offset
        self.bare_teacher, self.bare = teacher.requires_grad_(False).eval(), student
        self.teacher = self.bare_teacher
        self.taps: list[Tap] = taps_of(graph, arch, recipe.taps, recipe.self_attention) if recipe.feature else []
        self.theirs = Watch(teacher, [tap.teacher for tap in self.taps])
        self.mine = Watch(student, [tap.student for tap in self.taps])
        if settings.gradient_checkpointing:
            student.enable_gradient_checkpointing()
        self._place(teacher, student)
        fused = accelerator.device.type in ("cuda", "cpu")
        rate, decay = recipe.learning_rate, recipe.weight_decay
        optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=decay, betas=(0.9, 0.999), fused=fused)
        self.student, self.optimizer = accelerator.prepare(student, optimizer)
        self.ema = EMAModel(student.parameters(), decay=settings.ema_decay, foreach=True) if settings.ema else None
        if start is not None:
            self._restore(start)
        self._check_taps()
        self._compile()  # after the check, whose batch of one would be compiled for as well

    def _place(self, teacher: UNet2DConditionModel, student: UNet2DConditionModel) -> None:
        """The teacher in the precision of the forward pass, the student in float32; channels last, unless FSDP is to shard them."""
        dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
        if (dtype := dtypes.get(self.accelerator.mixed_precision)) is not None:
            with silence():
                teacher.to(dtype)
        teacher.to(self.accelerator.device)
        student.to(self.accelerator.device)
        if self.accelerator.distributed_type != DistributedType.FSDP:
            for unet in (teacher, student):
                unet.to(memory_format=torch.channels_last)

    def _compile(self) -> None:
        """Both models as torch.compile makes them; names, taps and weights stay those of the bare ones."""
        if self.settings.compiler:
            self.teacher, self.student = (torch.compile(m, backend=self.settings.compiler) for m in (self.teacher, self.student))

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
            output = self.student(batch.noisy, timestep=batch.timesteps, **batch.condition, return_dict=False)[0]
        return output, taps

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

    def run(self, n_steps: int) -> Iterator[TrainState]:
        """Trains up to `n_steps` optimiser steps of this phase; yields a row after each. A loss that is not finite ends it."""
        while self.step < self.offset + n_steps:
            begun = time.perf_counter()
            terms = self._optimise()
            self.step += 1
            if not math.isfinite(terms["loss"]):
                raise FloatingPointError(f"the loss is {terms['loss']} at step {self.step}")
            n = self.settings.batch_size * self.settings.accumulation * self.accelerator.num_processes
            yield TrainState(self.step, terms, n, time.perf_counter() - begun)

    def _optimise(self) -> dict[str, float]:
        """One optimiser step over the accumulated forward passes; the mean of every term over all processes."""
        s, world, rank = self.settings, self.accelerator.num_processes, self.accelerator.process_index
        sums: dict[str, Tensor] = {}
        for m in range(s.accumulation):
            first = ((self.step * s.accumulation + m) * world + rank) * s.batch_size
            taught = self.teacher_output(range(first, first + s.batch_size))
            with self.accelerator.accumulate(self.student):
                terms = self.losses(taught)
                terms["loss"] = self.total(terms)
                self.accelerator.backward(terms["loss"])
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.student.parameters(), self.recipe.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach().float() / s.accumulation
        if self.ema is not None:
            self.ema.step(self.bare.parameters())
        values = self.accelerator.reduce(torch.stack(list(sums.values())), "mean")
        return dict(zip(sums, values.tolist(), strict=True))

    def close(self) -> None:
        """Leaves the teacher as it was."""
        self.theirs.close()
        self.mine.close()

    def weights(self, averaged: bool) -> dict[str, Tensor]:
        """The student's weights, or their moving average where it is kept: whole tensors, so every process must ask together."""
        own = {name: _whole(t) for name, t in self.bare.state_dict().items()}
        if self.ema is None or not averaged:
            return own
        return own | {name: _whole(t) for (name, _), t in zip(self.bare.named_parameters(), self.ema.shadow_params, strict=True)}

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Everything that a continuation needs, as named whole tensors; every process must ask together."""
        names = [name for name, _ in self.bare.named_parameters()]
        states = [self.optimizer.state[p] for p in self.bare.parameters()]
        optimizer = {f"{n}/{k}": _whole(torch.as_tensor(v)) for n, s in zip(names, states, strict=True) for k, v in s.items()}
        found = {"student": self.weights(averaged=False), "optimizer": optimizer}
        if self.accelerator.scaler is not None:
            scaler = {k: torch.tensor(v, dtype=torch.float64) for k, v in self.accelerator.scaler.state_dict().items()}
            found["scaler"] = scaler
        if self.ema is not None:
            shadow = dict(zip(names, map(_whole, self.ema.shadow_params), strict=True))
            found["ema"] = shadow | {"optimization_step": torch.tensor(self.ema.optimization_step)}
        return found

    def _restore(self, start: Snapshot) -> None:
        self.step = start.step
        mine = self.bare.state_dict()
        self.bare.load_state_dict({name: _laid_out(t, mine[name]) for name, t in start.parts["student"].items()})
        slots = list(self.optimizer.param_groups[0]["params"])
        names = [name for name, _ in self.bare.named_parameters()]
        for name, p in zip(names, slots, strict=True):
            kept = {k.removeprefix(f"{name}/"): v for k, v in start.parts["optimizer"].items() if k.rpartition("/")[0] == name}
            state = {k: _laid_out(v, p) if v.ndim else v.to(p.device) if p.is_cuda else v for k, v in kept.items()}
            if state:
                self.optimizer.state[p] = state
        if self.accelerator.scaler is not None and "scaler" in start.parts:
            self.accelerator.scaler.load_state_dict({k: v.item() for k, v in start.parts["scaler"].items()})
        if self.ema is not None and "ema" in start.parts:
            self.ema.optimization_step = int(start.parts["ema"]["optimization_step"])
            self.ema.shadow_params = [_laid_out(start.parts["ema"][n], p) for n, p in zip(names, slots, strict=True)]


def _whole(t: Tensor) -> Tensor:
    """A tensor as it is, or put together from its shards (FSDP), which every process must do at the same time."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def _laid_out(t: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in memory as another of its shape is: device, shards and layout, by which kernels round."""
    if isinstance(like, DTensor):
        return distribute_tensor(t.to(like.device), like.device_mesh, like.placements)
    return torch.empty_like(like, dtype=t.dtype, requires_grad=False).copy_(t)
