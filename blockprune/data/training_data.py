"""Images with captions, by index, for training: folders with metadata, WebDataset shards, the built-in digits."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blockprune.data.captions import METADATA, caption_of, flaw, metadata_of, read_metadata
from blockprune.data.digits import DigitScenes
from blockprune.data.image_files import MAX_ASPECT, Unreadable, read_image
from blockprune.data.image_folder import ImageFolder, resize_centre_crop
from blockprune.errors import UserError
from blockprune.model.presets import MAX_NAMES, expand

SHARD_IMAGES = ("jpg", "jpeg", "png", "webp")
N_SCENES = 24_000
MAX_DIGITS = 12
MIN_ALLOWED = 10

_log = logging.getLogger("blockprune")
Span = tuple[int, int]  # offset and length in bytes


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
    if not os.path.isdir(folder) and (folder.suffix == ".tar" or re.search(r"[{*?]", text)):
        return Shards(text, size, n)
    if os.path.isdir(folder) and metadata_of(folder) is None and any(folder.glob("*.tar")):
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
        if not os.path.isdir(folder):
            raise UserError(f"no data at {str(folder)!r}: give a folder of images, .tar shards, or digits")
        if (metadata := metadata_of(folder)) is None:
            raise UserError(f"no {' or '.join(METADATA)} in {str(folder)!r}: write one with the columns file_name and text")
        self.rows = list(islice(read_metadata(metadata), n))
        sizes = [_n_bytes(folder, name) for name, _ in self.rows]
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
        if not _inside(self.folder, name):
            raise Unreadable(f"{name} lies outside the folder")
        return Pair(_square(self.folder / name, name, self.size), _checked(caption, name))


class PromptedFolder:
    """The first `n` images of a folder (None: all), sorted by path, under one prompt, or under several in turn."""

    def __init__(self, folder: Path, prompts: Sequence[str], size: int, n: int | None = None) -> None:
        self.folder, self.prompts, self.size, self.name = folder, prompts, size, str(folder)
        self.names = ImageFolder(folder).names[:n]
        self.identity = _identity([tuple(prompts), *((name, _n_bytes(folder, name)) for name in self.names)])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Pair:
        name = self.names[index]
        return Pair(_square(self.folder / name, name, self.size), _checked(self.prompts[index % len(self.prompts)], name))


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
                caption = caption_of(json.loads(self._read(sample, sample.members["json"], name)))
        except (ValueError, RecursionError) as err:
            raise Unreadable(f"{name} has a broken caption: {err}") from None
        return _checked(caption, name)

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
    names = [name for one in expand(re.sub(r"\{([0-9]+)\.\.([0-9]+)\}", _numbers, pattern)) for name in _matching(one)]
    missing = [name for name in names if not os.path.isfile(name)]
    if len(missing) == len(names):
        raise UserError(f"no .tar file matches {pattern!r}: give a path such as 'shards/{{00000..00012}}.tar'")
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(names)} shards of {pattern!r} are missing, such as {missing[0]!r}: name others"
        )
    return [Path(name) for name in names]


def _numbers(found: re.Match[str]) -> str:
    """{00..12} as {00,01,...,12}."""
    if max(map(len, found.groups())) > MAX_DIGITS:
        raise UserError(f"the range {found[0][:60]!r} has no end: its numbers have at most {MAX_DIGITS} digits")
    first, last = int(found[1]), int(found[2])
    if last < first:
        raise UserError(f"the range {found[0]!r} counts down: write {{{found[2]}..{found[1]}}}")
    if last - first >= MAX_NAMES:
        raise UserError(f"the range {found[0]!r} stands for {last - first + 1:,} names: at most {MAX_NAMES:,} are taken")
    return "{" + ",".join(f"{i:0{len(found[1])}d}" for i in range(first, last + 1)) + "}"


def _matching(name: str) -> list[str]:
    return sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.lexists(name) else [name]


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
            except (tarfile.TarError, ValueError, OverflowError):
                pass  # told apart below, as a shard that ends without its zeros
            raw.seek(tar.offset)
            if raw.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                _log.warning("%s is cut short or damaged after %d samples; the rest of it is not used", path, len(found))
    except (OSError, ValueError, tarfile.TarError) as err:
        raise UserError(f"{str(path)!r} is not a readable .tar ({err}): fetch it again or leave it out") from None
    return found


class CaptionedDataset:
    """Any sized, indexable dataset of (image, caption): PIL images, uint8 arrays (H, W, 3) or uint8 tensors (3, H, W).

    Its identity is that of its length and of sixteen of its pairs.
    """

    def __init__(self, dataset: Any, size: int) -> None:
        self.dataset, self.size, self.name = dataset, size, type(dataset).__name__
        if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")) or not len(dataset):
            raise UserError(
                f"no data in a {self.name}: give a folder, a cache, or pairs (image, caption) with a length and an index"
            )
        few = sorted({i * (len(dataset) - 1) // 15 for i in range(16)})
        pairs = (self._pair(i) for i in few)
        self.identity = _identity((len(dataset), *image.shape, image.numpy().tobytes(), caption) for image, caption in pairs)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Pair:
        image, caption = self._pair(index)
        height, width = image.shape[1:]
        if max(height, width) > MAX_ASPECT * min(height, width):
            raise Unreadable(f"pair {index} cannot be read: {width}x{height} pixels are too long a strip")
        return Pair(resize_centre_crop(image, self.size), _checked(caption.strip(), f"pair {index}"))

    def _pair(self, index: int) -> tuple[Tensor, str]:
        """The image as it is, (3, H, W) uint8 RGB, and its caption."""
        pair = self.dataset[index]
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[1], str):
            raise UserError(f"item {index} of the {self.name} is no pair (image, caption): got a {type(pair).__name__}")
        image, caption = pair
        if isinstance(image, Image.Image | np.ndarray):
            image = torch.from_numpy(np.array(image.convert("RGB") if isinstance(image, Image.Image) else image))
            image = image.permute(2, 0, 1).contiguous() if image.ndim == 3 else image
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            it = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else f"a {type(image).__name__}"
            forms = "a PIL image, a uint8 array (H, W, 3) or a uint8 tensor (3, H, W)"
            raise UserError(f"the image of item {index} of the {self.name} is {it}: give {forms}")
        return image.cpu(), caption


def _square(file: Path | io.BytesIO, name: str, size: int) -> Tensor:
    """(3, size, size) uint8 RGB. Raises Unreadable."""
    try:
        image = read_image(file, MAX_ASPECT)
    except Unreadable as err:
        raise Unreadable(f"{name} cannot be read: {err.reason}") from None
    return resize_centre_crop(image, size)


def _checked(caption: str, name: str) -> str:
    """The caption of a sample. Raises Unreadable for one that is blank or no text."""
    if not caption:
        raise Unreadable(f"{name} has no caption")
    if why := flaw(caption):
        raise Unreadable(f"the caption of {name} holds {why}")
    return caption


def _inside(folder: Path, name: str) -> bool:
    """True for a path that does not lead out of the folder; a link that lies inside may point anywhere."""
    return Path(os.path.relpath(folder / name, folder)).parts[:1] != ("..",)


def _n_bytes(folder: Path, name: str) -> int:
    """The size of a file of the folder, -1 when there is none."""
    path = folder / name
    return path.stat().st_size if _inside(folder, name) and os.path.isfile(path) else -1


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
