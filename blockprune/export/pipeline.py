"""A pruned U-Net on disk: bare, with the architecture without which its weights mean nothing, or in a whole pipeline's folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from accelerate.utils import recursively_apply
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from blockprune import decode
from blockprune.errors import UserError
from blockprune.export.model_card import model_card
from blockprune.export.stock_config import BlockMap, Stock, expressible, slots
from blockprune.model import pretrained, surgery
from blockprune.model.architecture import Architecture
from blockprune.model.compare import difference
from blockprune.model.config_schema import Config, UNetConfig
from blockprune.model.defaults import BUILT_IN
from blockprune.model.families import family_of
from blockprune.model.identity import identity
from blockprune.model.pretrained import Configs
from blockprune.model.trace import trace
from blockprune.runs.atomic import writing, writing_folder

# not the name that stock loaders look for: they would fill the removed blocks of the full configuration at random
WEIGHTS = "pruned_unet.safetensors"
# stock loaders look here for the names of weights files, and put the one that they miss into their error
INDEX = "diffusion_pytorch_model.safetensors.index.json"
HOW_TO_LOAD = (
    "(a pruned U-Net: load its pipeline with blockprune.load_pipeline, a bare one with blockprune.export.pipeline.load_student)"
)
ARCHITECTURE = "architecture.json"
PRUNING = "pruning"  # of an exported folder; nothing there is read by diffusers
BLOCK_MAP = "block_map.json"
TEACHER = "teacher.json"
SAVE = "save it again"


def save_student(unet: UNet2DConditionModel, arch: Architecture, folder: Path) -> None:
    """Writes a pruned (or masked) U-Net that has exactly the weights of `arch`; UserError when it has others.

    Its architecture.json comes last: a folder that has one is whole.
    """
    tensors = {name: t.detach().contiguous() for name, t in unet.state_dict().items()}
    _same_keys(tensors, surgery.skeleton(unet.config, arch).state_dict(), f"the U-Net to save as {arch.key}")
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / WEIGHTS) as part:
        save_file(tensors, part, metadata={"format": "pt", "architecture": arch.key})
    unet.save_config(folder)
    named = {"metadata": {}, "weight_map": {"conv_in.weight": HOW_TO_LOAD}}
    (folder / INDEX).write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
    with writing(folder / ARCHITECTURE) as part:
        part.write_text(arch.dumps(), encoding="utf-8")


def read_architecture(folder: Path) -> Architecture:
    """What the student in `folder` lacks; UserError when its architecture.json is missing or damaged."""
    return Architecture.from_json(_json(folder / ARCHITECTURE), repr(str(folder / ARCHITECTURE)))


def load_student(folder: Path, device: str | torch.device = "cpu") -> UNet2DConditionModel:
    """The pruned U-Net that `save_student` wrote, in evaluation mode and in its stored precision.

    Raises UserError when a file is missing or damaged, or the weights are not exactly those of the architecture.
    """
    unet = surgery.skeleton(_unet_config(folder), read_architecture(folder))
    path = folder / WEIGHTS
    missing = f"no pruned weights {str(path)!r}: give a folder that this package saved"
    try:
        tensors = load_file(decode.regular_file(path, SAVE, missing), device=str(device))
    except (SafetensorError, OSError) as err:
        raise UserError(f"the weights file {str(path)!r} is damaged or not safetensors ({err}): {SAVE}") from None
    expected = unet.state_dict()
    _same_keys(tensors, expected, str(path))
    if reshaped := [n for n, t in tensors.items() if t.shape != expected[n].shape]:
        raise UserError(f"{str(path)!r} is of another U-Net than its config.json: {reshaped[0]!r} differs in shape; save it again")
    unet.load_state_dict(tensors, assign=True)
    return unet.eval()


def load_pipeline(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """The pipeline that `export_pipeline` wrote, with a stock U-Net or not, for inference; any other model as `pretrained.load`.

    Raises UserError when a file is missing or damaged.

    >>> import blockprune as bp
    >>> bp.load_pipeline("tiny-digits").unet.num_parameters()
    2280884
    """
    stock = not (Path(folder) / "unet" / ARCHITECTURE).is_file()
    pipe = pretrained.load(str(folder), dtype=dtype) if stock else _load_slots(Path(folder), dtype)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _load_slots(folder: Path, dtype: torch.dtype) -> DiffusionPipeline:
    name = pretrained.read_config(folder / "model_index.json", "model_index.json")["_class_name"]
    unet = load_student(folder / "unet")
    try:
        with pretrained.silence():
            unet = unet.to(dtype)
            return pretrained.PIPELINES[name].from_pretrained(
                folder, unet=unet, dtype=dtype, local_files_only=True, use_safetensors=True
            )
    except Exception as err:
        raise pretrained.unloadable(f"the pipeline in {str(folder)!r}", err) from None


def export_pipeline(
    pipe: DiffusionPipeline,
    unet: UNet2DConditionModel,
    arch: Architecture,
    folder: Path,
    card: Mapping[str, Any],
    teacher: tuple[str, str] = ("", ""),
) -> Stock | str:
    """Writes the teacher `pipe` with the student `unet` in place of its U-Net as a diffusers folder, and reads it back to compare.

    Returns the stock form, which any diffusers loads, or why there is none; then `load_pipeline` alone loads the folder. `card`
    fills the README (see `model_card`), `teacher` is the model's name and identity. Raises UserError, and leaves no folder, when
    `folder` is taken, `unet` is no student of `pipe` by `arch`, or what was read back is another network.
    """
    check_free(folder)
    if changed := _changes(pipe.unet.config, unet.config):
        raise UserError(
            f"the student is of another teacher: their U-Nets differ in {', '.join(changed)}; give the one it was cut from"
        )
    state = {name: t.detach().contiguous() for name, t in unet.state_dict().items()}
    _same_keys(state, surgery.skeleton(unet.config, arch).state_dict(), f"the U-Net to export as {arch.key}")
    stock_form = expressible(unet.config, arch)
    blocks = stock_form.blocks if isinstance(stock_form, Stock) else slots(unet.config, arch)
    with writing_folder(folder) as part, pretrained.silence():
        _write_teacher(pipe, part)
        if isinstance(stock_form, Stock):
            _write_stock(stock_form, state, part / "unet")
        else:
            save_student(unet, arch, part / "unet")
        (part / PRUNING).mkdir()
        (part / PRUNING / ARCHITECTURE).write_text(arch.dumps(), encoding="utf-8")
        (part / PRUNING / BLOCK_MAP).write_text(json.dumps(blocks.to_json(), indent=2) + "\n", encoding="utf-8")
        (part / PRUNING / TEACHER).write_text(json.dumps(_teacher(pipe.unet.config, *teacher), indent=2) + "\n", encoding="utf-8")
        readme = model_card(arch, type(pipe).__name__, stock_form if isinstance(stock_form, str) else "", card)
        (part / "README.md").write_text(readme, encoding="utf-8", errors="backslashreplace")
        for weights in part.rglob("*.safetensors"):  # safetensors writes files that only their owner may read
            weights.chmod((part / "README.md").stat().st_mode)
        _check_same(part, unet.config, arch, state, blocks)
    return stock_form


def _write_stock(form: Stock, state: Mapping[str, Tensor], folder: Path) -> None:
    """Writes a student's weights as the U-Net of stock diffusers that it is."""
    unet = surgery.skeleton(form.config, Architecture())
    unet.load_state_dict({str(form.blocks.new_name(name)): t for name, t in state.items()}, assign=True)
    unet.save_pretrained(folder)


