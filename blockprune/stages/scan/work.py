"""What a scan will do, counted from its request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from blockprune.cost.work import Passes, Work, recorded_bytes, share
from blockprune.measures.measure import measure
from blockprune.measures.runner import with_ratio
from blockprune.model.architecture import Architecture
from blockprune.stages.counts import Counts
from blockprune.stages.outline import Outline
from blockprune.stages.scan.request import ScanRequest
from blockprune.stages.scan.run import removals


def work(request: ScanRequest, outline: Outline) -> Work:
    """The whole of a scan, as if nothing of it were there yet. Errors as those of the request's architectures."""
    request = request.filled(outline.defaults)
    archs, counts = removals(outline.graph, request), Counts.of(outline, request)
    measures = with_ratio(request.measures or counts.possible())
    passes = list(_passes(counts, archs, measures))
    images = sum(measure(m).kind == "images" for m in measures) > 0
    teacher = any(p.step == "teacher's images" for p in passes)
    n = counts.protocol.n_images * ((len(archs) if images else 0) + teacher)
    itemsize = getattr(torch, request.dtype).itemsize
    mem_bytes = outline.scoring_bytes(passes, itemsize) + recorded_bytes(outline.graph, 2 * counts.batch_size, itemsize)
    encoded = counts.n_noisy if counts.clean and any(measure(m).kind == "denoising" for m in measures) else 0
    return Work(passes, n, encoded, mem_bytes, outline.image_bytes(counts.n_pictures * (len(archs) + 1)))


def _passes(counts: Counts, archs: Mapping[str, Architecture], measures: Sequence[str]) -> Iterator[Passes]:
    graph, students = counts.outline.graph, list(archs.values())
    denoising = [m for m in measures if measure(m).kind == "denoising"]
    images = any(measure(m).kind == "images" for m in measures)
    fitted = any(arch.fits for arch in students)
    if images or ((denoising or fitted) and not counts.clean):
        yield from counts.drawn("teacher's images")
    yield from counts.fitted(students)
    for name in denoising:
        yield from counts.denoised(name, counts.n_noisy)
        for arch in students:
            yield from counts.denoised(name, counts.n_noisy, share(graph, arch, replayed=True))
    if {"latency", "memory"} & {*measures}:
        yield from counts.timed([Architecture(), *students], "memory" in measures)
    for arch in students if images else ():
        yield from counts.drawn("images", arch=arch)
