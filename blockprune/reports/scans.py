"""A scan's run as one value, and the files made from it. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockprune.measures.measure import names
from blockprune.measures.score import Score, timed_in_turn
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.reports.evaluations import define_own
from blockprune.reports.table import to_csv
from blockprune.reports.text import scan_markdown, to_json
from blockprune.reports.timesteps import timestep_rows
from blockprune.reports.view import ScanView, ranking
from blockprune.runs import Readable, parts
from blockprune.runs.reading import images_of, rows_of
from blockprune.runs.series import Series


def scan_view(run: Readable, unread: list[str] | None = None) -> ScanView:
    """What a scan's run says; sentences in `unread` tell of damaged rows and pictures."""
    about = run.about
    define_own(about)
    archs = {label: Architecture(frozenset(names)) for label, names in about["archs"].items()}
    prompts, known = about.get("pictured_prompts", []), parts.recall_arrays(run, "timesteps")
    return ScanView(
        protocol={**about["asked"], **about.get("made_with", {})},
        graph=BlockGraph.from_json(about["graph"]),
        archs=archs,
        scores=timed_in_turn(Score.from_json(row) for row in rows_of(run, unread)),
        images=pictures(run, archs, len(prompts), unread),
        prompts=prompts,
        timesteps=known["timestep"] if known else None,
        errors=_errors(run, list(archs)[1:], len(known["timestep"])) if known else {},
    )


def _errors(run: Readable, removals: Sequence[str], n: int) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Measure => removal => (n,) the denoising error of each sample, where all are there."""
    kept = {measure: Series(run, measure, n) for measure in names("denoising")}
    shape = {"errors": (len(removals),)}
    seen = {m: parts.check_kept(f"parts/{of.slug}", of.seen(), shape, n)["errors"] for m, of in kept.items() if not of.missing()}
    return {measure: dict(zip(removals, errors.T, strict=True)) for measure, errors in seen.items()}


def pictures(run: Readable, archs: Mapping[str, Architecture], n: int, unread: list[str] | None) -> dict[str, NDArray[np.uint8]]:
    """Label => (n, H, W, 3) uint8, the images that a run keeps of each architecture; square ones where `n` is 0."""
    read = {label: images_of(run, f"images/{arch.key}.png", n, unread) for label, arch in archs.items()}
    return {label: images for label, images in read.items() if images is not None}


def report_files(view: ScanView) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of every file of a scan's report."""
    from blockprune.reports.canvas import encoded
    from blockprune.reports.figures import figures

    drawn: list[Any] = []
    for name, figure in figures(view):
        drawn.append(name)
        yield name, encoded(figure)
    if rows := timestep_rows(view):
        yield "timesteps.csv", to_csv(rows).encode()
    yield "scan.csv", to_csv(ranking(view)).encode()
    yield "scan.json", to_json(view).encode()
    yield "report.md", scan_markdown(view, drawn).encode()
