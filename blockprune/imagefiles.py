"""Images as the files that a protocol says: what judges see is what was stored."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blockprune.protocol import Rules


def file_bytes(image: Tensor, rules: Rules) -> bytes:
    """(3, H, W) uint8 => the bytes of its file, resized as the protocol says; a resized image is the file of a file."""
    stored = _stored(_picture(image), rules)
    return _stored(_resized(Image.open(io.BytesIO(stored)), rules), rules) if rules.resize else stored


def pixels(data: bytes) -> Tensor:
    """(3, H, W) uint8 RGB of an image file's bytes."""
    with Image.open(io.BytesIO(data)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()


def as_stored(image: Tensor, rules: Rules) -> Tensor:
    """(3, H, W) uint8 of an image that came from a file => as it is after the protocol has resized and stored it."""
    return pixels(_stored(_resized(_picture(image), rules), rules)) if rules.resize else image


def _picture(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def _resized(image: Image.Image, rules: Rules) -> Image.Image:
    # the filter that Pillow takes by itself, and so the published scripts
    return image.resize((rules.resize, rules.resize), Image.Resampling.BICUBIC)


def _stored(image: Image.Image, rules: Rules) -> bytes:
    buffer = io.BytesIO()
    options = {"quality": rules.jpeg_quality} if rules.image == "jpeg" else {}
    image.save(buffer, format=rules.image, **options)
    return buffer.getvalue()
