"""From a user's words to what a stage works with: judges of images, prompts, clean images for noisy samples."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockprune.data import captions, image_folder
from blockprune.data.digits import DigitScenes
from blockprune.data.image_files import MAX_ASPECT, as_tensor
from blockprune.data.subject_images import subject_pixels
from blockprune.errors import UserError
from blockprune.export import pipeline
from blockprune.measures import detectors
from blockprune.measures.fid_kid import Detector, Stats
from blockprune.measures.images import Judges
from blockprune.measures.subject import Subject
from blockprune.model.defaults import BUILT_IN, DEFAULTS, GENERIC_PROMPTS, OWN, defaults_of, judge_names
from blockprune.model.identity import identity
from blockprune.model.model import Model, load_model, of_pipeline
from blockprune.stages.fields import Judging


def prompts_of(path: str | None, model: Model) -> list[str]:
    """The prompts of a file, else the model's own, else sixteen general ones."""
    return captions.read_prompts(Path(path or model.defaults.get("prompts", GENERIC_PROMPTS)))


def pipeline_folder(name: str) -> Path:
    """The folder that a model's name is; of a distillation's run directory that of its pipeline."""
    folder = Path(name)
    return folder / "pipeline" if os.path.isfile(folder / "run.json") and (folder / "pipeline").is_dir() else folder


def any_model(name: str, resolution: str | None, device: str | torch.device, dtype: torch.dtype = torch.float32) -> Model:
    """A model as `load_model` takes it, the pipeline of an exported folder, or that of a distillation's run directory."""
    if not pipeline.is_exported(folder := pipeline_folder(name)):
        return load_model(name, resolution, device, dtype)
    model = of_pipeline(pipeline.load_pipeline(folder, device, dtype), resolution)
    identify = partial(pipeline.exported_identity, folder)
    return replace(model, name=str(folder), identify=identify, defaults=defaults_of_exported(folder))


def defaults_of_exported(folder: Path) -> dict[str, Any]:
    """How an exported folder is scored: as it says itself, else as its teacher, where that is still there under its name."""
    if (folder / OWN).is_file():
        return defaults_of(str(folder))
    about = pipeline.read_teacher(folder) or {"model": "", "identity": ""}
    teacher = about["model"]
    there = teacher in BUILT_IN or Path(teacher, OWN).is_file()
    return defaults_of(teacher) if there and identity(teacher) == about["identity"] else dict(DEFAULTS)


def judges_of(
    model: Model,
    detector: str | None,
    weights: str | None,
    clip: str | None,
    reference: str | None,
    read: Callable[[str, Detector], Stats] = image_folder.read_reference,
) -> Judges:
    """The detector, CLIP scorer and reference asked for, else the model's own; without either, None in their place."""
    device = str(model.pipe.device)
    name, clip = judge_names(model.defaults, detector, weights, clip, reference)
    chosen = detectors.load_detector(name, device, Path(weights) if weights else None) if name else None
    where = reference or (model.defaults.get("reference") if not detector else None)
    return Judges(
        detector=chosen,
        reference=read(where, chosen) if where and chosen else None,
        scorer=detectors.load_scorer(clip, device) if clip else None,
    )


def with_subject(judges: Judges, model: Model, request: Judging) -> Judges:
    """The judges with the subject whose images the request names; as they are where it names none."""
    if request.instance_data_dir is None:
        return judges
    name = request.dino or model.defaults.get("dino")
    vision = detectors.load_vision(name, str(model.pipe.device)) if name else None
    return replace(judges, subject=Subject(subject_images(request.instance_data_dir), request.token, vision, judges.scorer))


def subject_images(folder: str) -> list[Tensor]:
    """The images of a subject's folder, (1, 3, H, W) uint8 each. UserError when there are too few, or one cannot be read."""
    return [as_tensor(pixels)[None] for pixels in subject_pixels(Path(folder))]


def clean_latents(model: Model, source: str | None, n: int, batch_size: int) -> tuple[Tensor, list[str]] | None:
    """Up to `n` images of `source` as latents (M, C, h, w) on CPU, with their captions.

    `source` is "digits", a folder of images (one without a caption gets the empty prompt), or None for none.
    """
    source = source or model.defaults.get("data")
    if source is None:
        return None
    height, width = model.pixels
    if height != width:
        raise UserError(f"--data needs a square resolution: got {height}x{width}")
    pairs = _scenes(n) if source == "digits" else _folder(source, n, height)
    images, captions = torch.stack([image for image, _ in pairs]), [caption for _, caption in pairs]
    parts = [model.encode_images(images[i : i + batch_size]).float().cpu() for i in range(0, len(images), batch_size)]
    return torch.cat(parts), captions


def _scenes(n: int) -> list[tuple[Tensor, str]]:
    return [(torch.from_numpy(image).permute(2, 0, 1), caption) for image, caption, _ in DigitScenes("held-out", 0, n)]


def _folder(source: str, n: int, side: int) -> list[tuple[Tensor, str]]:
    pairs, images = [], image_folder.ImageFolder(source, max_aspect=MAX_ASPECT)
    for picture in images:
        pairs.append((image_folder.resize_centre_crop(picture.image, side), images.captions.get(picture.name, "")))
        if len(pairs) == n:
            break
    return pairs


def describe(judges: Judges) -> dict[str, Any]:
    """Who judges, for the record of a run."""
    stats = judges.reference
    return {
        "detector": judges.detector.name if judges.detector else None,
        "clip": judges.scorer.name if judges.scorer else None,
        "reference": hashlib.sha256(stats.mu.tobytes() + stats.sigma.tobytes()).hexdigest()[:12] if stats else None,
        "n_reference": stats.n if stats else None,
    } | ({"dino": judges.subject.vision.name} if judges.subject and judges.subject.vision else {})
