"""What comes from files: folders of images with captions, reference statistics."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blockprune.data.captions import flaw, metadata_of, read_metadata
from blockprune.data.image_files import Unreadable, image_names, read_image
from blockprune.errors import UserError
from blockprune.measures.fid_kid import Detector, Stats
from blockprune.runs.atomic import writing
from blockprune.runs.lock import locked

_log = logging.getLogger("blockprune")


class Picture(NamedTuple):
    """An image (3, H, W) uint8 RGB, and its path relative to the folder."""

    image: Tensor
    name: str


class ImageFolder:
    """The images of a folder and of all folders below it, sorted by path, as RGB.

    An image that cannot be read, or is more than `max_aspect` times as long as wide, is left out; `skipped` lists those of the last
    iteration. UserError when the folder has no image, or an iteration skips more than 10 (or 1 %, if that is more) or reads none.
    """

    def __init__(self, folder: str | Path, max_aspect: float = float("inf")) -> None:
        self.folder = Path(folder)
        self.names = image_names(self.folder)
        self.max_aspect = max_aspect
        self.max_skipped = max(10, len(self.names) // 100)
        self.skipped: list[str] = []

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Picture]:
        self.skipped = []
        for name in self.names:
            try:
                image = read_image(self.folder / name, self.max_aspect)
            except Unreadable:
                self.skipped.append(name)
            else:
                yield Picture(image, name)
            if len(self.skipped) > self.max_skipped:
                raise UserError(
                    f"more than {self.max_skipped} images of {str(self.folder)!r} cannot be read, "
                    f"such as {name!r}: mend or remove them"
                )
        if len(self.skipped) == len(self.names):
            raise UserError(f"none of the {len(self)} images of {str(self.folder)!r} can be read, such as {self.names[0]!r}")

    @cached_property
    def captions(self) -> dict[str, str]:
        """The captions of the images that metadata.csv or metadata.jsonl lists; none where the folder has neither.

        UserError when the metadata cannot be read, name none of the images, or hold a caption that is no text.
        """
        metadata = metadata_of(self.folder)
        listed = {PurePosixPath(name).as_posix(): caption for name, caption in read_metadata(metadata)} if metadata else {}
        known = {name: listed[name] for name in self.names if listed.get(name)}
        if listed and not any(name in listed for name in self.names):
            raise UserError(f"the metadata of {str(self.folder)!r} name none of its images, but {next(reversed(listed))!r}")
        for name, caption in known.items():
            if why := flaw(caption):
                raise UserError(f"the caption of {name!r} in {str(metadata)!r} holds {why}: mend or drop it")
        return known


def resize_centre_crop(image: Tensor, size: int) -> Tensor:
    """(3, H, W) uint8 => (3, size, size): the shorter side resized to `size` (bicubic, antialiased), then the centre."""
    height, width = image.shape[1:]
    scale = size / min(height, width)
    new = (max(size, round(width * scale)), max(size, round(height * scale)))
    resized = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(new, Image.Resampling.BICUBIC)
    left, top = (new[0] - size) // 2, (new[1] - size) // 2
    cropped = np.array(resized.crop((left, top, left + size, top + size)))
    return torch.from_numpy(cropped).permute(2, 0, 1).contiguous()


def features_of_folder(
    folder: ImageFolder, detector: Detector, batch_size: int = 32, prepare: Callable[[Tensor], Tensor] = lambda image: image
) -> np.ndarray[Any, Any]:
    """(N, D) float32 features of the readable images in the order of the folder; images may differ in size.

    `prepare` makes of each (3, H, W) uint8 image the one that is looked at.
    """
    rows: dict[int, np.ndarray[Any, Any]] = {}
    waiting: dict[tuple[int, ...], list[tuple[int, Tensor]]] = {}

    def flush(shape: tuple[int, ...]) -> None:
        places, images = zip(*waiting.pop(shape), strict=True)
        rows.update(zip(places, detector(torch.stack(images)), strict=True))

    for place, picture in enumerate(folder):
        image = prepare(picture.image)
        group = waiting.setdefault(tuple(image.shape), [])
        group.append((place, image))
        if len(group) == batch_size:
            flush(tuple(image.shape))
        elif sum(map(len, waiting.values())) >= 4 * batch_size:
            # many sizes, each with few images: bounds what waits in memory
            flush(max(waiting, key=lambda shape: len(waiting[shape])))
    for shape in list(waiting):
        flush(shape)
    return np.stack([rows[place] for place in sorted(rows)])


def stats_of_folder(
    folder: str | Path | ImageFolder,
    detector: Detector,
    batch_size: int = 32,
    keep: bool = True,
    prepare: Callable[[Tensor], Tensor] = lambda image: image,
) -> Stats:
    """The statistics of a folder's images, with their features where `keep`; images that were skipped are logged."""
    images = folder if isinstance(folder, ImageFolder) else ImageFolder(folder)
    stats = Stats.of(features_of_folder(images, detector, batch_size, prepare), keep=keep)
    if images.skipped:
        shown = ", ".join(images.skipped[:3])
        _log.warning("skipped %d of %d images in %s: cannot read %s", len(images.skipped), len(images), images.folder, shown)
    return stats


