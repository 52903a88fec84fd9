"""Images with captions on disk, sound and broken: folders with metadata, .tar shards."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 16


def picture(seed: int, size: tuple[int, int] = (24, 20), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write_folder(folder: Path, n: int, metadata: str = "metadata.csv", header: str = "file_name,text") -> Path:
    folder.mkdir(parents=True)
    for i in range(n):
        (folder / f"{i}.png").write_bytes(picture(i))
    lines = [f"{i}.png,cat {i}" for i in range(n)]
    if metadata.endswith(".jsonl"):
        lines = [json.dumps({"file_name": f"{i}.png", header: f"cat {i}"}) for i in range(n)]
    (folder / metadata).write_text("\n".join([*([header] if metadata.endswith(".csv") else []), *lines]) + "\n")
    return folder


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(i: int, kind: str = "jpg", text: str | None = "", meta: str | None = "") -> list[tuple[str, bytes]]:
    """The members of one sample in img2dataset's order; None for no such member."""
    encoder = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}[kind]
    members = [(f"{i:05d}.{kind}", picture(i, kind=encoder))]
    if text is not None:
        members.append((f"{i:05d}.txt", (text or f"cat {i}").encode()))
    if meta is not None:
        members.append((f"{i:05d}.json", (meta or json.dumps({"key": f"{i:05d}", "caption": f"cat {i}"})).encode()))
    return members


def write_shards(folder: Path, n: int, per_shard: int = 3) -> str:
    for k, start in enumerate(range(0, n, per_shard)):
        write_tar(folder / f"{k:05d}.tar", [m for i in range(start, min(start + per_shard, n)) for m in sample(i)])
    return f"{folder}/{{00000..{(n - 1) // per_shard:05d}}}.tar"


def break_folder(folder: Path) -> str:
    write_folder(folder, 20)
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "2.png").unlink()
    (folder / "3.png").write_bytes(b"")
    (folder / "4.png").write_bytes(picture(0, (2, 2 * 65)))
    text = (folder / "metadata.csv").read_text()
    (folder / "metadata.csv").write_text(text.replace("5.png,cat 5\n", "5.png,\n").replace("6.png,cat 6\n", "6.png\n"))
    return str(folder)
