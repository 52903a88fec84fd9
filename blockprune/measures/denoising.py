"""The denoising error of masked U-Nets against their teacher, at the same noise, timesteps and prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor

from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.model.families import Condition, join, take
from blockprune.model.fit import Fits, no_fits
from blockprune.model.graph import BlockGraph
from blockprune.model.replay import Recording
from blockprune.model.sampling import batches_of, guide, noise

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class NoisySamples:
    """Clean latents (M, C, h, w) with one condition row each, drawn on to `n` noisy samples.

    Sample i is latent i mod M at the timestep of stratum i of `n` (in a seeded order), with noise of its own seed. With `blank`,
    the one-row condition of no prompt, the U-Net's answer is its prediction guided by `cfg_scale`, else its plain one.
    """

    latents: Tensor
    condition: Condition
    schedule: DDPMScheduler
    n: int
    seed: int
    blank: Condition | None = None
    cfg_scale: float = 1.0

    @property
    def timesteps(self) -> Tensor:
        """(n,) one timestep per sample, uniform over 0…T-1 by stratification."""
        draw = torch.Generator().manual_seed(self.seed)
        where = torch.randperm(self.n, generator=draw) + torch.rand(self.n, generator=draw, dtype=torch.float64)
        return (where / self.n * self.schedule.config.num_train_timesteps).long()

    def batch(self, index: Sequence[int], unet: UNet2DConditionModel) -> tuple[Tensor, Tensor, Condition]:
        """(noisy latents, timesteps, condition) of the samples of these numbers, on the U-Net's device in its dtype.

        Guided samples have two rows each: first all without a prompt, then all with theirs.
        """
        numbers = torch.tensor(index)
        rows = numbers % len(self.latents)
        clean = self.latents[rows].float().cpu()
        t = self.timesteps[numbers]
        noisy = self.schedule.add_noise(clean, noise(clean.shape[1:], [self.seed + i for i in index]), t)
        condition = take(self.condition, rows)
        if self.blank is not None:
            noisy, t = torch.cat([noisy, noisy]), torch.cat([t, t])
            condition = join(take(self.blank, [0] * len(rows)), condition)
        return noisy.to(unet.device, unet.dtype), t.to(unet.device), condition


class Answer:
    """The teacher's answer to the noisy samples of these numbers, kept for comparison with any masked U-Net.

    With `replay` the modules before the first removed block return what they returned in the teacher's pass; the numbers are those
    of a whole pass within rounding.
    """

    @torch.inference_mode()
    def __init__(
        self,
        unet: UNet2DConditionModel,
        graph: BlockGraph,
        samples: NoisySamples,
        index: Sequence[int],
        replay: bool = True,
        fits: Fits = no_fits,
    ) -> None:
        self.fits = fits
        self.unet, self.recording = unet, Recording(graph) if replay else None
        self.cfg_scale = samples.cfg_scale if samples.blank is not None else None
        self.input = samples.batch(index, unet)
        with self.recording.of(unet) if self.recording else nullcontext():
            self.output = self._forward(unet).float()

    def _forward(self, unet: UNet2DConditionModel) -> Tensor:
        x, t, condition = self.input
        out = unet(x, t, **condition, return_dict=False)[0]
        return out if self.cfg_scale is None else guide(out, self.cfg_scale)

    @torch.inference_mode()
    def errors(self, arch: Architecture) -> Floats:
        """(batch,) of |e(removed) - e(full)|² / elements: arXiv 2404.11098, eq. 4, per element. NaN where the U-Net fails."""
        masked = self.recording.removed if self.recording else surgery.removed
        with masked(self.unet, arch, self.fits(arch)):
            student = self._forward(self.unet)
        return self._compared(student)

    @torch.inference_mode()
    def errors_of(self, student: UNet2DConditionModel) -> Floats:
        """`errors` of a U-Net of its own, such as a trained student."""
        return self._compared(self._forward(student))

    def _compared(self, student: Tensor) -> Floats:
        return (student.float() - self.output).square().mean((1, 2, 3)).double().cpu().numpy()

    @property
    def mem_bytes(self) -> int:
        """What is kept beside the answer itself."""
        return self.recording.mem_bytes if self.recording else 0


def denoising_errors(
    unet: UNet2DConditionModel,
    graph: BlockGraph,
    archs: Mapping[str, Architecture],
    samples: NoisySamples,
    index: Sequence[int],
    replay: bool = True,
    fits: Fits = no_fits,
) -> dict[str, Floats]:
    """label => the errors of every architecture on the samples of these numbers, which the teacher sees once."""
    answer = Answer(unet, graph, samples, index, replay, fits)
    return {label: answer.errors(arch) for label, arch in archs.items()}


class Denoiser:
    """The error of one architecture after another on the same samples.

    The teacher runs once. Its recordings are kept while they take less than `keep_bytes`; past that only its outputs are.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        graph: BlockGraph,
        samples: NoisySamples,
        batch_size: int,
        keep_bytes: int = 2**31,
        fits: Fits = no_fits,
    ) -> None:
        self._batches = batches_of(samples.n, batch_size)
        self._answer = lambda index, replay: Answer(unet, graph, samples, index, replay, fits)
        self.n, self.batch_size, self.keep_bytes = samples.n, batch_size, keep_bytes
        self._answers: list[Answer] = []

    def errors(self, arch: Architecture, n: int | None = None) -> Floats:
        """(n,) errors on the first `n` samples, all of them when None; `n` is rounded up to whole batches."""
        return np.concatenate([answer.errors(arch) for answer in self._first(n)])

    def errors_of(self, student: UNet2DConditionModel) -> Floats:
        """(n,) errors of a U-Net of its own."""
        return np.concatenate([answer.errors_of(student) for answer in self._first(None)])

    def _first(self, n: int | None) -> list[Answer]:
        n_batches = -(-min(n or self.n, self.n) // self.batch_size)
        while len(self._answers) < n_batches:
            replay = sum(a.mem_bytes for a in self._answers) < self.keep_bytes
            self._answers.append(self._answer(self._batches[len(self._answers)], replay))
        return self._answers[:n_batches]
