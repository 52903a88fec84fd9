"""What an evaluation will do, counted from its request."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from blockprune.cost.work import Passes, Work, share
from blockprune.measures.measure import measure
from blockprune.model import presets
from blockprune.model.architecture import Architecture
from blockprune.model.sampling import Protocol
from blockprune.stages.counts import OF_MEMORY, WARMUP
from blockprune.stages.evaluate.plan import filled, settings_of
from blockprune.stages.evaluate.protocol import Setting, read_protocol
from blockprune.stages.evaluate.request import EvaluateRequest
from blockprune.stages.outline import Outline
from blockprune.stages.train.finished import Finished


def model_of(request: EvaluateRequest) -> str:
    """The model whose outline is needed: of a training's checkpoints its teacher. UserError for a folder without any."""
    given = request.model != EvaluateRequest.__dataclass_fields__["model"].default
    return request.model if given or not request.checkpoints else Finished.of(Path(request.checkpoints)).teacher


def work(request: EvaluateRequest, outline: Outline) -> Work:
    """The whole of an evaluation. Errors as those of its protocol, architecture and checkpoints."""
    rules = read_protocol(request.protocol)
    request = filled(request, rules, outline.defaults)
    finished = Finished.of(Path(request.checkpoints)) if request.checkpoints else None
    masked = presets.parse(request.arch or "full", outline.graph)
    archs: dict[int | None, Architecture] = dict(finished.archs.items()) if finished else {None: masked | outline.lacks}
    return counted(request, outline, {setting: archs[setting.checkpoint] for setting in settings_of(request, list(archs))})


def counted(request: EvaluateRequest, outline: Outline, of_setting: Mapping[Setting, Architecture]) -> Work:
    """The whole of a filled request, for the settings with what the outlined network lacks at each."""
    drawn = list(_drawn(request, outline, of_setting))
    passes = [*drawn, *_timed(request, outline, of_setting)]
    n = (request.n_images or 1) * (len(of_setting) + len(_of_teacher(request, of_setting)))
    encoded = n if request.task == "img2img" else 0
    mem_bytes = outline.scoring_bytes(passes, getattr(torch, request.dtype).itemsize)
    return Work(passes, n, encoded, mem_bytes, outline.image_bytes(n) if request.save_images else 0)


def _of_teacher(request: EvaluateRequest, of_setting: Mapping[Setting, Architecture]) -> list[Setting]:
    """The settings at which the teacher draws, for a measure that compares with its images, unless a run has them."""
    paired = any(measure(name).paired for name in request.measures)
    there = request.teacher is not None and Path(request.teacher, "run.json").is_file()
    alike = all(not arch and setting == setting.of_teacher for setting, arch in of_setting.items())
    return [] if not paired or there or (alike and not request.teacher) else list(dict.fromkeys(s.of_teacher for s in of_setting))


def _drawn(request: EvaluateRequest, outline: Outline, of_setting: Mapping[Setting, Architecture]) -> Iterator[Passes]:
    def images(setting: Setting, step: str, arch: Architecture) -> Iterator[Passes]:
        protocol = Protocol(request.n_images or 1, setting.steps, setting.cfg_scale, 0, outline.latent, setting.scheduler)
        part = share(outline.graph, arch)
        yield from outline.drawing(step, protocol, request.batch_size or 1, part, strength=setting.strength)

    for setting in _of_teacher(request, of_setting):
        yield from images(setting, "teacher's images", Architecture())
    for setting, arch in of_setting.items():
        yield from images(setting, "images", arch)


def _timed(request: EvaluateRequest, outline: Outline, of_setting: Mapping[Setting, Architecture]) -> Iterator[Passes]:
    """Steps of each network in turn with the teacher's, and the U-Net's lines of the table of components."""
    networks = {(s.quantize, s.checkpoint): share(outline.graph, arch) for s, arch in of_setting.items()}
    for part in networks.values() if request.latency else ():
        for of_one in (1.0, part):
            yield Passes("latency", WARMUP + request.rounds, 1, of_one)
            yield Passes("memory", 1, 1, OF_MEMORY * of_one)
    if request.components:
        setting, arch = next(iter(of_setting.items()))
        for part in (1.0, share(outline.graph, arch)) if arch else (1.0,):
            yield Passes("components", (1 + request.rounds) * (1 + 2 * setting.steps), 1, part)
