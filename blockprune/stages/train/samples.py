"""Training pairs as a request says them, and the samples that training draws from them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockprune.data.cache import INDEX, Cached
from blockprune.data.encoded import Live, Provider, Remembered
from blockprune.data.training_data import CaptionedDataset, Reader, source_of
from blockprune.errors import UserError
from blockprune.model.families import on
from blockprune.model.identity import identity
from blockprune.model.model import Model
from blockprune.stages.train.distill import Sampler


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
