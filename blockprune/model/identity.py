"""Which model it is, by what it holds: the same id for a model's files and for the pipeline that was loaded from them."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import Tensor

from blockprune.model import pretrained
from blockprune.model.config_schema import Config

WHOLE = 2**20  # numbers of a tensor that all count
ROWS, WIDTH = 64, 4096  # of a larger one so many rows count, spread evenly over it, and of each the first numbers
Sized = tuple[int, Tensor]  # how many numbers a tensor has, and those that count


def identity(model: str, unet: list[Path] | None = None) -> str:
    """A 12-digit content id of a model's U-Net, VAE and text encoder weights and of how U-Net, VAE and scheduler are configured.

    `identity_of` a pipeline that was loaded from its folder in float32 or float16 is the same; of one from a single file it is
    another, since tensors are laid out otherwise there. `unet` are the U-Net's files where they have a name of their own.
    """
    source = pretrained.weights_source(model) if unet is None else Path(model)
    if source.is_file():
        return _digest([], _of_files([source]))
    named = (unet if unet and part == "unet" else pretrained.weight_files(source, part)[0] for part in pretrained.parts(source))
    names = ("unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
    configs = [pretrained.component([source], name, str(source)) for name in names]
    return _digest(
        [_settings(c.get("_class_name", ""), c) for c in configs], _of_files([file for group in named for file in group])
    )


def identity_of(pipe: DiffusionPipeline) -> str:
    """The `identity` of a loaded pipeline."""
    configured = (pipe.unet, pipe.vae, pipe.scheduler)
    modules = (getattr(pipe, part, None) for part in pretrained.WEIGHTS)
    tensors = (t for module in modules if module is not None for t in module.state_dict().values())
    settings = [_settings(type(part).__name__, part.config) for part in configured]
    return _digest(settings, ((t.numel(), _counted(t.shape, t.__getitem__)) for t in tensors if t.is_floating_point()))


def _counted(shape: Sequence[int], read: Callable[[Any], Tensor]) -> Tensor:
    """The numbers of a tensor that count; `read` takes a slice of its rows."""
    if math.prod(shape) <= WHOLE or not shape:
        return read(...)
    places = sorted({i * (shape[0] - 1) // (ROWS - 1) for i in range(ROWS)})
    return torch.cat([read(slice(i, i + 1)).reshape(-1)[:WIDTH] for i in places])


def _settings(name: str, config: Config) -> dict[str, Any]:
    """What a part's class takes of a configuration, defaults filled in: files may leave them out, and hold notes besides."""
    takes = inspect.signature(getattr(diffusers, name).__init__).parameters.values() if hasattr(diffusers, name) else ()
    return {"class": name} | {p.name: config.get(p.name, p.default) for p in takes if p.default is not p.empty}


def _of_files(files: Iterable[Path]) -> Iterator[Sized]:
    for path in files:
        pretrained.header(path)
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                piece = file.get_slice(name)
                shape = piece.get_shape()
                if "F" in piece.get_dtype():
                    yield math.prod(shape), _counted(shape, piece.__getitem__)


def _digest(settings: Sequence[Mapping[str, Any]], tensors: Iterable[Sized]) -> str:
    """A hash over settings and tensors, whatever these are called and in whatever order and precision they come."""
    digests = sorted(_digest_of(n, t) for n, t in tensors)
    return hashlib.sha256(json.dumps([settings, digests], sort_keys=True, default=str).encode()).hexdigest()[:12]


def _digest_of(n: int, tensor: Tensor) -> str:
    numbers = tensor.detach().reshape(-1).cpu().to(torch.float16).numpy()
    return hashlib.sha256(b"%d " % n + numbers.tobytes()).hexdigest()
