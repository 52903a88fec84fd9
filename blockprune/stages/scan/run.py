"""How a scan runs: what it scores, what is kept as scores come, and where an earlier attempt stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
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
from blockprune.progress import Listener
from blockprune.runs import AnyRun, open_run, parts
from blockprune.runs.provenance import fingerprint, made_with
from blockprune.stages.plan import pictured, plan_of, terms
from blockprune.stages.scan.request import ScanRequest
from blockprune.stages.scan.scan import Part, Picture, Scan, speed_measures


def scan(model: Model, request: ScanRequest, out: Path | None, progress: Listener) -> AnyRun:
    """Scores what is asked and has no row yet, and returns the run with its rows; `out` None keeps it in memory."""
    request = request.filled(model.defaults)
    archs = removals(model.graph, request)
    plan = plan_of(model, request, request.measures)
    run = open_run(out, "scan", *_about(model, request, plan, archs))
    with run, model.undisturbed():
        _work(run, model, request, archs, plan, progress)
    return run


def removals(graph: BlockGraph, request: ScanRequest) -> dict[str, Architecture]:
    """Label => what is removed: the units one by one, and the architectures that are named."""
    chosen = around(graph, request.base, request.unit) if request.base else _listed(graph, request)
    return {label: arch for name, arch in chosen.items() if arch for label, arch in _fitted(name, arch, request.fit, graph)}


def _listed(graph: BlockGraph, request: ScanRequest) -> dict[str, Architecture]:
    unit = request.unit or ("" if request.arch else "block")
    chosen = graph.units(unit) if unit else {}
    if unit and not chosen:
        raise UserError(f"this U-Net has no removable unit {unit!r}: see `blockprune graph`")
    for text in request.arch:
        label = label_of(text)
        if (known := chosen.get(label)) is not None and known != presets.parse(text, graph):
            raise UserError(f"two architectures are called {label!r}: rename one file")
        chosen[label] = presets.parse(text, graph)
    return chosen


def label_of(text: str) -> str:
    """What a scan calls an architecture that was given as this text."""
    return Path(text).stem if text.endswith(".json") else text


def around(graph: BlockGraph, text: str, unit: str | None) -> dict[str, Architecture]:
    """An architecture; it with one more unit removed, "-UNIT"; and with one that it lacks put back, "+UNIT"."""
    base = presets.parse(text, graph)
    units = graph.units(unit or "block") | {name: inner for name, inner in graph.units("stage").items() if name == "innermost"}
    chosen = {label_of(text): base}
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


def _work(
    run: AnyRun, model: Model, request: ScanRequest, archs: Mapping[str, Architecture], plan: Plan, progress: Listener
) -> None:
    done = {(row["label"], row["measure"]) for row in run.rows()}
    _announce(progress, plan, archs, done)
    recall, base = (lambda name: parts.recall_arrays(run, name)), label_of(request.base) if request.base else ""
    for record in Scan(model, archs, replace(plan, tick=progress.tick), done, recall, base, request.by_timestep):
        if isinstance(record, Part):
            parts.keep_arrays(run, record.name, record.arrays)
        elif isinstance(record, Picture):
            parts.keep_picture(run, archs.get(record.label, Architecture()), record.images)
        else:
            run.append(record.to_json())
            _say(progress, record)


def _announce(progress: Listener, plan: Plan, archs: Mapping[str, Architecture], done: set[tuple[str, str]]) -> None:
    """Says what is left to do: samples of denoising errors, timings, images."""
    progress.plan({name: plan.n_noisy * len(archs) for name in plan.denoising_measures}, "samples")
    if "latency" in plan.measures:
        n_timings = sum((label, speed_measures(label)[0]) not in done for label in (FULL, *archs))
        progress.plan({"latency": n_timings}, "timings")
    left = [label for label in (FULL, *archs) if any((label, m) not in done for m in plan.image_measures)]
    progress.plan(dict.fromkeys(left, plan.protocol.n_images), "images", "images")


def _say(progress: Listener, score: Score) -> None:
    """One line for each row that took work to get."""
    if score.error:
        progress.say(f"{score.label}: {score.measure} failed: {score.error}", "red")
    elif score.measure in ("eps_mse", "fid"):
        spread = f" ({score.low:.4g} to {score.high:.4g})" if score.low is not None and score.high is not None else ""
        progress.say(f"{score.label}: {score.measure} {score.value:.4g}{spread}")
