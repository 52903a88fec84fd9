"""Encodes training pairs once, so that training needs no VAE and no text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from blockprune.data import cache, training_data
from blockprune.errors import UserError
from blockprune.model import pretrained
from blockprune.model.defaults import defaults_of
from blockprune.model.device import device_of
from blockprune.model.identity import identity
from blockprune.progress import Listener
from blockprune.stages.train.request import CacheRequest
from blockprune.stages.train.samples import data_of


def encode(request: CacheRequest, out: Path, progress: Listener) -> dict[str, Any]:
    """Writes what the folder `out` still lacks of the cache, alone or beside other processes; returns its record."""
    data = data_of(request.model, defaults_of(request.model), request.data)
    config = pretrained.configs(request.model)
    height, width = (side * config.vae_factor for side in config.latent(request.resolution))
    if height != width:
        raise UserError(f"a cache needs a square resolution: got {height}x{width}")
    reader = training_data.Reader(training_data.source_of(data, height, request.n_images))
    pipe = pretrained.load(request.model, device_of(request.device), getattr(torch, request.dtype))
    progress.plan(cache.unfinished(out, len(reader), request.shard_size))
    return cache.write_cache(
        pipe,
        reader,
        out,
        request.shard_size,
        teacher=identity(request.model),
        flip=request.random_flip,
        chunk=request.batch_size,
        tick=progress.tick,
    )
