"""A pruned U-Net on disk: its weights, its teacher's configuration, and the architecture without which they mean nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from blockprune import surgery
from blockprune.arch import Architecture
from blockprune.errors import UserError

# not the name that stock loaders look for: they would fill the removed blocks of the full configuration at random
WEIGHTS = "pruned_unet.safetensors"
ARCHITECTURE = "architecture.json"


def save_student(unet: UNet2DConditionModel, arch: Architecture, folder: Path) -> None:
    """Writes a pruned (or masked) U-Net that has exactly the weights of `arch`; UserError when it has others."""
    tensors = {name: t.detach().contiguous() for name, t in unet.state_dict().items()}
    _same_keys(tensors, surgery.skeleton(unet.config, arch).state_dict(), f"the U-Net to save as {arch.key}")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / (WEIGHTS + ".part")
    save_file(tensors, part, metadata={"format": "pt", "architecture": arch.key})
    part.replace(folder / WEIGHTS)
    unet.save_config(folder)
    (folder / ARCHITECTURE).write_text(arch.dumps())


def load_student(folder: Path, device: str | torch.device = "cpu") -> UNet2DConditionModel:
    """The pruned U-Net that `save_student` wrote, in evaluation mode and in its stored precision.

    Raises UserError when a file is missing or damaged, or the weights are not exactly those of the architecture.
    """
    arch = Architecture.from_json(_json(folder / ARCHITECTURE))
    unet = surgery.skeleton(_json(folder / "config.json"), arch)
    path = folder / WEIGHTS
    try:
        tensors = load_file(path, device=str(device))
    except FileNotFoundError:
        raise UserError(f"no pruned weights {str(path)!r}: give a folder that this package saved") from None
    except (SafetensorError, OSError) as err:
        raise UserError(f"the weights file {str(path)!r} is damaged or not safetensors ({err}): save it again") from None
    expected = unet.state_dict()
    _same_keys(tensors, expected, str(path))
    if reshaped := [n for n, t in tensors.items() if t.shape != expected[n].shape]:
        raise UserError(f"{str(path)!r} is of another U-Net than its config.json: {reshaped[0]!r} differs in shape; save it again")
    unet.load_state_dict({name: _aligned(t) for name, t in tensors.items()}, assign=True)
    return unet.eval()


def _aligned(t: Tensor) -> Tensor:
    """The tensor at an address where kernels round as they did before saving; in the file it may lie at any."""
    return t if t.data_ptr() % 64 == 0 else t.clone()


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"no {path.name} in {str(path.parent)!r}: give the folder of a pruned U-Net that this package saved"
        ) from None
    except (OSError, ValueError) as err:
        raise UserError(f"cannot read {str(path)!r}: {err}") from None


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
