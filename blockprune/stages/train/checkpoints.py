"""Checkpoints of a training run: written whole or not at all, rotated, and read back only when they are sound."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from blockprune.decode import Natural, read_json, regular_file
from blockprune.errors import UserError
from blockprune.runs.atomic import writing_folder

Parts = Mapping[str, Mapping[str, Tensor]]
MANIFEST = "checkpoint.json"


@dataclass(frozen=True)
class Snapshot:
    """A sound checkpoint: how many optimiser steps were done, and named groups of tensors."""

    step: int
    parts: dict[str, dict[str, Tensor]]
    path: Path


def write_snapshot(folder: Path, step: int, parts: Parts, limit: int | None = None) -> Path:
    """Writes `folder`/step-NNNNNNN with one safetensors file for each part; then the oldest beyond `limit` go.

    A checkpoint of that step that is there already is replaced. What is half written has another name and is never read.
    """
    target = folder / f"step-{step:07d}"
    with writing_folder(target) as part:
        for name, tensors in parts.items():
            save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, part / f"{name}.safetensors")
        digests = {file.name: file_digest(file) for file in sorted(part.iterdir())}
        (part / MANIFEST).write_text(json.dumps({"step": step, "sha256": digests}, indent=1), encoding="utf-8")
        shutil.rmtree(target, ignore_errors=True)
    if limit is not None:
        drop_oldest(folder, limit)
    return target


def drop_oldest(folder: Path, limit: int) -> None:
    """Removes the oldest checkpoints beyond `limit`, also those that a process was killed at removing."""
    for old in sorted(_folders(folder))[:-limit]:
        shutil.rmtree(old)


def read_snapshot(folder: Path) -> tuple[Snapshot | None, list[str]]:
    """The newest sound checkpoint, None when there is none, and what was wrong with newer ones, a line each."""
    wrong: list[str] = []
    for path in sorted(_folders(folder), reverse=True):
        try:
            manifest = _sound_manifest(path)
            parts = {Path(name).stem: load_file(path / name) for name in manifest.sha256}
            return Snapshot(manifest.step, parts, path), wrong
        except (UserError, OSError, ValueError, SafetensorError) as err:
            wrong.append(f"the checkpoint {str(path)!r} cannot be used ({err}): going back to the one before")
    return None, wrong


def snapshot_folders(folder: Path) -> dict[int, Path]:
    """The checkpoints that are in `folder` by their step, oldest first, sound or not."""
    return {int(path.name.partition("-")[2]): path for path in sorted(_folders(folder))}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The student's weights of one checkpoint, their moving averages where it has them; ValueError when it is not sound."""
    try:
        names = ("student.safetensors", "ema.safetensors")
        manifest = _sound_manifest(path, names)
        student, *ema = (load_file(path / name) for name in names if name in manifest.sha256)
    except (UserError, OSError, SafetensorError) as err:
        raise ValueError(str(err)) from None
    return student | {name: t for shadow in ema for name, t in shadow.items() if name in student}


class Manifest(msgspec.Struct):
    """checkpoint.json: how many optimiser steps were done, and the digest of each file of weights, the student's among them."""

    step: Natural
    sha256: dict[str, str]

    def __post_init__(self) -> None:
        if "student.safetensors" not in self.sha256 or any(Path(name).name != name for name in self.sha256):
            raise ValueError("Expected files of the checkpoint itself, student.safetensors among them")


def _sound_manifest(path: Path, names: Sequence[str] | None = None) -> Manifest:
    """What the checkpoint says of itself; ValueError and its like where a file, of those names or any, is not what it says."""
    manifest = read_json(path / MANIFEST, Manifest, "remove it")
    for name, digest in manifest.sha256.items():
        if (names is None or name in names) and file_digest(regular_file(path / name, "remove it")) != digest:
            raise ValueError(f"{name} is damaged")
    return manifest


def _folders(folder: Path) -> Iterator[Path]:
    named = (path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdecimal())
    return (path for path in named if path.is_dir()) if folder.is_dir() else iter(())


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
