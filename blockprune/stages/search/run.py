"""How a search runs: what it takes over, one process or many, and what is kept as scores come."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from blockprune.cost import latency
from blockprune.errors import UserError
from blockprune.measures.images import failed, judge
from blockprune.measures.measure import measure
from blockprune.measures.runner import FULL, MeasureRunner
from blockprune.measures.score import Score
from blockprune.model.architecture import Architecture
from blockprune.model.model import Model
from blockprune.model.sampling import NotFinite
from blockprune.progress import Listener, duration
from blockprune.runs import AnyRun, open_run, parts
from blockprune.runs.directory import Stored, differences, read_rows, read_run
from blockprune.runs.provenance import made_with
from blockprune.runs.records import Evaluation
from blockprune.runs.schema import RUNS
from blockprune.stages.plan import pictured, possible
from blockprune.stages.scan.scan import timings
from blockprune.stages.search.halving import SHARE, updates_of
from blockprune.stages.search.problem import Latencies, Problem
from blockprune.stages.search.progress import STEPS, SearchProgress
from blockprune.stages.search.request import SearchRequest
from blockprune.stages.search.trials import Trials
from blockprune.stages.search.worker import Worker, relevant
from blockprune.stages.train.samples import data_of
from blockprune.stages.workers import own_model, started

N_CALIBRATIONS = 12


def search(
    model: Model, request: SearchRequest, out: Path | None, progress: Listener, begins: Callable[[], None] = lambda: None
) -> AnyRun:
    """Searches until `trials` architectures are scored and the best are scored again; `out` None keeps the run in memory.

    `begins` is called for a run with no row yet, when nothing that is asked for has turned out wrong.
    """
    request = replace(request.filled(model.defaults), study_name=request.study_name or (out.name if out else None))
    if request.recover:
        request = replace(request, train_data=data_of(model.name, model.defaults, request.train_data, "--train-data"))
    if request.workers > 1 and out is None:
        raise UserError("--workers needs a run directory where they meet: give --out")
    worker = Worker(model, request, out, recall=lambda name: None)
    worker.problem.check()
    known = _known(worker) if request.from_scan else []
    if request.storage:
        worker.trials()
    run = open_run(out, "search", worker.asked, _about(worker))
    with run, model.undisturbed():
        if not run.rows():
            begins()
        worker.recall = lambda name: parts.recall_arrays(run, name)
        worker.keep = lambda name, arrays: parts.keep_arrays(run, name, arrays)
        worker.tick = progress.tick
        _work(_timed(worker, run, progress) if worker.problem.timed else worker, run, known, progress)
    return run


def _work(worker: Worker, run: AnyRun, known: Sequence[tuple[str, Architecture, Score]], progress: Listener) -> None:
    for part, factor in (("teacher", 1), ("teacher-fresh", worker.request.final_factor)):
        if worker.needs_teacher and worker.recall(part) is None:
            progress.plan({part: factor * worker.plan.protocol.n_images})
    trials = worker.studies()
    for e in evaluated(worker.problem, known):
        trials["search"].add_scored(e.candidate, e.score)
    list(_new_rows(run, trials))
    shown = SearchProgress(progress, worker.request.trials, trials["search"].evaluations(), lambda: trials["search"].cached)
    _announce(worker, run, trials, shown)
    if worker.request.recover:
        progress.say(_recovery_time(worker))
    if worker.request.from_scan and not known:
        fit = worker.request.scored_with
        scored = f"{worker.request.measure}{'' if fit == 'none' else f' with {fit} fits (scan --fit {fit}, or --score-fit none)'}"
        progress.say(f"{worker.request.from_scan} has no {scored}: nothing is taken over")
    for _ in itertools.chain(_steps(worker, progress), [None]):
        for kind, e in _new_rows(run, trials):
            shown.scored(kind, e)
    if (n := len(trials["search"].known())) < worker.request.trials:
        progress.say(f"the search ended with {n} architectures: nothing new was proposed any more")
    _look_at_finalists(worker, run, trials["final"].evaluations(), progress)


def _announce(worker: Worker, run: AnyRun, trials: Mapping[str, Trials], shown: SearchProgress) -> None:
    """Says what the search still has to do, its last stages as well."""
    request, n_finals = worker.request, _n_finals(worker)
    before = {STEPS[kind]: len(trials[kind].evaluations()) for kind in ("search", "random", "final")}
    n, n_recovered = n_finals, 0
    for updates in request.recover:
        n_recovered += max(0, n - len(trials[f"recovered {updates}"].evaluations()))
        n = math.ceil(n * SHARE)
    if any(row["kind"] == "seen" for row in run.rows()) and before["search"] >= request.trials:
        return  # what is left of the end takes moments
    measured = any(measure(m).kind == "images" for m in possible(worker.plan.judges, guided=True))
    n_images = worker.plan.protocol.n_images if measured else worker.plan.n_pictures
    n_captions = (n_finals - len(trials["heard"].evaluations())) * n_images if worker.hearing.measure == "clip_score" else 0
    shown.announce(before, request.random, n_finals, n_recovered, n_captions, n_images)


def _n_finals(worker: Worker) -> int:
    """How many finalists there are at most."""
    return worker.request.finalists * len(worker.problem.spaces) + len(worker.problem.presets) + len(worker.problem.given)


def _recovery_time(worker: Worker) -> str:
    """How long --recover will take at most, from a few updates of the teacher's own architecture."""
    request = worker.request
    n = _n_finals(worker)
    updates = updates_of(n, request.recover)
    seconds = worker.recovery.seconds()
    return f"recovering at most {n} finalists takes {updates} updates, at most {duration(updates * seconds / request.workers)}"


