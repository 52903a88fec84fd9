"""Training pairs as a command's words say them, and the samples that training draws from them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler

from blockprune.data.encoded import Cached, Live, Provider, Remembered
from blockprune.data.training_data import Reader, source_of
from blockprune.errors import UserError
from blockprune.model.families import family_of
from blockprune.stages.inputs import Bench
from blockprune.stages.train.distill import Sampler


def provider_of(bench: Bench, data: str) -> Provider:
    """The training pairs, encoded: from a cache folder, or encoded once as they come and remembered."""
    if os.path.isfile(Path(data) / "cache.json"):
        return Remembered(Cached(data, {"teacher": bench.identity, "resolution": bench.latent[0] * bench.pipe.vae_scale_factor}))
    height, width = (side * bench.pipe.vae_scale_factor for side in bench.latent)
    if height != width:
        raise UserError(f"training needs a square resolution: got {height}x{width}")
    return Remembered(Live(bench.pipe, Reader(source_of(data, height))))


def samples_of(bench: Bench, provider: Provider, seed: int, flip: bool = False, caption_dropout: float = 0.0) -> Sampler:
    """Samples for the U-Net of a bench: its noise schedule, latent shape and blank condition."""
    pipe = bench.pipe
    height, width = (side * pipe.vae_scale_factor for side in bench.latent)
    blank = _cpu(family_of(pipe.unet.config).empty(pipe, (height, width)))
    shape = (pipe.unet.config.in_channels, *bench.latent)
    schedule = DDPMScheduler.from_config(pipe.scheduler.config)
    return Sampler(provider, schedule, blank, seed, shape, flip, caption_dropout)


def _cpu(condition: dict[str, Any]) -> dict[str, Any]:
    return {k: _cpu(v) if isinstance(v, dict) else v.cpu() for k, v in condition.items()}
