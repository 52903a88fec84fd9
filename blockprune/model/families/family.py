"""The contract of a model family, and conditions: what a network is told beside the noisy sample and the timestep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import concatenate, recursively_apply, send_to_device
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor

from blockprune.model.config_schema import Config

Condition = dict[str, Any]
Size = tuple[int, int]


def _ddpm(pipe: DiffusionPipeline) -> DDPMScheduler:
    return DDPMScheduler.from_config(pipe.scheduler.config)


@dataclass(frozen=True)
class Family:
    """How one family's network is found in its pipeline, conditioned and noised.

    A Condition holds keyword arguments of the network, one row per prompt. `text(pipe, prompts, size)` encodes prompts for images
    of (height, width) pixels; `empty(pipe, size)` is the one row that guidance starts from; `blank(config, n, n_tokens,
    like)` is zeros of those shapes for counting, with the dtype and device of `like`. `network` is the pipeline's name for its
    denoising network; `schedule(pipe)` the noise that training and denoising errors add; `img2img(pipe)` diffusers' image-to-image
    pipeline of the same parts, None for a family that has none.
    """

    name: str
    text: Callable[[DiffusionPipeline, Sequence[str], Size], Condition]
    empty: Callable[[DiffusionPipeline, Size], Condition]
    blank: Callable[[Config, int, int, Tensor], Condition]
    network: str = "unet"
    schedule: Callable[[DiffusionPipeline], DDPMScheduler] = _ddpm
    img2img: Callable[[DiffusionPipeline], DiffusionPipeline] | None = None


def join(*conditions: Condition) -> Condition:
    """The conditions one below the other, along the batch dimension."""
    return concatenate(conditions)


def take(condition: Condition, rows: Any) -> Condition:
    """The given rows (slice or index tensor) of a condition."""
    return recursively_apply(lambda t: t[rows], condition)


def on(device: str | torch.device, condition: Condition) -> Condition:
    """The condition on a device."""
    return send_to_device(condition, device)
