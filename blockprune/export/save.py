"""Saving a pipeline that is loaded: what an exported student was cut from is kept, however its blocks are named now."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline, UNet2DConditionModel

from blockprune.export import pipeline
from blockprune.export.stock_config import Stock
from blockprune.model import pretrained, surgery
from blockprune.model.architecture import Architecture


def save_pipeline(pipe: DiffusionPipeline, folder: Path, card: Mapping[str, Any] | None = None) -> Stock | str:
    """Writes a pipeline, pruned or not, to a new folder, with `card` in its README beside what is known of its teacher.

    Returns and raises what `export_pipeline` does.
    """
    teacher, pipe = pipeline.teacher_of(pipe), _in_places_of_teacher(pipe)
    arch = surgery.architecture_of(pipe.unet)
    entries = pipeline.card_entries(teacher[0], pretrained.configs_of(pipe), arch)
    return pipeline.export_pipeline(pipe, pipe.unet, arch, folder, {**entries, **(card or {})}, teacher)


def _in_places_of_teacher(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline; of an exported one with a stock U-Net a copy, whose blocks are where its teacher has them."""
    folder = Path(str(getattr(pipe.config, "_name_or_path", None) or ""))
    teacher = pipeline.read_teacher(folder) if pipeline.is_exported(folder) else None
    if teacher is None or (folder / "unet" / pipeline.ARCHITECTURE).is_file():
        return pipe
    gone, blocks = pipeline.read_architecture(folder / pipeline.PRUNING), pipeline.read_block_map(folder)
    names = {str(blocks.new_name(name)): name for name in surgery.skeleton(teacher["unet"], gone).state_dict()}
    if surgery.skeleton(pipe.unet.config, Architecture()).state_dict().keys() != names.keys():  # another U-Net was put in its place
        return pipe
    again = copy.copy(pipe)
    again.unet = surgery.skeleton(teacher["unet"], gone | _renamed(pipe.unet, names))
    state, new = pipe.unet.state_dict(), {name: str(blocks.new_name(name)) for name in again.unet.state_dict()}
    if state.keys() != {*new.values()}:  # an adapter is in it, of which `export_pipeline` tells
        return pipe
    again.unet.load_state_dict({name: state[tensor] for name, tensor in new.items()}, assign=True)
    return again


def _renamed(unet: UNet2DConditionModel, names: Mapping[str, str]) -> Architecture:
    """What a U-Net lacks by the names of its teacher; `names` gives those of tensors. Blocks move, but never to another depth."""
    arch = surgery.architecture_of(unet)
    inside = {name: next(names[tensor] for tensor in names if tensor.startswith(f"{name}.")) for name in arch}
    old = {name: ".".join(tensor.split(".")[: name.count(".") + 1]) for name, tensor in inside.items()}
    return Architecture(frozenset(old.values()), frozenset((old[name], kind) for name, kind in arch.fits))
