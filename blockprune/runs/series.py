"""Samples of one kind in a run, images or noisy latents: what was seen of each, which are missing, and the files of images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from blockprune.errors import UserError
from blockprune.runs import AnyRun, Readable, parts
from blockprune.runs.directory import MAKE_AGAIN
from blockprune.runs.parts import Arrays


class Series:
    """Samples 0 to `n` - 1 under a label; images among them are kept as files that end in `suffix`.

    What was seen comes in parts, arrays with a row for each sample, whose numbers are in "index". Each part is read once.
    """

    def __init__(self, run: Readable, label: str, n: int, suffix: str = ".png") -> None:
        self.run, self.label, self.n, self.suffix = run, label, n, suffix
        self.slug = parts.slug_of(label)
        self.claims = f"parts/{self.slug}/.claims"
        self._left, self._known = set(range(n)), set[str]()

    def file(self, index: int) -> bytes | None:
        """The file of an image; None where none is kept."""
        return self.run.read(self.path(index))

    def path(self, index: int) -> str:
        """Where the file of an image is kept."""
        return f"drawn/{self.slug}/{index:06d}{self.suffix}"

    def strip(self, n: int) -> bytes:
        """The first `n` images side by side, as a PNG."""
        files = (self.file(i) for i in range(min(n, self.n)))
        return parts.strip_of_files([file for file in files if file])

    def missing(self) -> set[int]:
        """The samples that nobody has looked at."""
        for file in self.run.names(f"parts/{self.slug}"):
            if file not in self._known and (arrays := self._part(file)):
                self._left -= self._numbers(file, arrays)
                self._known.add(file)
        return self._left

    def seen(self) -> Arrays:
        """What was seen of all samples, in the order of their numbers."""
        return in_order(self._parts())

    def _parts(self) -> Iterator[Arrays]:
        return (arrays for file in self.run.names(f"parts/{self.slug}") if (arrays := self._part(file)))

    def _part(self, file: str) -> Arrays | None:
        return parts.recall_arrays(self.run, f"{self.slug}/{file.removesuffix('.safetensors')}")

    def _numbers(self, file: str, arrays: Arrays) -> set[int]:
        """Which samples a part is about; UserError where it does not say."""
        index = arrays.get("index")
        if index is None or index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
            why = "it does not say which images it is about"
        elif not ((index >= 0) & (index < self.n)).all():
            why = f"its index is not of images 0 to {self.n - 1}"
        else:
            return set(index.tolist())
        raise UserError(f"the part parts/{self.slug}/{file} is damaged ({why}): {MAKE_AGAIN}")


def keep_seen(run: AnyRun, series: Series, arrays: Arrays) -> None:
    """Keeps a part: what was seen of the samples in "index"."""
    parts.keep_arrays(run, f"{series.slug}/{arrays['index'][0]:06d}", arrays)


def in_order(seen: Iterable[Arrays]) -> Arrays:
    """What was seen of all samples in the order of their numbers, without these; UserError for parts that do not fit together."""
    rows = list(seen)
    forms = [{name: values.shape[1:] for name, values in row.items()} for row in rows]
    if any(form != forms[0] for form in forms) or len({*np.concatenate([row["index"] for row in rows])}) < sum(
        len(row["index"]) for row in rows
    ):
        raise UserError("parts of a series do not belong together: delete their folder in parts/ and run the same command again")
    order = np.argsort(np.concatenate([row["index"] for row in rows]))
    return {name: np.concatenate([row[name] for row in rows])[order] for name in rows[0] if name != "index"}
