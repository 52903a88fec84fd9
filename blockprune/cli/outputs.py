"""A run directory's contents: what each record becomes on disk, and the report files made from them. No torch for reports."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockprune.decode import read_bytes, regular_file
from blockprune.errors import UserError
from blockprune.model.architecture import CONVENTIONS, Architecture, BlockGraph, Cost
from blockprune.reports import ScanView, to_csv, to_json, to_markdown
from blockprune.reports.search_view import SearchView
from blockprune.runs.directory import Run, read_rows, read_run
from blockprune.runs.records import Evaluation, Score, timed_in_turn
from blockprune.runs.schema import EvaluateRun, ScanRun, SearchRun
from blockprune.stages.search.budget import parse_budget

Arrays = dict[str, NDArray[Any]]
MAX_PART_BYTES = 2**36
MAKE_AGAIN = "delete it and run the same command again"


def keep_arrays(run: Run, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    from safetensors.numpy import save

    run.write(f"parts/{name}.safetensors", save({k: np.ascontiguousarray(v) for k, v in arrays.items()}))


def recall_arrays(folder: Path, name: str) -> Arrays | None:
    """What `keep_arrays` kept under that name; None when there is nothing."""
    file = folder / "parts" / f"{name}.safetensors"
    return read_arrays(file) if file.exists() else None


def read_arrays(file: Path) -> Arrays:
    """What `keep_arrays` wrote into that file."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(read_bytes(file, MAKE_AGAIN, limit=MAX_PART_BYTES))
    except (SafetensorError, ValueError, KeyError, TypeError) as err:
        raise UserError(f"the part {str(file)!r} is damaged ({err}): {MAKE_AGAIN}") from None
    lengths = {a.shape[:1] for a in arrays.values()}
    if len(lengths) != 1 or lengths == {()} or not all(np.issubdtype(a.dtype, np.number) for a in arrays.values()):
        raise UserError(f"the part {str(file)!r} is damaged (its arrays are not numbers, a row for each sample): {MAKE_AGAIN}")
    return arrays


def read_index(file: Path, n_images: int) -> list[int]:
    """The numbers of the images, of `n_images`, that a part of an evaluation is about."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(regular_file(file, MAKE_AGAIN), framework="np") as part:
            index = part.get_tensor("index")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as err:
        raise UserError(f"the part {str(file)!r} is damaged ({err}): {MAKE_AGAIN}") from None
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer) or not ((index >= 0) & (index < n_images)).all():
        raise UserError(f"the part {str(file)!r} is damaged (its index is not of images 0 to {n_images - 1}): {MAKE_AGAIN}")
    return [int(i) for i in index]


def strip_of_files(files: Sequence[Path]) -> bytes:
    """Image files of one size side by side in one PNG."""
    from PIL import Image

    return strip_png(np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files]))


def strip_png(images: NDArray[np.uint8]) -> bytes:
    """(k, H, W, 3) images side by side in one PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(list(images), axis=1)).save(buffer, format="PNG")
    return buffer.getvalue()


def keep_picture(run: Run, arch: Architecture, images: NDArray[np.uint8]) -> None:
    run.write(f"images/{arch.key}.png", strip_png(images))


