"""The images of one setting by one model in a run: their files, what was seen of them, and which are missing."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from blockprune.errors import UserError
from blockprune.runs import Readable, parts
from blockprune.runs.directory import MAKE_AGAIN
from blockprune.stages.evaluate.evaluator import Arrays, in_order
from blockprune.stages.evaluate.protocol import slug_of
from blockprune.stages.plan import N_PICTURES


class Series:
    """Images 0 to `n_images` - 1 under a label, kept as files that end in `suffix`. Each part of what was seen is read once."""

    def __init__(self, run: Readable, label: str, n_images: int, suffix: str) -> None:
        self.run, self.label, self.n_images, self.suffix = run, label, n_images, suffix
        self.slug = slug_of(label)
        self._left, self._known = set(range(n_images)), set[str]()

    def file(self, index: int) -> bytes | None:
        """The file of an image; None where none is kept."""
        return self.run.read(self.path(index))

    def path(self, index: int) -> str:
        """Where the file of an image is kept."""
        return f"drawn/{self.slug}/{index:06d}{self.suffix}"

    def strip(self) -> bytes:
        """The first images side by side, as a PNG."""
        files = (self.file(i) for i in range(min(N_PICTURES, self.n_images)))
        return parts.strip_of_files([file for file in files if file])

    def missing(self) -> set[int]:
        """The images that nobody has looked at."""
        for file in self.run.names(f"parts/{self.slug}"):
            if file not in self._known and (arrays := self._part(file)):
                self._left -= self._numbers(file, arrays)
                self._known.add(file)
        return self._left

    def seen(self) -> Arrays:
        """What was seen of all images, in the order of their numbers."""
        return in_order(self._parts())

    def _parts(self) -> Iterator[Arrays]:
        return (arrays for file in self.run.names(f"parts/{self.slug}") if (arrays := self._part(file)))

    def _part(self, file: str) -> Arrays | None:
        return parts.recall_arrays(self.run, f"{self.slug}/{file.removesuffix('.safetensors')}")

    def _numbers(self, file: str, arrays: Arrays) -> set[int]:
        """Which images a part is about; UserError where it does not say."""
        index = arrays.get("index")
        if index is None or index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
            why = "it does not say which images it is about"
        elif not ((index >= 0) & (index < self.n_images)).all():
            why = f"its index is not of images 0 to {self.n_images - 1}"
        else:
            return set(index.tolist())
        raise UserError(f"the part parts/{self.slug}/{file} is damaged ({why}): {MAKE_AGAIN}")
