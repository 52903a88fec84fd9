"""Checkpoints of a training run: written whole or not at all, rotated, and read back only when they are sound."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

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
    part = folder / f".{target.name}.{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for name, tensors in parts.items():
            save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, part / f"{name}.safetensors")
        digests = {file.name: file_digest(file) for file in sorted(part.iterdir())}
        (part / MANIFEST).write_text(json.dumps({"step": step, "sha256": digests}, indent=1))
        for file in part.iterdir():
            _sync(file)
        shutil.rmtree(target, ignore_errors=True)
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    if limit is not None:
        for old in sorted(_folders(folder))[:-limit]:
            shutil.rmtree(old)
    return target


def read_snapshot(folder: Path) -> tuple[Snapshot | None, list[str]]:
    """The newest sound checkpoint, None when there is none, and what was wrong with newer ones, a line each."""
    wrong: list[str] = []
    for path in sorted(_folders(folder), reverse=True):
        try:
            said = json.loads((path / MANIFEST).read_text())
            for name, digest in said["sha256"].items():
                if file_digest(path / name) != digest:
                    raise ValueError(f"{name} is damaged")
            parts = {Path(name).stem: load_file(path / name) for name in said["sha256"]}
            return Snapshot(said["step"], parts, path), wrong
        except (OSError, ValueError, KeyError, SafetensorError) as err:
            wrong.append(f"the checkpoint {str(path)!r} cannot be used ({err}): going back to the one before")
    return None, wrong


def snapshot_folders(folder: Path) -> dict[int, Path]:
    """The checkpoints that are in `folder` by their step, oldest first, sound or not."""
    return {int(path.name.partition("-")[2]): path for path in sorted(_folders(folder))}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The student's weights of one checkpoint, their moving averages where it has them; ValueError when it is not sound."""
    try:
        digests = json.loads((path / MANIFEST).read_text())["sha256"]
        parts = [name for name in ("student.safetensors", "ema.safetensors") if name in digests]
        for name in parts:
            if file_digest(path / name) != digests[name]:
                raise ValueError(f"{name} is damaged")
        student, *ema = (load_file(path / name) for name in parts)
    except (OSError, KeyError, SafetensorError) as err:
        raise ValueError(str(err)) from None
    return student | {name: t for shadow in ema for name, t in shadow.items() if name in student}


def _folders(folder: Path) -> Iterator[Path]:
    return (path for path in folder.glob("step-*") if path.is_dir()) if folder.is_dir() else iter(())


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
