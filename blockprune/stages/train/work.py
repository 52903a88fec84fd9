"""What a distillation will do, counted from its request."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from blockprune.cost.work import Passes, Work, activation_bytes, share
from blockprune.data.cache import INDEX
from blockprune.data.training_data import source_of
from blockprune.model.architecture import Architecture
from blockprune.stages.counts import Counts
from blockprune.stages.outline import TRAINED, Outline
from blockprune.stages.train.phases import PlannedPhase, planned
from blockprune.stages.train.recipe import Recipe, read_recipe
from blockprune.stages.train.request import Stepping, TrainRequest
from blockprune.stages.train.samples import data_of

CHECKPOINTED = 4 / 3  # what an update takes with gradient checkpointing, for one without
FLOAT = 4
EXPORT = Passes("check of the pipeline", 2, 1)  # of the student as it was trained, and as it was read back


def work(request: TrainRequest, outline: Outline) -> Work:
    """The whole of a distillation in one process; fits, whose number shows only as they are made, are left out.

    Errors as those of the request's architecture, recipe and data.
    """
    request, recipe = request.filled(outline.defaults), read_recipe(request.recipe)
    phases = planned(recipe, request, outline.graph)
    return counted(outline, request, recipe, phases, n_encoded(outline, request.data, request))


def counted(outline: Outline, request: TrainRequest, recipe: Recipe, phases: Sequence[PlannedPhase], encoded: int) -> Work:
    """The whole of a filled request with its phases, for which so many images must be encoded."""
    arch = phases[-1].arch
    passes = [p for phase in phases for p in updates(outline, request, recipe, phase.arch, phase.last - phase.first)]
    n, times = images_of(outline, request), n_validations(request)
    passes += [*validations(outline, request, arch, n, times), EXPORT]
    params = outline.graph.cost(arch).params
    mem_bytes = outline.weight_bytes(FLOAT) + params * FLOAT * (TRAINED + request.ema) + activations(outline, request, 1)
    disk_bytes = outline.weight_bytes(FLOAT) + snapshots(request) * params * FLOAT * (3 + request.ema)
    return Work(passes, n * times, encoded, mem_bytes, disk_bytes)


def updates(outline: Outline, request: Stepping, recipe: Recipe, arch: Architecture, n: int) -> Iterator[Passes]:
    """The passes of teacher and student in `n` updates, and in the check of the taps before."""
    rows, passes = request.train_batch_size, n * request.gradient_accumulation_steps
    part = share(outline.graph, arch)
    if recipe.feature:
        yield from (Passes("check of the taps", 1, 1), Passes("check of the taps", 1, 1, part))
    yield Passes("updates: teacher", passes, rows)
    yield Passes("updates: student", passes, rows, part * (CHECKPOINTED if request.gradient_checkpointing else 1), learns=True)


def n_validations(request: Stepping) -> int:
    """How often images are looked at, the last time at the end."""
    return 1 + ((request.max_train_steps - 1) // request.validation_steps if request.validation_steps else 0)


def images_of(outline: Outline, request: Stepping) -> int:
    """The images of a validation: all for judges, without any those that are shown."""
    counts = Counts.of(outline, request.drawing().filled(outline.defaults))
    return counts.protocol.n_images if counts.judged else counts.n_pictures


def validations(outline: Outline, request: Stepping, arch: Architecture, n: int, times: int) -> Iterator[Passes]:
    """The passes that draw `n` images so many times."""
    counts = Counts.of(outline, request.drawing().filled(outline.defaults))
    return counts.drawn("validation images", n, arch, times)


def n_encoded(outline: Outline, data: str | None, request: Stepping) -> int:
    """Images that the VAE encodes: each once, and mirrored once more; none of a cache."""
    text = data_of(outline.configs.model, outline.defaults, data)
    if os.path.isfile(Path(text) / INDEX):
        return 0
    side = outline.latent[0] * outline.configs.vae_factor
    n = request.max_train_steps * request.train_batch_size * request.gradient_accumulation_steps
    return min(n, len(source_of(text, side)) * (1 + request.random_flip))


def snapshots(request: Stepping) -> int:
    """How many checkpoints there are at the end."""
    return min(request.checkpoints_total_limit, -(-request.max_train_steps // request.checkpointing_steps))


def activations(outline: Outline, request: Stepping, samples: int) -> int:
    """Bytes of what an update keeps for its way back, `samples` rows for each image of a batch."""
    itemsize = FLOAT if request.mixed_precision == "no" else 2
    rows = request.train_batch_size * samples
    return activation_bytes(outline.graph, rows, itemsize, learns=True, checkpointing=request.gradient_checkpointing)
