"""Images with captions, by index, for training: folders with metadata, WebDataset shards, the built-in digits."""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import logging
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blockprune.data import resize_centre_crop
from blockprune.digits import DigitScenes
from blockprune.errors import UserError
from blockprune.presets import expand

FILE_COLUMNS = ("file_name", "file", "filename", "image")
CAPTION_COLUMNS = ("text", "caption", "prompt")
METADATA = ("metadata.csv", "metadata.jsonl")
SHARD_IMAGES = ("jpg", "jpeg", "png", "webp")
N_SCENES = 24_000
MAX_ASPECT = 64  # a longer strip would fill the memory when its shorter side is enlarged
MIN_ALLOWED = 10

_log = logging.getLogger("blockprune")
Span = tuple[int, int]  # offset and length in bytes


class Unreadable(Exception):
    """A sample that cannot be used; `reason` says which and why in a few words."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Pair(NamedTuple):
    """An image (3, size, size) uint8 RGB and its caption, which is not blank."""

    image: Tensor
    caption: str


class Source(Protocol):
    """Pairs by index; a broken one raises Unreadable. `identity` is a 12-digit id of what is listed, whatever `size` is."""

    name: str
    size: int
    identity: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair: ...


def source_of(text: str, size: int, n: int | None = None) -> Source:
    """The first `n` pairs (None: all) of "digits", a folder of images with metadata, or .tar shards such as `x/{000..012}.tar`.

    Images have their shorter side resized to `size` pixels and are cropped at the centre. UserError when there are none.
    """
    if n is not None and n < 1:
        raise UserError(f"the number of images must be at least 1: got {n}")
    if text == "digits":
        return Digits(size, n)
    folder = Path(text)
    if not folder.is_dir() and (folder.suffix == ".tar" or re.search(r"[{*?]", text)):
        return Shards(text, size, n)
    if folder.is_dir() and not any((folder / name).is_file() for name in METADATA) and any(folder.glob("*.tar")):
        return Shards(f"{glob.escape(text)}/*.tar", size, n)
    return CaptionedFolder(folder, size, n)


class Digits:
    """Scenes of handwritten digits from the training split."""

    def __init__(self, size: int, n: int | None = None) -> None:
        self.name, self.size = "digits", size
        self._scenes = DigitScenes("train", 0, N_SCENES if n is None else n)
        self.identity = _identity([("digits", self._scenes.split, self._scenes.seed, self._scenes.size)])

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, index: int) -> Pair:
        image, caption, _ = self._scenes[index]
        return Pair(resize_centre_crop(torch.from_numpy(image).permute(2, 0, 1), self.size), caption)


class CaptionedFolder:
    """The files that metadata.csv (BK-SDM's form) or metadata.jsonl of a folder lists with captions, in that order."""

    def __init__(self, folder: Path, size: int, n: int | None = None) -> None:
        self.folder, self.size, self.name = folder, size, str(folder)
        if not folder.is_dir():
            raise UserError(f"no data at {str(folder)!r}: give a folder of images, .tar shards, or digits")
        self.rows = list(islice(self._listed(), n))
        sizes = [_n_bytes(folder / name) for name, _ in self.rows]
        if not self.rows or max(sizes) < 0:
            such = f", such as {self.rows[0][0]!r}" if self.rows else ""
            raise UserError(f"the metadata of {str(folder)!r} list no file that is there{such}: name the images relative to it")
        if not any(caption for _, caption in self.rows):
            raise UserError(f"the metadata of {str(folder)!r} hold no captions: fill the column text")
        self.identity = _identity((*row, n_bytes) for row, n_bytes in zip(self.rows, sizes, strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        name, caption = self.rows[index]
        if not caption:
            raise Unreadable(f"{name} has no caption")
        return Pair(_square(self.folder / name, name, self.size), caption)

    def _listed(self) -> Iterator[tuple[str, str]]:
        """File and caption of every row; a caption that is missing is blank."""
        table, lines = (self.folder / name for name in METADATA)
        if table.is_file():
            return _csv_pairs(table)
        if lines.is_file():
            return _jsonl_pairs(lines)
        raise UserError(f"no {' or '.join(METADATA)} in {str(self.folder)!r}: write one with the columns file_name and text")


@contextmanager
def _reading(path: Path) -> Iterator[IO[str]]:
    """The text of a metadata file; lines end only where the file says so, for captions hold other separators."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield file
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"cannot read {str(path)!r}: {getattr(err, 'strerror', None) or 'not UTF-8 text'}") from None
    except csv.Error as err:
        raise UserError(f"{str(path)!r} is not valid CSV: {err}; quote the fields that hold commas or quotes") from None


def _csv_pairs(path: Path) -> Iterator[tuple[str, str]]:
    with _reading(path) as file:
        rows = csv.reader(file, strict=True)
        header = next(rows, [])
        names = [name.strip().lower() for name in header]
        at = [next((names.index(k) for k in known if k in names), -1) for known in (FILE_COLUMNS, CAPTION_COLUMNS)]
        if min(at) < 0:
            first = ", ".join(header)[:80]
            raise UserError(f"{str(path)!r} needs a first line that names the columns file_name and text: it is {first!r}; mend it")
        for row in filter(any, rows):
            name, caption = (row[i].strip() if i < len(row) else "" for i in at)
            yield name, caption


def _jsonl_pairs(path: Path) -> Iterator[tuple[str, str]]:
    with _reading(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as err:
                raise UserError(f"{str(path)!r} line {number} is not JSON: {err}; mend or drop it") from None
            known = isinstance(row, dict) and isinstance(row.get("file_name"), str)
            if not known or not any(name in row for name in CAPTION_COLUMNS):
                raise UserError(f"{str(path)!r} line {number} needs file_name and text: it is {line.strip()[:60]!r}; mend it")
            yield row["file_name"], _caption(row)


def _caption(row: Any) -> str:
    """The caption in a JSON object, "" where there is none."""
    found = [row[name] for name in CAPTION_COLUMNS if isinstance(row.get(name), str)] if isinstance(row, dict) else []
    return found[0].strip() if found else ""


class Sample(NamedTuple):
    """Where the members of one sample lie in a shard: by suffix, such as jpg, txt and json."""

    shard: int
    key: str
    members: Mapping[str, Span]

    @property
    def image(self) -> Span | None:
        return next((self.members[kind] for kind in SHARD_IMAGES if kind in self.members), None)


class Shards:
    """The samples of WebDataset .tar shards as img2dataset writes them: KEY.jpg (png, webp) with KEY.txt or KEY.json.

    Shards are indexed once, from the headers of their members; of a shard that is cut short the samples before the cut count.
    """

    def __init__(self, pattern: str, size: int, n: int | None = None) -> None:
        self.name, self.size = pattern, size
        self.paths = _tars(pattern)
        self.samples: list[Sample] = []
        for shard, path in enumerate(self.paths):
            if n is None or len(self.samples) < n:
                self.samples += (Sample(shard, key, members) for key, members in _index(path).items())
        self.samples = self.samples[:n]
        if not any(s.image for s in self.samples):
            raise UserError(f"no images in {pattern!r}: a shard holds KEY.jpg, KEY.png or KEY.webp, each with KEY.txt")
        if not any({"txt", "json"} & s.members.keys() for s in self.samples):
            raise UserError(f"no captions in {pattern!r}: a shard holds KEY.txt, or KEY.json with a caption, for each image")
        self.identity = _identity((s.shard, s.key, *sorted(s.members.items())) for s in self.samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Pair:
        sample = self.samples[index]
        name = f"{self.paths[sample.shard].name}:{sample.key}"
        if sample.image is None:
            raise Unreadable(f"{name} has no image")
        caption = self._read_caption(sample, name)
        return Pair(_square(io.BytesIO(self._read(sample, sample.image, name)), name, self.size), caption)

    def _read_caption(self, sample: Sample, name: str) -> str:
        caption = ""
        try:
            if "txt" in sample.members:
                caption = self._read(sample, sample.members["txt"], name).decode().strip()
            if not caption and "json" in sample.members:
                caption = _caption(json.loads(self._read(sample, sample.members["json"], name)))
        except ValueError as err:
            raise Unreadable(f"{name} has a broken caption: {err}") from None
        if not caption:
            raise Unreadable(f"{name} has no caption")
        return caption

    def _read(self, sample: Sample, span: Span, name: str) -> bytes:
        # no file stays open, so that processes and threads may share a source
        try:
            with self.paths[sample.shard].open("rb") as file:
                if sum(span) > file.seek(0, io.SEEK_END):
                    raise Unreadable(f"{name} is cut short")
                file.seek(span[0])
                return file.read(span[1])
        except OSError as err:
            raise Unreadable(f"{name} cannot be read: {err.strerror}") from None


def _tars(pattern: str) -> list[Path]:
    """The files that a path, {00..12}, {a,b} or * stand for; UserError when any of them is not there."""

    def numbers(found: re.Match[str]) -> str:
        first, last = found[1], found[2]
        return "{" + ",".join(f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)) + "}"

    names = [name for one in expand(re.sub(r"\{(\d+)\.\.(\d+)\}", numbers, pattern)) for name in _matching(one)]
    missing = [name for name in names if not Path(name).is_file()]
    if len(missing) == len(names):
        raise UserError(f"no .tar file matches {pattern!r}: give a path such as 'shards/{{00000..00012}}.tar'")
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(names)} shards of {pattern!r} are missing, such as {missing[0]!r}: name others"
        )
    return [Path(name) for name in names]


def _matching(name: str) -> list[str]:
    return sorted(glob.glob(name)) if glob.has_magic(name) and not Path(name).exists() else [name]


def _index(path: Path) -> dict[str, dict[str, Span]]:
    """The members of a shard by key and suffix, in order; UserError when it is no tar."""
    found: dict[str, dict[str, Span]] = {}
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as raw:
            try:
                for member in tar:
                    folder, _, base = member.name.rpartition("/")
                    key, _, kind = base.partition(".")
                    if member.isfile() and key:
                        found.setdefault(f"{folder}/{key}" if folder else key, {})[kind.lower()] = (member.offset_data, member.size)
            except tarfile.TarError:
                pass  # told apart below, as a shard that ends without its zeros
            raw.seek(tar.offset)
            if raw.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                _log.warning("%s is cut short or damaged after %d samples; the rest of it is not used", path, len(found))
    except (OSError, tarfile.TarError) as err:
        raise UserError(f"{str(path)!r} is not a readable .tar ({err}): fetch it again or leave it out") from None
    return found


def _square(file: Path | io.BytesIO, name: str, size: int) -> Tensor:
    """(3, size, size) uint8 RGB, as stored (no EXIF rotation). Raises Unreadable."""
    try:
        with Image.open(file) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise ValueError(f"{image.width}x{image.height} pixels are too long a strip")
            pixels = np.array(image.convert("RGB"))
    except Exception as err:  # Pillow's decoders raise almost anything on broken files
        why = getattr(err, "strerror", None) or (str(err).splitlines() or [type(err).__name__])[0]
        raise Unreadable(f"{name} cannot be read: {re.sub(r' <_io.*', '', why)[:100]}") from None
    return resize_centre_crop(torch.from_numpy(pixels).permute(2, 0, 1), size)


def _n_bytes(path: Path) -> int:
    """The size of a file, -1 when there is none."""
    try:
        return path.stat().st_size if path.is_file() else -1
    except (OSError, ValueError):
        return -1


def _identity(rows: Iterable[tuple[Any, ...]]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr(row).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:12]


class Reader:
    """A source whose broken samples are replaced by the next one that can be read; `skipped` maps their indices to reasons.

    UserError when more than `limit_share` of the samples, and more than ten, are broken, or all of them.
    """

    def __init__(self, source: Source, limit_share: float = 0.1) -> None:
        self.source, self.limit_share = source, limit_share
        self.skipped: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.source)

    def pair(self, index: int) -> Pair:
        """Pair `index`, or the first after it (from the start again at the end) that can be read: the same one every time."""
        n = len(self)
        if not 0 <= index < n:
            raise IndexError(f"pair {index} of {n}")
        for i in (j % n for j in range(index, index + n)):
            if i in self.skipped:
                continue
            try:
                return self.source[i]
            except Unreadable as err:
                self.skip({i: err.reason})
        raise UserError(f"none of the {n} samples of {self.source.name!r} can be used {self._reasons()}: mend them")

    def skip(self, found: Mapping[int, str]) -> None:
        """Counts samples that are known to be broken. Raises UserError when they are too many."""
        self.skipped.update(found)
        limit, n = max(MIN_ALLOWED, self.limit_share * len(self)), len(self.skipped)
        if n > limit:
            what = f"{n} of the {len(self)} samples of {self.source.name!r} cannot be used {self._reasons()}"
            raise UserError(f"{what}, and at most {int(limit)} may be skipped: mend or remove them")

    def _reasons(self) -> str:
        return "(" + "; ".join(islice(self.skipped.values(), 3)) + ")"
