"""From a user's words to what a command works on: a pipeline, its graph, judges of images, prompts and data."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from blockprune.assets import ASSETS
from blockprune.data import captions, image_folder
from blockprune.data.digits import DigitScenes
from blockprune.data.image_files import MAX_ASPECT, as_stored
from blockprune.decode import Object, checked, read_json
from blockprune.errors import UserError
from blockprune.export import pipeline
from blockprune.measures import detectors
from blockprune.measures.images import Judges
from blockprune.measures.statistics import Detector, Stats
from blockprune.model import presets, pretrained, surgery
from blockprune.model.architecture import Architecture, BlockGraph
from blockprune.model.pretrained import Configs
from blockprune.model.sampling import encode_images
from blockprune.model.trace import trace
from blockprune.stages.evaluate.protocol import Rules

GENERIC_PROMPTS = ASSETS / "prompts.txt"
DEFAULTS = {"n_images": 64, "steps": 25, "cfg_scale": 7.5, "batch_size": 4, "eps_samples": 64}
OWN = "blockprune.json"
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


class Defaults(msgspec.Struct, forbid_unknown_fields=True):
    """The `blockprune.json` of a model folder."""

    n_images: Annotated[int, Meta(ge=1, le=10**7)] = 1
    steps: Annotated[int, Meta(ge=1, le=10_000)] = 1
    cfg_scale: Annotated[float, Meta(ge=0, le=10_000)] = 1.0
    batch_size: Annotated[int, Meta(ge=1, le=10**6)] = 1
    eps_samples: Annotated[int, Meta(ge=1, le=10**7)] = 1
    detector: str = ""
    clip: str = ""
    reference: str = ""
    prompts: str = ""
    data: str = ""


def defaults_of(model: str) -> dict[str, Any]:
    """What a model folder's own `blockprune.json` says about scoring it, over the general defaults; its paths made absolute."""
    folder = pretrained.BUILT_IN.get(model, Path(model))
    file = folder / OWN
    if not file.exists():
        return dict(DEFAULTS)
    remedy = "mend it or delete it"
    own = read_json(file, Object, remedy)
    checked(own, Defaults, repr(str(file)), f"it may have {', '.join(Defaults.__struct_fields__)}; {remedy}")
    inside = {key: str(folder / own[key]) for key in (*PATHS, "data") if key in own and (folder / own[key]).exists()}
    return {**DEFAULTS, **own, **inside}


def load_bench(model: str, resolution: str | None, device: torch.device, dtype: torch.dtype) -> Bench:
    """The teacher `model` ready to run. Raises UserError for everything that `checkpoints.load` does."""
    config = pretrained.configs(model)
    latent = config.latent(resolution)
    pipe = pretrained.load(model, device, dtype)
    graph = trace(config.unet, latent, config.n_tokens)
    return Bench(model, pipe, graph, latent, pretrained.identity(model), defaults_of(model))


@dataclass(frozen=True)
class Subject:
    """A model to evaluate: its pipeline as it is, and what is known of its U-Net's teacher.

    `configs` are those of the teacher and `graph` is its U-Net's where the teacher is known; else `graph` is None and `configs` are
    the model's own. `identity` is the content id of the model or, where blocks were removed here, of its teacher.
    """

    name: str
    pipe: Any
    arch: Architecture
    configs: Configs
    graph: BlockGraph | None
    latent: tuple[int, int]
    identity: str
    teacher: str
    teacher_id: str
    defaults: Mapping[str, Any]


def load_subject(model: str, arch: str, resolution: str | None, device: torch.device, dtype: torch.dtype) -> Subject:
    """The model ready to run, `arch` removed ("" or "full" for nothing): whatever `checkpoints.load` takes, or what was exported.

    An exported folder says itself what is removed; a training run stands for its pipeline/. UserError when there is no such model.
    """
    folder = Path(model)
    if os.path.isfile(folder / "run.json") and (folder / "pipeline").is_dir():
        folder = folder / "pipeline"
    if pipeline.is_exported(folder):
        if arch not in ("", "full"):
            raise UserError(f"{str(folder)!r} is pruned already: leave out --arch, or give its teacher as the model")
        return _exported(folder, resolution, device, dtype)
    bench = load_bench(model, resolution, device, dtype)
    removed = presets.parse(arch or "full", bench.graph)
    if removed:
        bench.pipe.unet = surgery.prune(bench.pipe.unet, removed)
    teacher = (bench.name, bench.identity) if removed else ("", "")
    configs = pretrained.configs(model)
    return Subject(model, bench.pipe, removed, configs, bench.graph, bench.latent, bench.identity, *teacher, bench.defaults)


