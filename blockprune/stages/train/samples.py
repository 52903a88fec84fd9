"""Training pairs as a request says them, and the samples that training draws from them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate.utils import recursively_apply
from diffusers import DDPMScheduler
from numpy.typing import NDArray
from torch import Tensor

from blockprune.data.cache import INDEX, Cached
from blockprune.data.encoded import Live, Provider, Remembered
from blockprune.data.training_data import CaptionedDataset, Reader, source_of
from blockprune.errors import UserError
from blockprune.model.families import Condition, join, on, take
from blockprune.model.identity import identity
from blockprune.model.model import Model


class Data(Protocol):
    """Training pairs by index, encoded: clean latents' mean and log-variance, and the condition, one row for each.

    `identity` tells pairs apart.
    """

    identity: str

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


def data_of(model: str, defaults: Mapping[str, Any], data: str | None, option: str = "--data") -> str:
    """The training pairs asked for, else the model's own; UserError, which names the option, when there are neither."""
    data = defaults.get("data") if data is None else data
    if data is None:
        raise UserError(
            f"no training data, and {model!r} has none of its own: give {option}, a folder with metadata.csv or metadata.jsonl, "
            ".tar shards or a `blockprune cache` folder"
        )
    return data


def provider_of(model: Model, data: Any) -> Provider:
    """The training pairs, encoded: from a cache folder, or encoded once as they come and remembered.

    `data` is a text as `source_of` takes it, the folder of a cache, or a dataset as `CaptionedDataset` takes it.
    """
    height, width = model.pixels
    if isinstance(data, str) and os.path.isfile(Path(data) / INDEX):
        return Remembered(Cached(data, {"teacher": _identity_of_files(model), "resolution": width}))
    if height != width:
        raise UserError(f"training needs a square resolution: got {height}x{width}")
    source = source_of(data, height) if isinstance(data, str) else CaptionedDataset(data, height)
    return Remembered(Live(model.pipe, Reader(source)))


def _identity_of_files(model: Model) -> str:
    """What a cache calls its model: also of a loaded pipeline the content id of the files that it came from, where it says."""
    try:
        return identity(model.name)
    except UserError:
        return model.identity


def samples_of(model: Model, provider: Provider, seed: int, flip: bool = False, caption_dropout: float = 0.0) -> Sampler:
    """Samples for the network of a model: its noise schedule, latent shape and blank condition."""
    blank = on("cpu", model.family.empty(model.pipe, model.pixels))
    shape = (model.network.config.in_channels, *model.latent)
    return Sampler(provider, model.schedule, blank, seed, shape, flip, caption_dropout)