def strip_images(file: Path, n: int, unread: list[str]) -> NDArray[np.uint8] | None:
    """(k, H, W, 3) images of a strip of `n`, square ones where `n` is 0; None, with a sentence in `unread`, for a damaged file."""
    from PIL import Image

    try:
        strip = np.asarray(Image.open(file).convert("RGB"))
        return np.stack(np.split(strip, n or strip.shape[1] // strip.shape[0], axis=1))
    except (OSError, ValueError, SyntaxError) as err:
        unread.append(f"The picture {str(file)!r} cannot be read ({err}).")
        return None


def _pictures(folder: Path, archs: Mapping[str, Architecture], n: int, unread: list[str]) -> dict[str, NDArray[np.uint8]]:
    files = {label: folder / "images" / f"{arch.key}.png" for label, arch in archs.items()}
    found = {label: strip_images(file, n, unread) for label, file in files.items() if file.exists()}
    return {label: images for label, images in found.items() if images is not None}


def search_view_of(folder: Path, rows: Sequence[Mapping[str, Any]] | None = None, unread: list[str] | None = None) -> SearchView:
    """What a search directory says, of all its rows or of some; sentences in `unread` tell of damaged pictures.

    Raises UserError when it is none.
    """
    said, rows = read_run(folder, SearchRun), read_rows(folder, "search") if rows is None else rows
    graph, asked = BlockGraph.from_json(said["graph"]), said["asked"]
    kinds = ("search", "random", "final", "recovered")
    evaluations = {kind: [Evaluation.from_json(row) for row in rows if row["kind"] == kind] for kind in kinds}
    scores: dict[str, dict[str, Score]] = {}
    for row in rows:
        found = row["scores"] if row["kind"] == "seen" else [row] if row["kind"] == "timing" else []
        for score in timed_in_turn(map(Score.from_json, found)):
            scores.setdefault(score.label, {})[score.measure] = score
    full = scores.get("full", {}).get("latency")
    scope = (said["outside_params"], full.value if full else None, asked["macs"], asked["scope"])
    limits = {text: (b.quantity, b.limit) for text in asked["budget"] for b in [parse_budget(text, graph, *scope)]}
    archs = {e.score.label: e.candidate.arch for e in evaluations["final"]}
    prompts = said.get("pictured_prompts", [])
    return SearchView(
        protocol={"model": said["model"], **asked, **said.get("made_with", {})},
        graph=graph,
        outside_params=said["outside_params"],
        limits=limits,
        search=sorted(evaluations["search"], key=lambda e: e.trial),
        random=sorted(evaluations["random"], key=lambda e: e.trial),
        finals=evaluations["final"],
        recovered=evaluations["recovered"],
        scores=scores,
        images=_pictures(folder, {"full": Architecture(), **archs}, len(prompts), [] if unread is None else unread),
        prompts=prompts,
    )


def write_search(run: Run) -> SearchView:
    """Writes finalists.csv, report.md and the figures, pareto.json for a front, best.json unless there are no budgets to be best
    within; returns what they were made from. A search that found nothing raises UserError and writes nothing."""
    from blockprune.reports import search_text
    from blockprune.reports.canvas import png
    from blockprune.reports.search_figures import search_figures

    view, names = search_view_of(run.path), []
    quantity = view.protocol["pareto"] or next((q for q, _ in view.limits.values()), "params")
    if view.chosen and not view.is_front:
        run.write("best.json", search_text.best_json(view))
    run.write("finalists.csv", search_text.finalists_csv(view))
    if view.protocol["pareto"]:
        run.write("pareto.json", search_text.pareto_json(view, quantity))
    for name, figure in search_figures(view, quantity):
        run.write(name, png(figure))
        names.append(name)
    run.write("report.md", search_text.search_markdown(view, names))
    return view


def component_row(name: str, who: str, cost: Cost, latency_s: float | None) -> dict[str, Any]:
    """A line of the component table, as run directories and `blockprune cost --json` hold it."""
    numbers = {"params": cost.params, "macs": {c: cost.macs(c) for c in CONVENTIONS}, "latency_s": latency_s}
    return {"kind": "component", "name": name, "who": who, **numbers}


def write_evaluation(run: Run) -> dict[str, Any]:
    """Writes evaluate.json and evaluate.csv; returns what the first of them says: each setting with its scores by measure."""
    said, rows = read_run(run.path, EvaluateRun), run.rows()
    named = ("label", "model", "teacher", "arch", "protocol")
    settings = []
    for setting in said["settings"]:
        scores = {r["measure"]: r for r in rows if r["kind"] == "score" and r["setting"] == setting["label"]}
        kept = ("value", "low", "high", "n", "seed", "unit", "direction", "error")
        settings.append({**setting, "scores": {m: {k: r[k] for k in kept} for m, r in scores.items()}})
    components = [{k: v for k, v in r.items() if k != "kind"} for r in rows if r["kind"] == "component"]
    view = {**{k: said[k] for k in named}, "made_with": said["made_with"], "settings": settings, "components": components}
    run.write("evaluate.json", json.dumps(view, indent=2) + "\n")
    run.write("evaluate.csv", _evaluation_csv(view))
    return view


def _evaluation_csv(view: Mapping[str, Any]) -> str:
    measures = list(dict.fromkeys(m for setting in view["settings"] for m in setting["scores"]))
    plain = ("steps", "cfg_scale", "scheduler", "quantize", "checkpoint")
    columns = [
        "model",
        "setting",
        *plain,
        *(f"{m}{end}" for m in measures for end in ("", "_low", "_high", "_n")),
        "protocol",
        "error",
    ]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(columns)
    for setting in view["settings"]:
        scores = setting["scores"]
        numbers = [scores.get(m, {}).get(key) for m in measures for key in ("value", "low", "high", "n")]
        error = next((s["error"] for s in scores.values() if s["error"]), "")
        table.writerow([view["label"], setting["label"], *(setting[k] for k in plain), *numbers, view["protocol"]["hash"], error])
    return text.getvalue()


def write_curves(run: Run) -> None:
    """Writes losses.png and, where there was a validation, validation.png."""
    from blockprune.reports.canvas import png
    from blockprune.reports.curves import curves

    for name, figure in curves(run.rows()):
        run.write(name, png(figure))


def view_of(folder: Path, rows: Sequence[Mapping[str, Any]] | None = None, unread: list[str] | None = None) -> ScanView:
    """What a scan directory says, of all its rows or of some; sentences in `unread` tell of damaged pictures.

    Raises UserError when it is none.
    """
    said = read_run(folder, ScanRun)
    archs = {label: Architecture(frozenset(names)) for label, names in said["archs"].items()}
    prompts = said.get("pictured_prompts", [])
    return ScanView(
        protocol={**said["asked"], **said.get("made_with", {})},
        graph=BlockGraph.from_json(said["graph"]),
        archs=archs,
        scores=timed_in_turn(Score.from_json(row) for row in (read_rows(folder, "scan") if rows is None else rows)),
        images=_pictures(folder, archs, len(prompts), [] if unread is None else unread),
        prompts=prompts,
    )


def write_reports(run: Run) -> ScanView:
    """Writes scan.csv, scan.json, report.md and the figures; returns what they were made from."""
    from blockprune.reports.canvas import png
    from blockprune.reports.figures import figures

    view, names = view_of(run.path), []
    for name, figure in figures(view):
        run.write(name, png(figure))
        names.append(name)
    run.write("scan.csv", to_csv(view))
    run.write("scan.json", to_json(view))
    run.write("report.md", to_markdown(view, names))
    return view
