"""A folder of training pairs that were encoded before: written by any number of processes, read in any order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blockprune.data.encoded import Encoded, Live, Provider, flat, identity_of_pairs, nested
from blockprune.data.training_data import Reader
from blockprune.decode import Object, Positive, checked, parse_json, read_json, regular_file
from blockprune.errors import UserError
from blockprune.model.families import Condition, join
from blockprune.runs.atomic import writing
from blockprune.runs.directory import differences
from blockprune.runs.lock import locked

FORMAT = 1
INDEX = "cache.json"
AGAIN = "run the same `blockprune cache` again"


def terms(reader: Reader, teacher: str, flip: bool, dtype: torch.dtype) -> dict[str, Any]:
    """What makes a cache the right one; `teacher` is the `identity` of the model whose encoders are used."""
    data = {"data": reader.source.identity, "n": len(reader), "resolution": reader.source.size}
    return data | {"flip": flip, "teacher": teacher, "dtype": str(dtype).removeprefix("torch.")}


class Cached(Provider):
    """Reads what `write_cache` wrote; what Live gives, within rounding.

    UserError when a shard is missing or damaged, or the cache is not of the terms `asked` (None: any). One with both orientations
    serves where one is asked for. `skipped` maps indices of broken samples to reasons.
    """

    def __init__(self, folder: str | Path, asked: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        stored = read_cache(self.folder)["asked"]
        self.n, self.flip, self.shard_size = int(stored["n"]), bool(stored["flip"]), int(stored["shard_size"])
        needed = {name: value for name, value in (asked or {}).items() if name != "flip" or value}
        _check_terms(self.folder, {name: stored.get(name) for name in needed}, needed)
        self.identity = identity_of_pairs(stored["data"], stored["resolution"])
        self.names = list(shards(self.n, self.shard_size))
        if bad := unfinished(self.folder, self.n, self.shard_size):
            raise UserError(f"{len(bad)} of {len(self.names)} shards of {str(self.folder)!r} are missing or damaged: {AGAIN}")
        self.skipped = _skipped(self.folder, self.n, self.shard_size)

    def __len__(self) -> int:
        return self.n

    def encoded(self, indices: Sequence[int], flips: Sequence[bool]) -> Encoded:
        if any(flips) and not self.flip:
            raise UserError(f"{str(self.folder)!r} holds no mirrored images: write a cache with --random-flip, or train without")
        of_shard: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            if not 0 <= index < self.n:
                raise IndexError(f"pair {index} of {self.n}")
            of_shard.setdefault(index // self.shard_size, []).append(place)
        rows: dict[int, tuple[Tensor, Tensor, Condition]] = {}
        for shard, places in of_shard.items():
            # opened for each batch: nothing stays open, so that processes and threads may share a cache
            with self._open(shard) as file:
                rows |= {p: _row(file, indices[p] % self.shard_size, flips[p]) for p in places}
        means, logvars, conditions = zip(*(rows[place] for place in range(len(indices))), strict=True)
        return Encoded(torch.cat(means), torch.cat(logvars), join(*conditions))

    @contextmanager
    def _open(self, shard: int) -> Iterator[safe_open]:
        path = self.folder / self.names[shard]
        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as err:
            raise UserError(f"cannot read {str(path)!r} ({err}): {AGAIN}") from None


def _row(file: safe_open, row: int, flip: bool) -> tuple[Tensor, Tensor, Condition]:
    """Mean, log-variance and condition of one row of an open shard, each with a batch dimension of 1."""
    mirrored = "_flipped" if flip else ""
    mean, logvar = (file.get_slice(f"{name}{mirrored}")[row : row + 1] for name in ("mean", "logvar"))
    text = int(file.get_slice("caption")[row : row + 1])
    names = [name for name in file.keys() if name.startswith("condition/")]  # noqa: SIM118
    flat = {name.removeprefix("condition/"): file.get_slice(name)[text : text + 1] for name in names}
    return mean, logvar, nested(flat)


def write_cache(
    pipe: DiffusionPipeline,
    reader: Reader,
    folder: str | Path,
    shard_size: int = 512,
    *,
    teacher: str,
    flip: bool = False,
    chunk: int = 1,
    tick: Callable[[str, int], None] = lambda shard, n: None,
) -> dict[str, Any]:
    """Encodes every pair of the reader into `folder`, in shards of `shard_size` pairs; returns what cache.json says at the end.

    Shards that are whole are kept, so that a run that was stopped goes on. Several processes may write one cache: each takes the
    shards that no other is writing and returns when all are there. `tick` hears the shard and how many pairs of it are done.
    UserError when the folder holds something else or a cache of other terms.
    """
    folder, live = Path(folder), Live(pipe, reader, chunk)
    asked = terms(reader, teacher, flip, pipe.vae.dtype) | {"shard_size": shard_size}
    begun = {"format": FORMAT, "source": reader.source.name, "asked": asked}
    _begin(folder, begun)
    ranges, left = shards(len(reader), shard_size), unfinished(folder, len(reader), shard_size)
    reader.skip(_skipped(folder, len(reader), shard_size))
    for name in ranges.keys() - left.keys():
        with locked(folder / name, wait=False):
            pass  # and so goes the lock of a process that was killed after it wrote the shard
    for wait in (False, True):
        for name in list(left):
            with locked(folder / name, wait) as mine:
                if not mine:
                    continue
                if _whole(folder / name, left[name]) is None:
                    _write(folder / name, live, ranges[name], flip, tick)
                else:
                    tick(name, left[name])
                del left[name]
    reader.skip(skipped := _skipped(folder, len(reader), shard_size))
    done = begun | {"n_skipped": len(skipped), "skipped": {str(i): why for i, why in sorted(skipped.items())}}
    with locked(folder / INDEX), writing(folder / INDEX) as part:
        part.write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
    return done


def shards(n: int, shard_size: int) -> dict[str, range]:
    """The shard files of a cache of `n` pairs, and the indices that each holds."""
    return {f"shard-{k:05d}.safetensors": range(i, min(i + shard_size, n)) for k, i in enumerate(range(0, n, shard_size))}


def unfinished(folder: Path, n: int, shard_size: int) -> dict[str, int]:
    """The shards that are missing or damaged, and how many pairs each is to hold."""
    return {name: len(rows) for name, rows in shards(n, shard_size).items() if _whole(folder / name, len(rows)) is None}


def _skipped(folder: Path, n: int, shard_size: int) -> dict[int, str]:
    """The broken samples that the finished shards name."""
    reasons: dict[int, str] = {}
    for name, rows in shards(n, shard_size).items():
        reasons |= {int(i): why for i, why in (_whole(folder / name, len(rows)) or {}).items()}
    return reasons


def _whole(path: Path, n_rows: int) -> dict[str, str] | None:
    """The broken samples that a shard names; None when it is missing, cut short, not a shard, or of another length."""
    try:
        with safe_open(regular_file(path, AGAIN), framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            skipped = parse_json(file.metadata()["skipped"], dict[str, str], "the shard", AGAIN)
            caption = file.get_tensor("caption")
    except (UserError, OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
    rows = [shape for name, shape in shapes.items() if not name.startswith("condition/") and name != "caption"]
    texts = {shape[0] for name, shape in shapes.items() if name.startswith("condition/") and shape}
    sound = len({*rows}) == 1 and len(rows[0]) == 4 and rows[0][0] == n_rows and {"mean", "logvar"} <= shapes.keys()
    sound = sound and caption.shape == (n_rows,) and not caption.is_floating_point() and len(texts) == 1
    if not sound or not all(key.isdecimal() for key in skipped) or not (0 <= int(caption.min()) <= int(caption.max()) < min(texts)):
        return None
    return skipped


def _write(path: Path, live: Live, rows: range, flip: bool, tick: Callable[[str, int], None]) -> None:
    """Encodes the pairs of one shard and writes it, whole or not at all."""
    moments: dict[str, list[Tensor]] = {}
    captions: list[str] = []
    for start in range(rows.start, rows.stop, live.chunk):
        pairs = [live.reader.pair(i) for i in range(start, min(start + live.chunk, rows.stop))]
        images = torch.stack([p.image for p in pairs])
        for tail, x in (("", images), ("_flipped", images.flip(-1)))[: 1 + flip]:
            mean, logvar = live.moments(x)
            moments.setdefault(f"mean{tail}", []).append(mean)
            moments.setdefault(f"logvar{tail}", []).append(logvar)
        captions += [p.caption for p in pairs]
        tick(path.name, len(pairs))
    distinct = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
    tensors = {name: torch.cat(parts) for name, parts in moments.items()}
    tensors |= {"caption": torch.tensor([distinct[c] for c in captions])}
    tensors |= {f"condition/{name}": tensor for name, tensor in flat(live.condition(list(distinct)))}
    metadata = {"skipped": json.dumps({i: live.reader.skipped[i] for i in rows if i in live.reader.skipped})}
    with writing(path) as part:
        save_file(tensors, part, metadata)


def _begin(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Makes the folder a cache of those terms, or finds that it is one."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out must be a directory: {str(folder)!r} is a file")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise UserError(f"cannot make the folder {str(folder)!r} ({err.strerror}): choose another --out") from None
    with locked(folder / INDEX):
        if (folder / INDEX).exists():
            _check_terms(folder, read_cache(folder)["asked"], wanted["asked"])
            return
        if any(not p.name.startswith(".") for p in folder.iterdir()):
            raise UserError(f"{str(folder)!r} is not empty and holds no cache: choose another --out")
        with writing(folder / INDEX) as part:
            part.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")


def _check_terms(folder: Path, held: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    if changes := list(differences(held, asked)):
        raise UserError(f"{str(folder)!r} is a cache of other terms ({'; '.join(changes)}): choose another folder or ask the same")


class CacheAsked(msgspec.Struct):
    """What makes a cache the right one."""

    data: str
    n: Positive
    resolution: Positive
    flip: bool
    shard_size: Positive
    teacher: str
    dtype: str


class CacheRecord(msgspec.Struct):
    """cache.json."""

    asked: CacheAsked


def read_cache(folder: Path) -> dict[str, Any]:
    """What the cache.json of a cache says; UserError when there is none or it cannot be read."""
    remedy = "delete the folder and run `blockprune cache` again"
    missing = f"no cache in {str(folder)!r}: make one with `blockprune cache --out {folder}`"
    cache_json = read_json(folder / INDEX, Object, remedy, missing)
    if cache_json.get("format") != FORMAT:
        raise UserError(f"{str(folder / INDEX)!r} is no cache of format {FORMAT}, which this version reads: make a new one")
    checked(cache_json, CacheRecord, repr(str(folder / INDEX)), remedy)
    return cache_json
