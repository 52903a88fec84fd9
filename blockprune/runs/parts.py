"""Arrays and pictures in a run directory: what later rows are computed from, and what a reader looks at."""

from __future__ import annotations

import io
import re
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


def slug_of(label: str) -> str:
    """A label as a file name."""
    return re.sub(r"[^a-z0-9.+]+", "-", label.lower())


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


def check_kept(place: str, arrays: Arrays, wanted: Mapping[str, tuple[int, ...] | None], n: int | None = None) -> Arrays:
    """The arrays that an earlier attempt left at a place in the run, or UserError.

    It has those that are wanted, a row for each sample, of `n` samples (None: any number) and of that shape (None: any).
    """
    lengths = sorted({len(a) for a in arrays.values()})
    if missing := sorted(wanted.keys() - arrays.keys()):
        why = f"it lacks {missing[0]!r}"
    elif len(lengths) != 1 or lengths[0] != (lengths[0] if n is None else n):
        why = f"it has {' and '.join(map(str, lengths)) or 'no'} rows{'' if n is None else f' in place of {n}'}"
    elif odd := [k for k, shape in wanted.items() if shape is not None and arrays[k].shape[1:] != shape]:
        why = f"{odd[0]!r} is of shape {arrays[odd[0]].shape}"
    else:
        return arrays
    raise UserError(f"the part {place} is damaged ({why}): {MAKE_AGAIN}")


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
