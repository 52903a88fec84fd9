"""A run directory's contents: what each record becomes on disk, and the report files made from them. No torch for reports."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockprune.arch import Architecture, BlockGraph
from blockprune.records import Score
from blockprune.report import ScanView, to_csv, to_json, to_markdown
from blockprune.store import Run, read_rows, read_run

Arrays = dict[str, NDArray[Any]]


def keep_arrays(run: Run, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    from safetensors.numpy import save

    run.write(f"parts/{name}.safetensors", save({k: np.ascontiguousarray(v) for k, v in arrays.items()}))


def recall_arrays(folder: Path, name: str) -> Arrays | None:
    """What `keep_arrays` kept under that name; None when there is nothing."""
    from safetensors.numpy import load

    file = folder / "parts" / f"{name}.safetensors"
    return load(file.read_bytes()) if file.exists() else None


def keep_picture(run: Run, arch: Architecture, images: NDArray[np.uint8]) -> None:
    """(k, H, W, 3) images of an architecture side by side in one PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(list(images), axis=1)).save(buffer, format="PNG")
    run.write(f"images/{arch.key}.png", buffer.getvalue())


def _pictures(folder: Path, archs: Mapping[str, Architecture], n: int) -> dict[str, NDArray[np.uint8]]:
    from PIL import Image

    found = {}
    for label, arch in archs.items():
        if (file := folder / "images" / f"{arch.key}.png").exists():
            strip = np.asarray(Image.open(file).convert("RGB"))
            found[label] = np.stack(np.split(strip, n, axis=1))
    return found


def view_of(folder: Path) -> ScanView:
    """What a scan directory says. Raises UserError when it is none."""
    said = read_run(folder)
    archs = {label: Architecture(frozenset(names)) for label, names in said["archs"].items()}
    prompts = said["pictured_prompts"]
    return ScanView(
        protocol={**said["asked"], **said["made_with"]},
        graph=BlockGraph.from_json(said["graph"]),
        archs=archs,
        scores=[Score.from_json(row) for row in read_rows(folder)],
        images=_pictures(folder, archs, len(prompts)),
        prompts=prompts,
    )


def write_reports(run: Run) -> ScanView:
    """Writes scan.csv, scan.json, report.md and the figures; returns what they were made from."""
    from blockprune.report.canvas import png
    from blockprune.report.figures import figures

    view, names = view_of(run.path), []
    for name, figure in figures(view):
        run.write(name, png(figure))
        names.append(name)
    run.write("scan.csv", to_csv(view))
    run.write("scan.json", to_json(view))
    run.write("report.md", to_markdown(view, names))
    return view