def _teacher(config: Config, model: str, identity: str) -> dict[str, Any]:
    """What tells an exported student where it comes from; of a local teacher the last part of its path."""
    public = {k: v for k, v in config.items() if not k.startswith("_") or k == "_class_name"}
    return {"model": Path(model).name if os.path.exists(model) else model, "identity": identity, "unet": public}


def _write_teacher(pipe: DiffusionPipeline, folder: Path) -> None:
    """Everything of the teacher but its U-Net and the path that it was loaded from."""
    for name, component in pipe.components.items():
        if name == "unet" or component is None:
            continue
        if backend := getattr(component, "backend_tokenizer", None):  # it would save how it was called last
            backend.no_padding()
            backend.no_truncation()
        component.save_pretrained(folder / name)
    pipe.save_config(folder)
    index = {k: v for k, v in _json(folder / "model_index.json").items() if k != "_name_or_path"}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def check_free(folder: Path) -> None:
    """Raises UserError when `folder` is there already and not an empty directory."""
    if folder.is_symlink() or folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UserError(f"{str(folder)!r} is there already: choose another --out, or remove it")


def _changes(teacher: Config, student: Config) -> list[str]:
    a, b = (json.loads(json.dumps({k: v for k, v in c.items() if not k.startswith("_")})) for c in (teacher, student))
    return sorted(k for k in {*a, *b} - {"sample_size"} if a.get(k) != b.get(k))


def _check_same(folder: Path, config: Config, arch: Architecture, state: Mapping[str, Tensor], blocks: BlockMap) -> None:
    """Raises UserError unless the exported U-Net is the student, on the CPU in float32 (see `compare`)."""
    student, again = surgery.skeleton(config, arch), load_pipeline(folder).unet
    student.load_state_dict({name: t.float().cpu() for name, t in state.items()}, assign=True)
    if fault := difference(student, again, _probe(config), blocks.new_name):
        raise UserError(f"the export of {arch.key} is not the student: {fault}; please report this architecture")


