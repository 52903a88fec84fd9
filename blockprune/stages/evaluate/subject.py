"""The model that is evaluated, and where a protocol finds its reference and prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from blockprune.data import image_folder
from blockprune.data.image_files import as_stored
from blockprune.errors import UserError
from blockprune.export import pipeline
from blockprune.measures.fid_kid import Detector, Stats
from blockprune.model import presets, pretrained, surgery
from blockprune.model.architecture import Architecture
from blockprune.model.device import device_of
from blockprune.model.graph import BlockGraph
from blockprune.model.identity import identity
from blockprune.model.model import Model, load_model, of_pipeline
from blockprune.model.pretrained import Configs
from blockprune.model.trace import trace
from blockprune.stages import loading
from blockprune.stages.evaluate.protocol import Rules
from blockprune.stages.evaluate.request import EvaluateRequest
from blockprune.stages.fitting import fitted_weights
from blockprune.stages.train.finished import Finished


@dataclass(frozen=True)
class Subject:
    """A model to evaluate, and what is known of its teacher.

    `arch` is what it lacks; `masked` what of that is still there and shall not run. `configs` are those of the teacher and `graph`
    is its network's where the teacher is known; else `graph` is None and `configs` are the model's own. `teacher` and `teacher_id`
    are its name and content id, "" where nothing was removed or it is not known.
    """

    model: Model
    arch: Architecture
    masked: Architecture
    configs: Configs
    graph: BlockGraph | None
    teacher: str
    teacher_id: str


def subject_of(
    request: EvaluateRequest, resolution: str | None, finished: Finished | None, pipe: DiffusionPipeline | None
) -> Subject:
    """The model ready to run: `pipe`, or the one that the request names, whatever `load_model` takes or what was exported.

    An exported folder says itself what is removed; a training run stands for its pipeline/. UserError when there is no such model.
    """
    given = None if pipe is None else of_pipeline(pipe, resolution)
    if finished is not None:
        return _along_training(request, resolution, finished, given)
    folder = loading.pipeline_folder(given.name if given else request.model)
    exported, gone = pipeline.is_exported(folder), surgery.architecture_of(given.network) if given else Architecture()
    if (exported or gone) and request.arch not in ("", "full"):
        raise UserError(f"{str(folder)!r} is pruned already: leave out --arch, or give its teacher as the model")
    if exported:
        dtype = getattr(torch, request.dtype)
        return _exported(folder, given or loading.any_model(str(folder), resolution, device_of(request.device), dtype))
    model = given or _load(request.model, resolution, request)
    removed = presets.parse(request.arch or "full", model.graph)
    teacher = pipeline.teacher_of(model.pipe) if gone else (model.name, model.identity) if removed else ("", "")
    model = replace(model, fits=partial(fitted_weights, model))
    return Subject(model, removed or gone, removed, pretrained.configs_of(model.pipe), model.graph, *teacher)


def _load(name: str, resolution: str | None, request: EvaluateRequest) -> Model:
    return load_model(name, resolution, device_of(request.device), getattr(torch, request.dtype))


def _exported(folder: Path, model: Model) -> Subject:
    about = pipeline.read_teacher(folder)
    arch = pipeline.read_architecture(folder / pipeline.PRUNING)
    configs = replace(pretrained.configs_of(model.pipe), model=str(folder))
    if about:
        configs = replace(configs, unet=about["unet"])
    graph = trace(configs.unet, model.latent, configs.n_tokens) if about else None
    teacher, teacher_id = (about["model"], about["identity"]) if about else ("", "")
    model = replace(model, name=str(folder), defaults=loading.defaults_of_exported(folder))
    return Subject(model, arch, Architecture(), configs, graph, teacher, teacher_id)


def _along_training(request: EvaluateRequest, resolution: str | None, finished: Finished, given: Model | None) -> Subject:
    """The teacher of a training run: `given`, or the one that the request or else the run names."""
    default = EvaluateRequest.__dataclass_fields__["model"].default
    name = given.name if given else finished.teacher if request.model == default else request.model
    if (given.identity if given else identity(name)) != finished.teacher_id:
        raise UserError(f"{name!r} is not the teacher of the run in {str(finished.folder)!r}: give that as --model")
    model = given or _load(name, resolution, request)
    arch = finished.archs[max(finished.places)]
    configs = pretrained.configs_of(model.pipe)
    return Subject(model, arch, Architecture(), configs, model.graph, name, finished.teacher_id)


def laid_out(rules: Rules, reference: str | None, prompts: str | None) -> tuple[str | None, str | None]:
    """Where a protocol's reference and prompts are; UserError for a folder that is not laid out as the protocol says."""
    if not rules.reference_folder or (reference is not None and Path(reference).is_file()):
        return reference, prompts
    wanted = f"DIR/{rules.reference_folder}/ with {rules.n_reference or 'the'} images"
    wanted += f" and DIR/{rules.prompts_file} with the captions" if rules.prompts_file else ""
    if reference is None:
        raise UserError(f"this protocol needs its reference: give --reference DIR, laid out as {wanted}, or a stats.npz")
    images = Path(reference, rules.reference_folder)
    n_images = len(image_folder.ImageFolder(images)) if images.is_dir() and any(images.iterdir()) else 0
    if n_images != (rules.n_reference or n_images) or not n_images:
        raise UserError(f"{str(images)!r} has {n_images} images: this protocol takes --reference DIR, laid out as {wanted}")
    if prompts is None and rules.prompts_file:
        prompts = str(Path(reference, rules.prompts_file))
        if not Path(prompts).is_file():
            raise UserError(f"no prompts {prompts!r}: this protocol takes --reference DIR, laid out as {wanted}; or give --prompts")
    return str(images), prompts


def reference_reader(rules: Rules) -> Callable[[str, Detector], Stats]:
    """How a protocol reads its reference: a folder's images as the protocol stores them; a file of statistics as it is."""

    def read(where: str, detector: Detector) -> Stats:
        if not Path(where).is_dir():
            return image_folder.read_reference(where, detector)
        prepared = f"{rules.file}, {rules.resize} pixels" if rules.resize else "as they are"
        return image_folder.cached_stats(image_folder.ImageFolder(where), detector, prepared, lambda image: as_stored(image, rules))

    return read