def cached_stats(folder: ImageFolder, detector: Detector, prepared: str, prepare: Callable[[Tensor], Tensor]) -> Stats:
    """`stats_of_folder`, computed once for the same files, detector and preparation (`prepared` in words) and kept in a user cache.

    Processes that ask at once wait for the first. A file counts by its name, size and time of change, a detector by what it sees.
    """
    files = [(name, (stat := (folder.folder / name).stat()).st_size, stat.st_mtime_ns) for name in folder.names]
    probe = torch.arange(3 * 64 * 64).mul(7919).remainder(256).to(torch.uint8).view(1, 3, 64, 64)
    sight = np.round(detector(probe).astype(np.float64), 2).tolist()
    key = hashlib.sha256(json.dumps([str(folder.folder.resolve()), files, detector.name, sight, prepared]).encode()).hexdigest()[
        :16
    ]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockprune" / "references"
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / f"{key}.npz"
    with locked(file):
        if not file.is_file():
            write_stats(file, stats_of_folder(folder, detector, prepare=prepare), detector.name)
    return read_reference(file, detector)


def read_reference(path: str | Path, detector: Detector, batch_size: int = 32) -> Stats:
    """The reference of a folder of images, or of a .npz made by `write_stats` or published with `mu` and `sigma` alone.

    UserError when it is neither, or was made by another detector.
    """
    path = Path(path)
    if os.path.isdir(path):
        return stats_of_folder(path, detector, batch_size)
    if not os.path.isfile(path):
        raise UserError(f"no reference at {str(path)!r}: give a folder of images or a file made by `blockprune stats`")
    arrays = _read_arrays(path)
    made_by = str(arrays["detector"]) if "detector" in arrays else detector.name
    if made_by != detector.name:
        raise UserError(f"{str(path)!r} was made by the detector {made_by!r}, not {detector.name!r}: use one for both")
    mu, sigma, features = arrays["mu"], arrays["sigma"], arrays.get("features")
    if mu.shape != (detector.n_features,):
        raise UserError(
            f"{str(path)!r} holds features of shape {mu.shape}, the detector {detector.name!r} gives "
            f"{detector.n_features}: make the reference with that detector"
        )
    numbers = [mu, sigma] if features is None else [mu, sigma, features]
    sound = sigma.shape == mu.shape * 2 and (features is None or features.shape[1:] == mu.shape)
    real = (np.floating, np.integer)
    if not sound or not all(any(np.issubdtype(a.dtype, k) for k in real) and np.isfinite(a).all() for a in numbers):
        raise UserError(f"{str(path)!r} holds no usable mu (D,) and sigma (D, D): make it again with `blockprune stats`")
    features = None if features is None else features.astype(np.float64)
    n = int(arrays["n"]) if "n" in arrays and np.issubdtype(arrays["n"].dtype, np.integer) and arrays["n"].shape == () else 0
    return Stats(mu.astype(np.float64), sigma.astype(np.float64), n, features)


def _read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    try:
        if not zipfile.is_zipfile(path):
            raise zipfile.BadZipFile
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        if not all(isinstance(a, np.ndarray) for a in arrays.values()):
            raise ValueError
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, RuntimeError, MemoryError) as error:
        raise UserError(f"{str(path)!r} is not a readable .npz: make it again with `blockprune stats`") from error
    if not {"mu", "sigma"} <= set(arrays):
        raise UserError(f"a reference .npz holds mu and sigma: {str(path)!r} has {', '.join(arrays) or 'neither'}")
    return arrays


def write_stats(path: str | Path, stats: Stats, detector_name: str) -> None:
    """Writes a .npz for `read_reference`, whole or not at all. UserError when the place cannot be written."""
    path = Path(path)
    arrays = {"mu": stats.mu, "sigma": stats.sigma, "n": np.array(stats.n), "detector": np.array(detector_name)}
    if stats.features is not None:
        arrays["features"] = stats.features.astype(np.float32)
    try:
        with writing(path) as part, part.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror or error}; free space or choose another place") from error
