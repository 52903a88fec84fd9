"""One id for a model: of its files, of what was loaded from them, and of nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from safetensors.torch import load_file, save_file

from blockprune.model import identity as module
from blockprune.model.identity import identity, identity_of
from blockprune.model.pretrained import load

UNET = "unet/diffusion_pytorch_model.safetensors"
Folder = Callable[[str], Path]


@pytest.mark.parametrize("kind", ["sd1", "sd1-v", "sd2", "sdxl", "tiny-digits"])
def test_a_pipeline_has_the_id_of_its_files(kind: str, tiny_folder: Folder) -> None:
    model = kind if kind == "tiny-digits" else str(tiny_folder(kind))
    assert identity(model) == identity_of(load(model)) == identity_of(load(model, dtype=torch.float16))


def test_a_pipeline_saved_again_keeps_its_id(tiny_folder: Folder, tmp_path: Path) -> None:
    pipe = load(str(tiny_folder("sd1")))
    pipe.save_pretrained(tmp_path / "again")
    assert identity(str(tmp_path / "again")) == identity_of(pipe)


@pytest.mark.parametrize("whole", [module.WHOLE, pytest.param(0, marks=pytest.mark.slow)], ids=["whole", "sampled"])
def test_it_follows_weights_and_configuration(
    whole: int, tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "WHOLE", whole)
    folder = Path(shutil.copytree(tiny_folder("sd1"), tmp_path / "sd1"))
    pipe = load(str(folder))
    ids = [identity(str(folder)), identity(str(tiny_folder("sd1-v")))]
    assert identity_of(pipe) == ids[0]
    tensors = load_file(folder / UNET)
    tensors["conv_in.bias"] += 1
    save_file(tensors, folder / UNET, metadata={"format": "pt"})
    ids.append(identity(str(folder)))
    with torch.no_grad():
        pipe.unet.conv_in.bias += 1
    assert identity_of(pipe) == ids[-1]
    last = "conv_out.weight"  # a change of the last row alone
    tensors[last][-1] += 1
    save_file(tensors, folder / UNET, metadata={"format": "pt"})
    ids.append(identity(str(folder)))
    with torch.no_grad():
        pipe.unet.conv_out.weight[-1] += 1
    assert identity_of(pipe) == ids[-1]
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    ids.append(identity_of(pipe))
    assert len(set(ids)) == len(ids)