def _about(worker: Worker) -> dict[str, object]:
    return {
        "made_with": made_with(worker.model.device),
        "graph": worker.model.graph.to_json(),
        "outside_params": worker.problem.outside_params,
        "pictured_prompts": pictured(worker.plan),
        "model": worker.request.model,
        "request": worker.request.to_json(),
    }


def _known(worker: Worker) -> list[tuple[str, Architecture, Score]]:
    """The scores of another run that hold under the terms of this search; UserError names the terms that differ."""
    source, objective = Path(worker.request.from_scan or ""), worker.request.measure
    theirs = relevant(read_run(source)["asked"], objective)
    if measure(objective).kind == "images" and read_run(source)["asked"].get("racing"):
        raise UserError(f"{str(source)!r} was raced, so its {objective} is not of all images: scan without --racing")
    if (theirs_fit := _score_fit(source)) and theirs_fit != worker.request.scored_with:
        raise UserError(
            f"the scores in {str(source)!r} are with {theirs_fit} fits: give --score-fit {theirs_fit}, or another --from-scan"
        )
    if changes := list(differences(theirs, relevant(worker.asked, objective))):
        raise UserError(f"the scores in {str(source)!r} are of another protocol ({'; '.join(changes)}): ask the same here")
    graph, kind, fits = worker.model.graph, worker.request.scored_with, set(worker.request.fit)
    scores = list(scores_in(source, objective))
    if kind != "none" and not _score_fit(source):
        scored_so = [known for known in scores if known[1] == graph.fitted(known[1].plain, kind)]
        return [_plainly(label, arch, score) for label, arch, score in scored_so]
    return [known for known in scores if {kind for _, kind in known[1].fits} <= fits]


def _plainly(label: str, arch: Architecture, score: Score) -> tuple[str, Architecture, Score]:
    """What was scored with fits, as the plain architecture that it stands for."""
    name = label.partition("~")[0]
    return name, arch.plain, replace(score, label=name, arch=arch.plain.key)


def _score_fit(source: Path) -> str:
    """What the search in that directory scored with in place of removed blocks; "" for none, and for a scan."""
    return str(read_run(source)["asked"].get("score_fit", ""))


def scores_in(folder: Path, objective: str) -> Iterator[tuple[str, Architecture, Score]]:
    """(label, architecture, score) of everything that a scan or search directory has scored in full by one measure."""
    command = read_run(folder)["command"]
    if command not in ("scan", "search"):
        raise UserError(f"{str(folder)!r} holds a {command} run: scores of architectures are in those of scan and search")
    archs = {label: Architecture(frozenset(names)) for label, names in read_run(folder, RUNS[command]).get("archs", {}).items()}
    for row in read_rows(folder, command):
        if row.get("kind") == "search":
            e = Evaluation.from_json(row)
            if e.score.measure == objective:
                yield e.score.label, e.candidate.arch, e.score
        elif row.get("measure") == objective and row["label"] in archs:
            yield row["label"], archs[row["label"]], Score.from_json(row)


def evaluated(problem: Problem, known: Iterable[tuple[str, Architecture, Score]]) -> list[Evaluation]:
    """Scores of an earlier run as evaluations of this search's candidates."""
    strategy = problem.strategy(problem.request.seed)
    first = {c.arch.key: c for c in [*strategy.alone(), *strategy.known_designs()]}
    return [Evaluation(0, first.get(a.key) or strategy.of(a, "known", label), (score,), 0.0, 0.0) for label, a, score in known]


def _steps(worker: Worker, progress: Listener) -> Iterator[None]:
    """Works, here or in other processes, and comes back again and again."""
    n = worker.request.workers
    if n == 1 or worker.folder is None:
        for _ in worker.work():
            yield
        return
    worker.teacher(worker.plan, "teacher")
    worker.teacher(worker.fresh, "teacher-fresh")
    yield from started(n, partial(_share, worker.request, worker.folder, worker.latencies), progress)


