"""What a personalisation will do, counted from its request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from blockprune.cost.work import Passes, Work, share
from blockprune.model.sampling import Protocol
from blockprune.stages import loading
from blockprune.stages.counts import OF_MEMORY
from blockprune.stages.outline import TRAINED, Outline, outline_of
from blockprune.stages.personalise.class_images import ClassImages, class_prompts
from blockprune.stages.personalise.dataset import requests_of
from blockprune.stages.personalise.request import PersonaliseRequest
from blockprune.stages.plan import N_PICTURES
from blockprune.stages.train.work import EXPORT, FLOAT, activations, n_validations, snapshots, validations


def work(request: PersonaliseRequest, outline: Outline) -> Work:
    """The whole of a personalisation, of every subject of a protocol. Errors as those of the subject's images."""
    requests = requests_of(request) if request.protocol else [request]
    parts = [counted(r.filled(outline.defaults), outline) for r in requests]
    first, passes = parts[0], [p for part in parts for p in part.passes]
    decoded, encoded = sum(p.decoded for p in parts), sum(p.encoded for p in parts)
    return Work(passes, decoded, encoded, first.mem_bytes, sum(p.disk_bytes for p in parts))


def counted(request: PersonaliseRequest, outline: Outline) -> Work:
    """The whole of a filled request for one subject."""
    n_subject = len(loading.subject_images(request.instance_data_dir or ""))
    prior = request.with_prior_preservation
    n, times = _n_drawn(request, outline), n_validations(request)
    drawn = list(_class_images(request, outline)) if prior else []
    passes = [*drawn, *_updates(request, outline, 1 + prior), *validations(outline, request, outline.lacks, n, times)]
    passes += [EXPORT] if request.rank is None else []
    params = outline.graph.cost(outline.lacks).params
    learnt = params if request.rank is None else params // 100  # adapters are small
    mem_bytes = outline.weight_bytes(FLOAT) + learnt * FLOAT * (TRAINED - 1) + activations(outline, request, 1 + prior)
    disk_bytes = (outline.weight_bytes(FLOAT) if request.rank is None else 0) + snapshots(request) * learnt * FLOAT * 3
    encoded = (n_subject + (request.num_class_images if prior else 0)) * (1 + request.random_flip)
    decoded = n * times + (request.num_class_images if drawn else 0)
    return Work(passes, decoded, encoded, mem_bytes, disk_bytes)


def _n_drawn(request: PersonaliseRequest, outline: Outline) -> int:
    """The images of a validation: all for judges, without any those that are shown."""
    judged = any(given or outline.defaults.get(name) for name, given in {"clip": request.clip, "dino": request.dino}.items())
    return (request.n_images or 1) if judged else min(N_PICTURES, request.n_images or 1)


def _updates(request: PersonaliseRequest, outline: Outline, samples: int) -> Iterator[Passes]:
    """`samples` rows for each of the subject's images; the last pass says what memory an update takes."""
    rows, part = request.train_batch_size * samples, share(outline.graph, outline.lacks)
    yield Passes("updates", request.max_train_steps * request.gradient_accumulation_steps, rows, part, learns=True)
    yield Passes("memory of an update", 1, rows, OF_MEMORY * part, learns=True)


def _class_images(request: PersonaliseRequest, outline: Outline) -> Iterator[Passes]:
    """The images that the folder of the class lacks, in the blocks in which all would be drawn."""
    images = ClassImages(Path(request.class_data_dir or ""), class_prompts(request), request.num_class_images)
    size, missing = request.sample_batch_size, images.missing()
    drawer = outline if request.teacher is None else outline_of(request.teacher, request.resolution)
    filled = request.filled(drawer.defaults)
    protocol = Protocol(1, filled.denoising_steps or 1, filled.cfg_scale or 0.0, 0, drawer.latent, filled.scheduler or "")
    for start in sorted({i // size * size for i in missing}):
        block = replace(protocol, n_images=min(size, images.n - start))
        yield from drawer.drawing("class images", block, size, share(drawer.graph, drawer.lacks))
