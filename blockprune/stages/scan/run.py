"""How a scan runs: what it scores, what is kept as scores come, and where an earlier attempt stopped."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from blockprune.errors import UserError
from blockprune.measures.measure import measure
from blockprune.measures.runner import FULL, Plan
from blockprune.measures.score import Score
from blockprune.model import presets
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.model.model import Model
from blockprune.progress import Listener, Silent
from blockprune.runs import AnyRun, open_run
from blockprune.runs.provenance import fingerprint, made_with
from blockprune.stages.plan import pictured, plan_of, terms
from blockprune.stages.scan.request import ScanRequest
from blockprune.stages.scan.scan import Scan, speed_measures
from blockprune.stages.scan.share import Share, say
from blockprune.stages.workers import own_model, started


def scan(
    model: Model, request: ScanRequest, out: Path | None, progress: Listener, begins: Callable[[], None] = lambda: None
) -> AnyRun:
    """Scores what is asked and has no row yet, together with other processes that were given the same `out`; returns the run.

    `out` None keeps it in memory. `begins` is called for a run with no row yet, when nothing asked for has turned out wrong.
    """
    request = request.filled(model.defaults)
    archs = removals(model.graph, request)
    plan = _plan(model, request, progress)
    _check(request, plan, out)
    run = open_run(out, "scan", *_about(model, request, plan, archs), shared=True)
    with run, model.undisturbed():
        if not run.rows():
            begins()
        base = presets.label_of(request.base) if request.base else ""
        share = Share(Scan(model, archs, plan, base), run, progress, request.racing)
        _announce(progress, plan, share.race.wanted, {(row["label"], row["measure"]) for row in run.rows()})
        if request.workers > 1 and out is not None:
            _follow(run, started(request.workers, partial(_share, request, out), progress), progress)
        share.work(request.by_timestep)
    return run


def _plan(model: Model, request: ScanRequest, progress: Listener) -> Plan:
    """What is measured; under --racing, where no measures are named, none that is biased by the number of images."""
    plan = plan_of(model, request, request.measures)
    fair = [name for name in plan.measures if not (request.racing and measure(name).biased)]
    return replace(plan, measures=fair, tick=progress.tick)


def _check(request: ScanRequest, plan: Plan, out: Path | None) -> None:
    """Raises UserError for workers that cannot meet, or that do not know a measure, and for a race by what is not measured."""
    if request.workers > 1 and out is None:
        raise UserError("--workers needs a run directory where they meet: give --out")
    if request.workers > 1 and plan.judges.own:
        raise UserError(f"--workers does not know the measure {plan.judges.own[0].name!r} of this process: leave one of them out")
    if request.racing and request.racing not in plan.measures:
        raise UserError(f"--racing {request.racing} goes by what is measured: add {request.racing} to --measures")


def _follow(run: AnyRun, steps: Iterator[None], progress: Listener) -> None:
    """Tells of the rows that other processes write, and counts what they are of."""
    told, drawn = len(run.rows()), set[str]()
    for _ in itertools.chain(steps, [None]):
        rows = [Score.from_json(row) for row in run.rows()]
        for score in rows[told:]:
            say(progress, score)
            kind = measure(score.measure).kind
            if kind == "denoising":
                progress.tick(score.measure, score.n)
            elif kind == "images" and score.label not in drawn:
                progress.tick(score.label, score.n)
                drawn.add(score.label)
        told = len(rows)


def _share(request: ScanRequest, out: Path, number: int) -> None:
    """A worker process: the same command with one worker."""
    scan(own_model(request, number), replace(request, workers=1), out, Silent())


def removals(graph: BlockGraph, request: ScanRequest) -> dict[str, Architecture]:
    """Label => what is removed: the units one by one, and the architectures that are named."""
    chosen = around(graph, request.base, request.unit) if request.base else _listed(graph, request)
    return {label: arch for name, arch in chosen.items() if arch for label, arch in _fitted(name, arch, request.fit, graph)}


def _listed(graph: BlockGraph, request: ScanRequest) -> dict[str, Architecture]:
    unit = request.unit or ("" if request.arch else "block")
    chosen = graph.units(unit) if unit else {}
    if unit and not chosen:
        raise UserError(f"this U-Net has no removable unit {unit!r}: see `blockprune graph`")
    return presets.named(request.arch, graph, chosen)


def around(graph: BlockGraph, text: str, unit: str | None) -> dict[str, Architecture]:
    """An architecture; it with one more unit removed, "-UNIT"; and with one that it lacks put back, "+UNIT"."""
    base = presets.parse(text, graph)
    units = graph.units(unit or "block") | {name: inner for name, inner in graph.units("stage").items() if name == "innermost"}
    chosen = {presets.label_of(text): base}
    for label, one in units.items():
        with suppress(UserError):  # what does not go together, such as the innermost stage's parts
            if one.removed <= base.removed:
                chosen[f"+{label}"] = graph.check(base - one)
            elif not any(name in base for name in one):
                chosen[f"-{label}"] = graph.check(base | one)
    return chosen


def _fitted(label: str, arch: Architecture, kinds: Sequence[str], graph: BlockGraph) -> Iterator[tuple[str, Architecture]]:
    """The removal with each kind of fit in its place that there can be; "none" keeps what an architecture itself says."""
    for kind in kinds:
        if kind == "none":
            yield label, arch
        elif (fitted := graph.fitted(arch, kind)).fits:
            yield f"{label}~{kind}", fitted


def _about(model: Model, request: ScanRequest, plan: Plan, archs: Mapping[str, Architecture]) -> tuple[Any, Any]:
    """What is compared when a run is opened again, and what a reader of it needs besides."""
    asked = {**request.compared(), **terms(model, plan, request.data), "measures": plan.measures}
    asked |= {"removals": fingerprint([f"{label}:{arch.key}" for label, arch in archs.items()])}
    return asked, {
        "made_with": made_with(model.device),
        "archs": {label: arch.terms for label, arch in {FULL: Architecture(), **archs}.items()},
        "graph": model.graph.to_json(),
        "measures": [measure(name).to_json() for name in plan.measures],
        "pictured_prompts": pictured(plan),
    }


def _announce(progress: Listener, plan: Plan, n_images: Mapping[str, int], done: set[tuple[str, str]]) -> None:
    """Says what is left to do: samples, images, timings. Each removal gets so many images, as far as is known."""
    progress.plan({name: plan.n_noisy * len(n_images) for name in plan.denoising_measures}, "samples")
    images = {FULL: plan.protocol.n_images, **n_images}
    left = {label: n for label, n in images.items() if any((label, m) not in done for m in plan.image_measures)}
    progress.plan(left, "images", "images")
    if "latency" in plan.measures:
        progress.plan({"latency": sum((label, speed_measures(label)[0]) not in done for label in images)}, "timings")