def _share(request: SearchRequest, folder: Path, latencies: Latencies | None, number: int) -> None:
    """One worker's part of a search."""
    model = own_model(request, number)
    worker = Worker(
        model, request, folder, lambda name: parts.recall_arrays(Stored(folder, "search"), name), number=number, latencies=latencies
    )
    for _ in worker.work():
        pass


def _new_rows(run: AnyRun, trials: Mapping[str, Trials]) -> Iterator[tuple[str, Evaluation]]:
    """Writes a row for every evaluation that has none yet, whoever made it; yields the evaluation with its kind."""
    written = {(row["kind"], row["trial"], row.get("updates", 0)) for row in run.rows() if "tiers" in row}
    for name, study in trials.items():
        kind, _, updates = name.partition(" ")
        for e in study.evaluations():
            if (kind, e.trial, int(updates or 0)) not in written:
                run.append({"kind": kind, **replace(e, updates=int(updates or 0)).to_json()})
                yield kind, e


def _timed(worker: Worker, run: AnyRun, progress: Listener) -> Worker:
    """The search with the teacher's latency and what each unit saves of it, measured here unless rows have it already.

    Savings of single units do not add up exactly: they are fitted to a few random sets of units, measured as well.
    """
    problem = worker.problem
    timed = _latencies(worker, run, problem.units, progress)
    full = timed[FULL]["latency"]
    alone = {label: (1 - timed[label]["latency_ratio"]) * full for label in problem.units}
    free, draw = problem.free, np.random.default_rng(worker.request.seed)
    subsets = [[label for label in free.labels if draw.random() < share] for share in np.linspace(0.1, 0.8, N_CALIBRATIONS)]
    sets = {f"calibration {i}": free.repair(subset, alone, minimal=False) or frozenset() for i, subset in enumerate(subsets)}
    measured = _latencies(worker, run, {name: free.arch(choice) for name, choice in sets.items()}, progress)
    saved = [(1 - measured[name]["latency_ratio"]) * full for name in sets]
    rows = [[label in choice for label in free.labels] for choice in sets.values()]
    fitted = latency.fitted_savings(list(alone.values()), rows, saved)
    return replace(worker, latencies=Latencies(full, dict(zip(alone, fitted, strict=True))))


def _latencies(worker: Worker, run: AnyRun, archs: Mapping[str, Architecture], progress: Listener) -> dict[str, dict[str, float]]:
    """label => measure => value of the timings of `archs`, each in turn with the teacher; what has a row is not timed again."""
    rows = [row for row in run.rows() if row["kind"] == "timing"]
    done = {(row["label"], row["measure"]) for row in rows}
    plan, there = replace(worker.plan, measures=["latency"], tick=progress.tick), {label for label, _ in done}
    progress.plan({"latency": sum(label not in there for label in (FULL, *archs))}, "timings")
    for score in timings(worker.model, archs, plan, done):
        rows.append({"kind": "timing", **score.to_json()})
        run.append(rows[-1])
    values: dict[str, dict[str, float]] = {}
    for row in rows:
        values.setdefault(row["label"], {})[row["measure"]] = row["value"]
    return values


def _look_at_finalists(worker: Worker, run: AnyRun, finals: list[Evaluation], progress: Listener) -> None:
    """Latency, images and every measure of images that has its judge, of the teacher and of each finalist, on fresh seeds."""
    archs = {e.candidate.label: e.candidate.arch for e in finals}
    _latencies(worker, run, archs, progress)
    judges, plan = worker.plan.judges, worker.plan
    measures = [m for m in possible(judges, guided=True) if measure(m).kind == "images"]
    protocol = replace(plan.protocol, seed=worker.fresh.protocol.seed)
    if not measures:
        protocol = replace(protocol, n_images=plan.n_pictures)
    runner = MeasureRunner(worker.fitted, replace(plan, protocol=protocol, tick=lambda what, n: progress.tick("images", n)))
    done = {row["label"] for row in run.rows() if row["kind"] == "seen"}
    if done >= {FULL, *archs}:
        return
    teacher, pictures = runner.teacher()
    for label, arch in {FULL: Architecture(), **archs}.items():
        if label in done:
            continue
        try:
            seen, shown = (teacher, pictures) if label == FULL else runner.observe(worker.as_scored(arch), label)
        except NotFinite as err:
            lost = failed(arch.key, label, measures, protocol.n_images, protocol.seed, str(err))
            run.append({"kind": "seen", "label": label, "scores": [score.to_json() for score in lost]})
            continue
        parts.keep_picture(run, arch, shown)
        scores = judge(arch.key, label, measures, seen, teacher, judges, protocol.seed)
        run.append({"kind": "seen", "label": label, "scores": [score.to_json() for score in scores]})
