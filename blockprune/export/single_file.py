"""A student's U-Net as one .safetensors file under the names of the original checkpoints, with its architecture in the metadata."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

from blockprune.errors import UserError
from blockprune.export.original_names import OriginalNames
from blockprune.export.stock_config import Stock, expressible
from blockprune.model.architecture import Architecture
from blockprune.runs.atomic import writing


def write_single_file(unet: UNet2DConditionModel, arch: Architecture, path: Path) -> Stock | str:
    """Writes the weights of a pruned U-Net to `path`: names with `model.diffusion_model.` before them, as in a checkpoint.

    Where a stock configuration can say what the student is, its blocks are counted anew, as such a network's are, and loaders that
    read a configuration, or infer it from the names, take the file; else blocks keep their teacher's places, with gaps between
    them. The metadata has "blockprune.architecture" (what the teacher lacks), "blockprune.config" (the configuration that the
    names follow) and "blockprune.layout" (stock or slots), each in JSON. Returns the stock form, or why there is none. Raises
    UserError for a path that is taken, and for a U-Net that the original names do not cover.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"--out must be a .safetensors file for this format: got {str(path)!r}")
    if path.exists() or path.is_symlink():
        raise UserError(f"{str(path)!r} is there already: choose another --out, or remove it")
    found = expressible(unet.config, arch)
    config = found.config if isinstance(found, Stock) else dict(unet.config)
    state = {name: t.detach().cpu().contiguous() for name, t in unet.state_dict().items()}
    if isinstance(found, Stock):
        state = {str(found.blocks.new_name(name)): t for name, t in state.items()}
    public = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
    about = {"architecture": arch.to_json(), "config": public, "layout": "stock" if isinstance(found, Stock) else "slots"}
    metadata = {"format": "pt"} | {f"blockprune.{name}": json.dumps(value) for name, value in about.items()}
    named = OriginalNames(config).rename(state)
    with writing(path) as part:
        save_file(named, part, metadata=metadata)
    return found
