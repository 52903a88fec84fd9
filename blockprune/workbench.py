"""From a user's words to what a command works on: a pipeline, its graph, judges of images, prompts and data."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blockprune import checkpoints, data, features
from blockprune.arch import BlockGraph
from blockprune.digits import DigitScenes
from blockprune.errors import UserError
from blockprune.imaging import Judges
from blockprune.sampling import encode_images
from blockprune.trace import trace

GENERIC_PROMPTS = Path(__file__).parent / "prompts.txt"
DEFAULTS = {"n_images": 64, "steps": 25, "cfg_scale": 7.5, "batch_size": 4, "eps_samples": 64}
PATHS = ("detector", "clip", "reference", "prompts")


@dataclass(frozen=True)
class Bench:
    """A loaded teacher: its pipeline, its graph at one latent size, its content id, and its defaults for scoring."""

    name: str
    pipe: Any
    graph: BlockGraph
    latent: tuple[int, int]
    identity: str
    defaults: Mapping[str, Any]


def defaults_of(model: str) -> dict[str, Any]:
    """What a model folder's own `blockprune.json` says about scoring it, over the general defaults; its paths made absolute."""
    folder = checkpoints.BUILT_IN.get(model, Path(model))
    file = folder / "blockprune.json"
    if not file.is_file():
        return dict(DEFAULTS)
    try:
        own = json.loads(file.read_text())
    except ValueError as err:
        raise UserError(f"cannot read {str(file)!r}: {err}; mend it or delete it") from None
    known = [*DEFAULTS, *PATHS, "data"]
    if unknown := own.keys() - set(known):
        raise UserError(f"{str(file)!r} has unknown keys {', '.join(sorted(unknown))}: it may have {', '.join(known)}")
    inside = {key: str(folder / own[key]) for key in PATHS if key in own and (folder / own[key]).exists()}
    return {**DEFAULTS, **own, **inside}


def load_bench(model: str, resolution: str | None, device: torch.device, dtype: torch.dtype) -> Bench:
    """The teacher `model` ready to run. Raises UserError for everything that `checkpoints.load` does."""
    config = checkpoints.configs(model)
    latent = config.latent(resolution)
    pipe = checkpoints.load(model, device, dtype)
    graph = trace(config.unet, latent, config.n_tokens)
    return Bench(model, pipe, graph, latent, checkpoints.identity(model), defaults_of(model))


def prompts_of(path: str | None, bench: Bench) -> list[str]:
    """The prompts of a file, else the model's own, else sixteen general ones."""
    return data.read_prompts(Path(path or bench.defaults.get("prompts", GENERIC_PROMPTS)))


def judges_of(bench: Bench, detector: str | None, weights: str | None, clip: str | None, reference: str | None) -> Judges:
    """The detector, CLIP scorer and reference asked for, else the model's own; without either, None in their place."""
    device = str(bench.pipe.device)
    name = detector or ("inception" if weights else bench.defaults.get("detector"))
    name = name or ("inception" if reference else None)
    chosen = features.load_detector(name, device, Path(weights) if weights else None) if name else None
    clip = clip or bench.defaults.get("clip")
    where = reference or (bench.defaults.get("reference") if not detector else None)
    return Judges(
        detector=chosen,
        reference=data.read_reference(where, chosen) if where and chosen else None,
        scorer=features.load_scorer(clip, device) if clip else None,
    )


def clean_latents(bench: Bench, source: str | None, n: int, batch_size: int) -> tuple[Tensor, list[str]] | None:
    """Up to `n` images of `source` as latents (M, C, h, w) on CPU, with their captions.

    `source` is "digits", a folder of images (one without a caption gets the empty prompt), or None for none.
    """
    source = source or bench.defaults.get("data")
    if source is None:
        return None
    height, width = (side * bench.pipe.vae_scale_factor for side in bench.latent)
    if height != width:
        raise UserError(f"--data needs a square resolution: got {height}x{width}")
    pairs = _scenes(n) if source == "digits" else _folder(source, n, height)
    images, captions = torch.stack([image for image, _ in pairs]), [caption for _, caption in pairs]
    parts = [encode_images(bench.pipe, images[i : i + batch_size]).float().cpu() for i in range(0, len(images), batch_size)]
    return torch.cat(parts), captions


def _scenes(n: int) -> list[tuple[Tensor, str]]:
    return [(torch.from_numpy(image).permute(2, 0, 1), caption) for image, caption, _ in DigitScenes("held-out", 0, n)]


def _folder(source: str, n: int, side: int) -> list[tuple[Tensor, str]]:
    pairs = []
    for picture in data.ImageFolder(source):
        pairs.append((data.resize_centre_crop(picture.image, side), picture.caption or ""))
        if len(pairs) == n:
            break
    return pairs


def fingerprint(values: Sequence[str]) -> str:
    """A 12-digit hash of a list of texts."""
    return hashlib.sha256("\0".join(values).encode()).hexdigest()[:12]


def describe(judges: Judges) -> dict[str, Any]:
    """Who judges, for the record of a run."""
    stats = judges.reference
    return {
        "detector": judges.detector.name if judges.detector else None,
        "clip": judges.scorer.name if judges.scorer else None,
        "reference": hashlib.sha256(stats.mu.tobytes() + stats.sigma.tobytes()).hexdigest()[:12] if stats else None,
        "n_reference": stats.n if stats else None,
    }


def made_with(device: torch.device) -> dict[str, str]:
    """Versions and the machine, for the record of a run."""
    packages = ("blockprune", "torch", "diffusers", "transformers", "numpy")
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {"python": platform.python_version(), **{p: version(p) for p in packages}, "processor": processor}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
