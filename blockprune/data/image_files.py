"""Image files: reading those of others, and writing ours as a protocol says, for what judges see is what was stored.

Needs no torch before an image becomes a tensor.
"""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from blockprune.errors import UserError, first_line

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
MAX_ASPECT = 64  # a longer strip would fill the memory when its shorter side is enlarged


class Storing(Protocol):
    """How images are stored: the file's kind ("png", "jpeg"), its JPEG quality, and to how many pixels it is resized (0: not)."""

    @property
    def image(self) -> str: ...
    @property
    def jpeg_quality(self) -> int: ...
    @property
    def resize(self) -> int: ...


class Unreadable(Exception):
    """A sample that cannot be used; `reason` says why in a few words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def image_names(folder: Path) -> list[str]:
    """The images in a folder and in all folders below it, as sorted paths relative to it. UserError when there are none."""
    if not os.path.isdir(folder):
        raise UserError(f"no folder of images at {str(folder)!r}: give a folder that exists")
    files = (p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and os.path.isfile(p))
    if names := sorted(p.relative_to(folder).as_posix() for p in files):
        return names
    raise UserError(f"no images in {str(folder)!r}: it needs files such as .png or .jpg")


def read_image(file: Path | io.BytesIO, max_aspect: float = float("inf")) -> Tensor:
    """(3, H, W) uint8 RGB as stored. Errors as those of `read_pixels`."""
    return as_tensor(read_pixels(file, max_aspect))


def as_tensor(pixels: NDArray[Any]) -> Tensor:
    """(H, W, 3) uint8 => (3, H, W)."""
    import torch

    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_pixels(file: Path | io.BytesIO, max_aspect: float = float("inf")) -> NDArray[Any]:
    """(H, W, 3) uint8 RGB as stored (no EXIF rotation, as clean-fid reads it).

    Raises Unreadable for what is no regular file, no whole image, past Pillow's limit of size, or a strip longer than `max_aspect`.
    """
    if isinstance(file, Path) and not os.path.isfile(file):
        raise Unreadable("no regular file" if os.path.lexists(file) else "no such file")
    try:
        with Image.open(file) as image:
            if max(image.size) > max_aspect * min(image.size):
                raise ValueError(f"{image.width}x{image.height} pixels are too long a strip")
            return np.array(image.convert("RGB"))
    except Exception as err:  # Pillow's decoders raise almost anything on broken files
        why = getattr(err, "strerror", None) or first_line(err)
        raise Unreadable(re.sub(r" <_io.*", "", why)[:100]) from None


def file_bytes(image: Tensor, rules: Storing) -> bytes:
    """(3, H, W) uint8 => the bytes of its file, resized as the protocol says; a resized image is the file of a file."""
    stored = _stored(_picture(image), rules)
    return _stored(_resized(Image.open(io.BytesIO(stored)), rules), rules) if rules.resize else stored


def pixels(data: bytes) -> Tensor:
    """(3, H, W) uint8 RGB of an image file's bytes."""
    with Image.open(io.BytesIO(data)) as image:
        return as_tensor(np.array(image.convert("RGB")))


def as_stored(image: Tensor, rules: Storing) -> Tensor:
    """(3, H, W) uint8 of an image that came from a file => as it is after the protocol has resized and stored it."""
    return pixels(_stored(_resized(_picture(image), rules), rules)) if rules.resize else image


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _resized(image: Image.Image, rules: Storing) -> Image.Image:
    # the filter that Pillow takes by itself, and so the published scripts
    return image.resize((rules.resize, rules.resize), Image.Resampling.BICUBIC)


def _stored(image: Image.Image, rules: Storing) -> bytes:
    buffer = io.BytesIO()
    options = {"quality": rules.jpeg_quality} if rules.image == "jpeg" else {}
    image.save(buffer, format=rules.image, **options)
    return buffer.getvalue()
