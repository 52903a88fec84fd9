"""The few images from which a model learns a subject. Needs no torch: a command can look at them before it loads anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from blockprune.data.image_files import MAX_ASPECT, Unreadable, image_names, read_pixels
from blockprune.errors import UserError

FEWEST = 3


def subject_pixels(folder: Path) -> list[NDArray[Any]]:
    """The images of a subject's folder, (H, W, 3) uint8 each. UserError when there are too few, or one cannot be read."""
    names = image_names(folder)
    if len(names) < FEWEST:
        raise UserError(f"a subject needs at least {FEWEST} images, 3 to 5 as a rule: {str(folder)!r} has {len(names)}; add some")
    return list(_read(folder, names))


def _read(folder: Path, names: list[str]) -> Iterator[NDArray[Any]]:
    for name in names:
        try:
            yield read_pixels(folder / name, MAX_ASPECT)
        except Unreadable as err:
            raise UserError(f"{name!r} in {str(folder)!r} cannot be read ({err.reason}): mend or remove it") from None
