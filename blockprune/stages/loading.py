"""From a user's words to what a stage works with: judges of images, prompts, clean images for noisy samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockprune.data import captions, image_folder
from blockprune.data.digits import DigitScenes
from blockprune.data.image_files import MAX_ASPECT
from blockprune.errors import UserError
from blockprune.measures import detectors
from blockprune.measures.fid_kid import Detector, Stats
from blockprune.measures.images import Judges
from blockprune.model.defaults import GENERIC_PROMPTS
from blockprune.model.model import Model


def prompts_of(path: str | None, model: Model) -> list[str]:
    """The prompts of a file, else the model's own, else sixteen general ones."""
    return captions.read_prompts(Path(path or model.defaults.get("prompts", GENERIC_PROMPTS)))


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
    name = detector or ("inception" if weights else model.defaults.get("detector"))
    name = name or ("inception" if reference else None)
    chosen = detectors.load_detector(name, device, Path(weights) if weights else None) if name else None
    clip = clip or model.defaults.get("clip")
    where = reference or (model.defaults.get("reference") if not detector else None)
    return Judges(
        detector=chosen,
        reference=read(where, chosen) if where and chosen else None,
        scorer=detectors.load_scorer(clip, device) if clip else None,
    )


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
    }