def _probe(config: Config) -> dict[str, Any]:
    """Random arguments of the U-Net's forward, two rows, a small latent."""
    g = torch.Generator().manual_seed(0)
    side = 2 ** len(config["down_block_types"])
    sample = torch.randn(2, config["in_channels"], side, side, generator=g)
    condition = recursively_apply(lambda t: torch.randn(t.shape, generator=g), family_of(config).blank(config, 2, 8, sample))
    return {"sample": sample, "timestep": torch.tensor([20, 700]), **condition}


def read_block_map(folder: Path) -> BlockMap:
    """Where an exported folder keeps its teacher's blocks; UserError when it does not say."""
    if not (folder / PRUNING / BLOCK_MAP).is_file():
        raise UserError(f"no {PRUNING}/{BLOCK_MAP} in {str(folder)!r}: give a folder that `blockprune export` wrote")
    return BlockMap.from_json(_json(folder / PRUNING / BLOCK_MAP), repr(str(folder / PRUNING / BLOCK_MAP)))


def is_exported(folder: Path) -> bool:
    """True for a folder that `export_pipeline` wrote."""
    return os.path.isfile(folder / PRUNING / ARCHITECTURE)


class TeacherRecord(msgspec.Struct):
    """What an exported folder says of its teacher."""

    model: str
    identity: str
    unet: UNetConfig


def read_teacher(folder: Path) -> dict[str, Any] | None:
    """What an exported folder says of its teacher: model, identity, and the configuration of its U-Net.

    None for a stock folder that does not say; one that `load_pipeline` alone loads has its teacher's configuration at the least.
    """
    if (folder / PRUNING / TEACHER).exists():
        teacher_json = _json(folder / PRUNING / TEACHER)
        decode.checked(teacher_json, TeacherRecord, repr(str(folder / PRUNING / TEACHER)), "export the student again")
        return teacher_json
    if (folder / "unet" / ARCHITECTURE).is_file():
        return {"model": "", "identity": "", "unet": _unet_config(folder / "unet")}
    return None


def teacher_of(pipe: DiffusionPipeline) -> tuple[str, str]:
    """(name, identity) of what a pipeline was loaded from, or of its teacher where that was exported; "" for what is not known."""
    name = str(getattr(pipe.config, "_name_or_path", None) or "")
    if name and is_exported(Path(name)):
        about = read_teacher(Path(name)) or {"model": "", "identity": ""}
        return about["model"], about["identity"]
    known = name in (*BUILT_IN, *pretrained.ALIASES) or (name and os.path.exists(name))
    return name, identity(name) if known else ""


def card_entries(model: str, configs: Configs, arch: Architecture) -> dict[str, Any]:
    """What a card says of a student: its costs at the model's own size, and its teacher, of a local path the last part."""
    graph = trace(configs.unet, configs.latent(), configs.n_tokens)
    costs = {"teacher": graph.total.to_json(), "student": graph.cost(graph.check(arch)).to_json()}
    if model in pretrained.ALIASES:
        return {"teacher": model, "base_model": pretrained.ALIASES[model].repo, "costs": costs}
    if not model or os.path.exists(model):
        return ({"teacher": Path(model).resolve().name} if model else {}) | {"costs": costs}
    return {"teacher": model, "costs": costs} | ({"base_model": model} if "/" in model else {})


def exported_identity(folder: Path) -> str:
    """The content id of an exported folder, as `identity` gives it for other models."""
    weights = folder / "unet" / WEIGHTS
    return identity(str(folder), [weights] if weights.is_file() else None)


def exported_skeleton(folder: Path) -> UNet2DConditionModel:
    """The U-Net of an exported folder on the meta device, without weights."""
    unet = folder / "unet"
    arch = read_architecture(unet) if (unet / ARCHITECTURE).is_file() else Architecture()
    return surgery.skeleton(_unet_config(unet), arch)


def _unet_config(folder: Path) -> dict[str, Any]:
    decode.regular_file(folder / "config.json", SAVE, _missing(folder / "config.json"))
    return pretrained.read_config(folder / "config.json", "unet/config.json")


def _json(path: Path) -> dict[str, Any]:
    return decode.read_json(path, decode.Object, SAVE, _missing(path))


def _missing(path: Path) -> str:
    return f"no {path.name} in {str(path.parent)!r}: give the folder of a pruned U-Net that this package saved"


def _same_keys(have: Iterable[str], want: Iterable[str], what: str) -> None:
    missing, beyond = sorted(set(want) - set(have)), sorted(set(have) - set(want))
    if missing:
        raise UserError(
            f"{what} lacks {len(missing)} tensors of its architecture, {missing[0]!r} first: the two do not belong together"
        )
    if beyond:
        raise UserError(
            f"{what} has {len(beyond)} tensors beyond its architecture, {beyond[0]!r} first: the two do not belong together"
        )
