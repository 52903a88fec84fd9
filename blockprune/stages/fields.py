"""Fields that the requests of several stages share, each written once."""

from __future__ import annotations

import os
from dataclasses import dataclass

from blockprune.model.defaults import MOST_BATCH, MOST_GUIDANCE, MOST_IMAGES, MOST_SAMPLES, MOST_STEPS
from blockprune.model.schedulers import MAX_SEED, SCHEDULERS
from blockprune.request import Request, option

DTYPES = ("float32", "float16", "bfloat16")
MODEL, REMOVE, MEASURES, SAMPLING, SCALE = "Model", "What to remove", "Measures", "Sampling", "Scale"


@dataclass(frozen=True, kw_only=True)
class OnModel(Request):
    """The model and where it runs."""

    model: str = option(
        "tiny-digits",
        "tiny-digits, sd-v1-4, sd-v1-5, sd-v2-1-base, sd-v2-1, sdxl, a diffusers folder, a .safetensors file or a hub id",
        MODEL,
    )
    resolution: str | None = option(None, "image size in pixels, 512 or HEIGHTxWIDTH; the model's own when left out", MODEL)
    device: str | None = option(None, "cpu, cuda, cuda:1 …; cuda where there is one when left out", SCALE, compared=False)
    dtype: str = option("float32", "precision of the weights", MODEL, choices=DTYPES)


@dataclass(frozen=True, kw_only=True)
class Shared(OnModel):
    """Work on a model that several processes share."""

    workers: int = option(1, "processes on this machine", SCALE, least=1, most=max(16, 2 * (os.cpu_count() or 1)), compared=False)


@dataclass(frozen=True, kw_only=True)
class Drawing(Request):
    """How images are drawn."""

    n_images: int | None = option(None, "images per architecture", SAMPLING, least=1, most=MOST_IMAGES, from_model=True)
    steps: int | None = option(None, "denoising steps", SAMPLING, least=1, most=MOST_STEPS, from_model=True)
    cfg_scale: float | None = option(
        None, "classifier-free guidance scale; 1 for none", SAMPLING, least=0, most=MOST_GUIDANCE, from_model=True
    )
    scheduler: str | None = option(None, "the model's own when left out", SAMPLING, choices=tuple(SCHEDULERS))
    seed: int = option(0, "image i uses seed + i", SAMPLING, least=0, most=MAX_SEED)
    batch_size: int | None = option(
        None, "images at a time; changes speed and memory only", SCALE, least=1, most=MOST_BATCH, from_model=True, compared=False
    )


@dataclass(frozen=True, kw_only=True)
class Judging(Request):
    """Who looks at the images, and what they are compared with."""

    prompts: str | None = option(None, "prompts: .txt, .csv or .jsonl", SAMPLING)
    reference: str | None = option(None, "real images for fid and kid: a folder or a `blockprune stats` file", MEASURES)
    detector: str | None = option(None, "inception, pytorch-fid, a transformers folder or hub id", MEASURES)
    inception_weights: str | None = option(None, "inception-2015-12-05.pt", MEASURES, compared=False)
    clip: str | None = option(None, "CLIP model for clip_score, clip_i and clip_t: folder or hub id", MEASURES)
    instance_data_dir: str | None = option(None, "folder with a subject's images, for dino, clip_i and clip_t", MEASURES)
    token: str = option("sks", "the word of the prompts that names the subject", MEASURES)
    dino: str | None = option(None, "vision model for dino, such as facebook/dino-vits16: folder or hub id", MEASURES)


@dataclass(frozen=True, kw_only=True)
class Noising(Request):
    """The samples of a denoising error."""

    eps_samples: int | None = option(
        None,
        "noisy samples for eps_mse and guided_mse, timesteps stratified",
        MEASURES,
        least=1,
        most=MOST_SAMPLES,
        from_model=True,
    )
    data: str | None = option(None, "folder of images for eps_mse; the teacher's own samples when left out", MEASURES)


@dataclass(frozen=True, kw_only=True)
class Measuring(Drawing, Judging, Noising):
    """How something is measured: the images, who judges them, and the samples of a denoising error."""
