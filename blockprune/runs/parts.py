"""Arrays and pictures in a run directory: what later rows are computed from, and what a reader looks at."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from blockprune.errors import UserError
from blockprune.model.architecture import Architecture
from blockprune.runs.directory import MAKE_AGAIN, Run, Stored
from blockprune.runs.memory import MemoryRun

Arrays = dict[str, NDArray[Any]]
INPUTS = "inputs"  # what the images of an evaluation were made from, under this label among its settings


def paired_label(label: str) -> str:
    """The label of the teacher's images that those of a setting are paired with."""
    return f"teacher, {label}"


def keep_arrays(run: Run | MemoryRun, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    from safetensors.numpy import save

    run.write(f"parts/{name}.safetensors", save({k: np.ascontiguousarray(v) for k, v in arrays.items()}))


def recall_arrays(run: Stored | MemoryRun, name: str) -> Arrays | None:
    """What `keep_arrays` kept under that name; None when there is nothing."""
    file = f"parts/{name}.safetensors"
    return None if (data := run.read(file)) is None else _arrays(file, data)


def _arrays(file: str, data: bytes) -> Arrays:
    """The arrays of a part; UserError where they are not numbers with a row for each sample."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as err:
        raise UserError(f"the part {file} is damaged ({err}): {MAKE_AGAIN}") from None
    lengths = {a.shape[:1] for a in arrays.values()}
    if len(lengths) != 1 or lengths == {()} or not all(np.issubdtype(a.dtype, np.number) for a in arrays.values()):
        raise UserError(f"the part {file} is damaged (its arrays are not numbers, a row for each sample): {MAKE_AGAIN}")
    return arrays


def keep_picture(run: Run | MemoryRun, arch: Architecture, images: NDArray[np.uint8]) -> None:
    """Keeps (k, H, W, 3) images of an architecture side by side."""
    run.write(f"images/{arch.key}.png", strip_png(images))


def strip_png(images: NDArray[np.uint8]) -> bytes:
    """(k, H, W, 3) images side by side in one PNG."""
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(list(images), axis=1)).save(buffer, format="PNG")
    return buffer.getvalue()


def strip_of_files(files: Sequence[bytes]) -> bytes:
    """The contents of image files of one size side by side in one PNG."""
    return strip_png(np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]))


def strip_images(strip: bytes, n: int) -> NDArray[np.uint8]:
    """(n, H, W, 3) images of a strip; square ones where `n` is 0. Raises OSError, SyntaxError or ValueError for a damaged one."""
    pixels = np.asarray(Image.open(io.BytesIO(strip)).convert("RGB"))
    return np.stack(np.split(pixels, n or pixels.shape[1] // pixels.shape[0], axis=1))
