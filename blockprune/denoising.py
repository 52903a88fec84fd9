"""The denoising error of masked U-Nets against their teacher, at the same noise, timesteps and prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from torch import Tensor

from blockprune import surgery
from blockprune.arch import Architecture, BlockGraph
from blockprune.families import Condition, take
from blockprune.replay import Recording
from blockprune.sampling import noise

Errors = dict[str, NDArray[np.float64]]


@dataclass(frozen=True)
class NoisySamples:
    """Clean latents (M, C, h, w) with one condition row each, drawn on to `n` noisy samples.

    Sample i is latent i mod M at the timestep of stratum i of `n` (in a seeded order), with noise of its own seed.
    """

    latents: Tensor
    condition: Condition
    schedule: DDPMScheduler
    n: int
    seed: int

    @property
    def timesteps(self) -> Tensor:
        """(n,) one timestep per sample, uniform over 0…T-1 by stratification."""
        draw = torch.Generator().manual_seed(self.seed)
        where = torch.randperm(self.n, generator=draw) + torch.rand(self.n, generator=draw, dtype=torch.float64)
        return (where / self.n * self.schedule.config.num_train_timesteps).long()

    def batch(self, start: int, stop: int, unet: UNet2DConditionModel) -> tuple[Tensor, Tensor, Condition]:
        """(noisy latents, timesteps, condition) of samples start…stop-1, on the U-Net's device in its dtype."""
        rows = torch.arange(start, stop) % len(self.latents)
        clean = self.latents[rows].float().cpu()
        t = self.timesteps[start:stop]
        noisy = self.schedule.add_noise(clean, noise(clean.shape[1:], [self.seed + i for i in range(start, stop)]), t)
        return noisy.to(unet.device, unet.dtype), t.to(unet.device), take(self.condition, rows)


Masking = Callable[[UNet2DConditionModel, Architecture], AbstractContextManager[Any]]


@torch.inference_mode()
def denoising_errors(
    unet: UNet2DConditionModel,
    graph: BlockGraph,
    archs: Mapping[str, Architecture],
    samples: NoisySamples,
    batch_size: int,
    start: int = 0,
    replay: bool = True,
) -> Iterator[Errors]:
    """Per batch from sample `start` on: label => (batch,) of |e(removed) - e(full)|² / elements, per sample.

    The loss of arXiv 2404.11098, eq. 4, per element. With `replay` the modules before the first removed block return what they
    returned in the teacher's pass; the numbers are the same bit for bit. A failed architecture has NaN.
    """
    for first in range(start, samples.n, batch_size):
        x, t, condition = samples.batch(first, min(first + batch_size, samples.n), unet)
        recording = Recording(graph)
        with recording.of(unet):
            teacher = unet(x, t, **condition, return_dict=False)[0]
        masking: Masking = recording.removed if replay else surgery.removed
        errors = {}
        for label, arch in archs.items():
            with masking(unet, arch):
                student = unet(x, t, **condition, return_dict=False)[0]
            errors[label] = (student.float() - teacher.float()).square().mean((1, 2, 3)).double().cpu().numpy()
        yield errors