def _exported(folder: Path, resolution: str | None, device: torch.device, dtype: torch.dtype) -> Subject:
    said = pipeline.read_teacher(folder)
    pipe = pipeline.load_pipeline(folder, device, dtype)
    arch = pipeline.read_architecture(folder / pipeline.PRUNING)
    text = {
        name: encoder.config.to_dict() | {"architectures": [type(encoder).__name__]}
        for name in pretrained.TEXT
        if (encoder := getattr(pipe, name, None)) is not None
    }
    unet = said["unet"] if said else dict(pipe.unet.config)
    configs = Configs(str(folder), unet, dict(pipe.vae.config), text, dict(pipe.scheduler.config))
    latent = configs.latent(resolution)
    graph = trace(unet, latent, configs.n_tokens) if said else None
    teacher, teacher_id = (said["model"], said["identity"]) if said else ("", "")
    own = defaults_of(str(folder)) if (folder / OWN).is_file() else _defaults_of_teacher(teacher, teacher_id)
    return Subject(str(folder), pipe, arch, configs, graph, latent, pipeline.exported_identity(folder), teacher, teacher_id, own)


def _defaults_of_teacher(model: str, identity: str) -> dict[str, Any]:
    """A teacher's own defaults, where it is still there under its name."""
    there = model in pretrained.BUILT_IN or Path(model, OWN).is_file()
    return defaults_of(model) if there and pretrained.identity(model) == identity else dict(DEFAULTS)


def prompts_of(path: str | None, bench: Bench | Subject) -> list[str]:
    """The prompts of a file, else the model's own, else sixteen general ones."""
    return captions.read_prompts(Path(path or bench.defaults.get("prompts", GENERIC_PROMPTS)))


def judges_of(
    bench: Bench | Subject,
    detector: str | None,
    weights: str | None,
    clip: str | None,
    reference: str | None,
    read: Callable[[str, Detector], Stats] = image_folder.read_reference,
) -> Judges:
    """The detector, CLIP scorer and reference asked for, else the model's own; without either, None in their place."""
    device = str(bench.pipe.device)
    name = detector or ("inception" if weights else bench.defaults.get("detector"))
    name = name or ("inception" if reference else None)
    chosen = detectors.load_detector(name, device, Path(weights) if weights else None) if name else None
    clip = clip or bench.defaults.get("clip")
    where = reference or (bench.defaults.get("reference") if not detector else None)
    return Judges(
        detector=chosen,
        reference=read(where, chosen) if where and chosen else None,
        scorer=detectors.load_scorer(clip, device) if clip else None,
    )


def laid_out(rules: Rules, reference: str | None, prompts: str | None) -> tuple[str | None, str | None]:
    """Where a protocol's reference and prompts are; UserError for a folder that is not laid out as the protocol says."""
    if not rules.reference_folder or (reference is not None and Path(reference).is_file()):
        return reference, prompts
    wanted = f"DIR/{rules.reference_folder}/ with {rules.n_reference or 'the'} images"
    wanted += f" and DIR/{rules.prompts_file} with the captions" if rules.prompts_file else ""
    if reference is None:
        raise UserError(f"this protocol needs its reference: give --reference DIR, laid out as {wanted}, or a stats.npz")
    images = Path(reference, rules.reference_folder)
    found = len(image_folder.ImageFolder(images)) if images.is_dir() and any(images.iterdir()) else 0
    if found != (rules.n_reference or found) or not found:
        raise UserError(f"{str(images)!r} has {found} images: this protocol takes --reference DIR, laid out as {wanted}")
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


def training_data(model: str, data: str | None, option: str) -> str:
    """The training pairs asked for, else the model's own; UserError, which names the option, when there are neither."""
    data = defaults_of(model).get("data") if data is None else data
    if data is None:
        raise UserError(
            f"no training data, and {model!r} has none of its own: give {option}, a folder with metadata.csv or metadata.jsonl, "
            ".tar shards or a `blockprune cache` folder"
        )
    return data


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
    pairs, images = [], image_folder.ImageFolder(source, max_aspect=MAX_ASPECT)
    for picture in images:
        pairs.append((image_folder.resize_centre_crop(picture.image, side), images.captions.get(picture.name, "")))
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
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
