"""The images that are edited, of a folder or the built-in scenes, as the model takes them, with what their captions ask for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from blockprune.data.digits import DigitScenes, caption, exchanged
from blockprune.data.image_files import MAX_ASPECT, read_image
from blockprune.data.image_folder import ImageFolder, resize_centre_crop
from blockprune.errors import UserError
from blockprune.model.model import Model

DIGITS = "digits"


@dataclass(frozen=True)
class Inputs:
    """Images of (side, side) pixels by their number, with the name and the caption of each, "" where it has none.

    `skipped` names the images of the source that could not be read.
    """

    names: Sequence[str]
    captions: Sequence[str]
    side: int
    read: Callable[[int], Tensor]  # (3, H, W) uint8
    skipped: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Tensor:  # (3, side, side) uint8
        return resize_centre_crop(self.read(index), self.side)

    def first(self, n: int) -> NDArray[np.uint8]:  # (at most n, side, side, 3)
        return np.stack([self[i].permute(1, 2, 0).numpy() for i in range(min(n, len(self)))])

    def identity(self) -> str:
        """12 digits over the pixels of all; reads every image."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(self[index].numpy().tobytes())
        return digest.hexdigest()[:12]

    def prompts(self) -> list[str]:
        """The captions; UserError where an image has none."""
        for name, text in zip(self.names, self.captions, strict=True):
            if not text:
                raise UserError(
                    f"the image {name!r} of --data has no caption in metadata.csv to be edited by: add it, or give --prompts"
                )
        return list(self.captions)


def inputs_of(source: str, n_images: int, model: Model) -> Inputs:
    """The first `n_images` of a folder, or of the scenes "digits", each with the caption of a scene in which one digit is another.

    UserError for a folder with fewer that can be read, and for a model whose images are not square.
    """
    height, width = model.pixels
    if height != width:
        raise UserError(f"--data needs a square resolution: got {height}x{width}")
    return _scenes(n_images, height) if source == DIGITS else _folder(source, n_images, height)


def _scenes(n_images: int, side: int) -> Inputs:
    scenes = DigitScenes("held-out", 0, n_images)
    captions = [caption(exchanged(labels, i)[0]) for i, (_, _, labels) in enumerate(scenes)]
    names = [f"scene {i}" for i in range(n_images)]
    return Inputs(names, captions, side, lambda index: torch.from_numpy(scenes[index][0]).permute(2, 0, 1))


def _folder(source: str, n_images: int, side: int) -> Inputs:
    folder = ImageFolder(source, max_aspect=MAX_ASPECT)
    names = list(_readable(folder, n_images))
    if len(names) < n_images:
        broken = f" ({len(folder.skipped)} more cannot be read, such as {folder.skipped[0]!r})" if folder.skipped else ""
        raise UserError(f"--data {source!r} has {len(names)} images{broken}: give {n_images}, or --n-images {len(names)}")
    captions = [folder.captions.get(name, "") for name in names]
    return Inputs(names, captions, side, lambda index: read_image(Path(source, names[index])), folder.skipped)


def _readable(folder: ImageFolder, n: int) -> Iterator[str]:
    """The names of the first `n` images that can be read."""
    for count, picture in enumerate(folder, start=1):
        yield picture.name
        if count == n:
            return
