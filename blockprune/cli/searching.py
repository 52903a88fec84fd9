"""How a search runs: what it takes over, one process or many, what it keeps as scores come, and what it writes in the end."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blockprune.cli import console, outputs
from blockprune.cli.edge import make_printable, one_line_errors
from blockprune.cli.hunt import Hunt, hunt, relevant
from blockprune.cli.measuring import possible
from blockprune.cli.problem import Problem
from blockprune.cost import latency
from blockprune.errors import UserError
from blockprune.measures.examiner import FULL, Examiner
from blockprune.measures.images import STATISTICS, failed, judge
from blockprune.model import pretrained
from blockprune.model.architecture import Architecture, BlockGraph
from blockprune.model.sampling import NotFinite
from blockprune.model.trace import trace
from blockprune.runs.directory import Run, differences, read_rows, read_run
from blockprune.runs.records import Candidate, Evaluation, Score
from blockprune.runs.schema import RUNS
from blockprune.stages import inputs
from blockprune.stages.scan.scan import Scan
from blockprune.stages.search.trials import Ledger

KINDS = ("search", "random", "final", "recovered")
POLL_S = 0.5
N_CALIBRATIONS = 12


def run(opts: Mapping[str, Any], folder: Path) -> None:
    """Runs or resumes a search, and writes and prints what was found."""
    ready = hunt(opts, folder)
    if not ready.problem.timed:
        ready.problem.space.check()
    known = _known(ready) if ready.opts["from_scan"] else []
    if ready.opts["storage"]:
        ready.ledger()
    with _open(ready) as out:
        ready.keep = lambda name, arrays: outputs.keep_arrays(out, name, arrays)
        if ready.problem.timed:
            ready = _timed(ready, out)
        ledgers = {kind: ready.ledger(kind) for kind in KINDS if kind != "recovered" or ready.opts["recover"]}
        for e in _evaluated(ready.problem, known):
            ledgers["search"].add_scored(e.candidate, e.score)
        err = console.make_console(stderr=True)
        with console.SearchProgress(err, ready.opts["trials"], lambda: ledgers["search"].cached) as progress:
            if ready.opts["from_scan"] and not known:
                progress.say(f"{ready.opts['from_scan']} has no {ready.opts['objective']}: nothing is taken over")
            for _ in _steps(ready, progress):
                _keep(out, ledgers, progress)
            _keep(out, ledgers, progress)
            if (n := len(ledgers["search"].known())) < ready.opts["trials"]:
                progress.say(f"the search ended with {n} architectures: nothing new was proposed any more")
        _look_at_finalists(ready, out, ledgers["final"].evaluations())
        view = outputs.write_search(out)
        console.print_finalists(view, console.make_console())
        answer = "pareto.json" if view.is_front else "best.json"
        print(f"{answer}, finalists.csv, report.md and figures are in {folder}")


def _open(ready: Hunt) -> Run:
    graph, plan = ready.bench.graph, ready.plan
    note = {
        "made_with": inputs.made_with(ready.bench.pipe.device),
        "graph": graph.to_json(),
        "outside_params": ready.problem.outside_params,
        "pictured_prompts": [plan.prompts[i % len(plan.prompts)] for i in range(plan.n_pictures)],
        "model": ready.opts["model"],
    }
    return Run(ready.folder, "search", ready.asked, note)


def _known(ready: Hunt) -> list[tuple[str, Architecture, Score]]:
    """The scores of another run that hold under the terms of this search; UserError names the terms that differ."""
    source, objective = Path(ready.opts["from_scan"]), ready.opts["objective"]
    held = relevant(read_run(source)["asked"], objective)
    if changes := list(differences(held, relevant(ready.asked, objective))):
        raise UserError(f"the scores in {str(source)!r} are of another protocol ({'; '.join(changes)}): ask the same here")
    return list(scores_in(source, objective))


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


def _steps(ready: Hunt, progress: console.SearchProgress) -> Iterator[None]:
    """Works, here or in other processes, and comes back again and again."""
    n = ready.opts["workers"]
    if n == 1:
        for _ in ready.work():
            yield
        return
    ready.teacher(ready.plan, "teacher")
    ready.teacher(ready.fresh, "teacher-fresh")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(ready.opts, ready.folder, i, n), daemon=True) for i in range(n)]
    for process in processes:
        process.start()
    try:
        yield from _wait(processes, progress)
    finally:
        for process in processes:
            process.terminate()


def _wait(processes: Sequence[BaseProcess], progress: console.SearchProgress) -> Iterator[None]:
    mourned: set[int | None] = set()
    while any(process.is_alive() for process in processes):
        for i, process in enumerate(processes):
            if process.exitcode and process.pid not in mourned:
                mourned.add(process.pid)
                progress.say(f"worker {i + 1} died (exit code {process.exitcode}); others take over its architecture", "red")
        yield
        time.sleep(POLL_S)
    if all(process.exitcode for process in processes):
        raise UserError("all workers died: see their messages above; the same command goes on from here")


def _work(opts: Mapping[str, Any], folder: Path, i: int, n: int) -> None:
    """One worker: its share of the processor's threads, or the GPU of its number."""
    torch.set_num_threads(max(1, torch.get_num_threads() // n))
    device = opts["device"]
    if device in (None, "cuda") and (n_gpus := torch.cuda.device_count()):
        device = f"cuda:{i % n_gpus}"
    make_printable()
    with one_line_errors():
        for _ in hunt({**opts, "device": device, "worker": i}, folder).work():
            pass


def _keep(out: Run, ledgers: Mapping[str, Ledger], progress: console.SearchProgress) -> None:
    """Writes a row for every evaluation that has none yet, whoever made it."""
    written = {(row["kind"], row["trial"]) for row in out.rows() if row["kind"] in KINDS}
    for kind, ledger in ledgers.items():
        for e in ledger.evaluations():
            if (kind, e.trial) not in written:
                out.append({"kind": kind, **e.to_json()})
                progress.tell(kind, e)


def _timed(ready: Hunt, out: Run) -> Hunt:
    """The search with the teacher's latency and what each unit saves of it, measured here unless rows have it already.

    Savings of single units do not add up exactly: they are fitted to a few random sets of units, measured as well.
    """
    problem = ready.problem
    timings = _latencies(ready, out, problem.units)
    full = timings[FULL]["latency"]
    alone = {label: (1 - timings[label]["latency_ratio"]) * full for label in problem.units}
    free, draw = problem.free, np.random.default_rng(ready.opts["seed"])
    subsets = [[label for label in free.labels if draw.random() < share] for share in np.linspace(0.1, 0.8, N_CALIBRATIONS)]
    sets = {f"calibration {i}": free.repair(subset, alone, minimal=False) or frozenset() for i, subset in enumerate(subsets)}
    measured = _latencies(ready, out, {name: free.arch(choice) for name, choice in sets.items()})
    saved = [(1 - measured[name]["latency_ratio"]) * full for name in sets]
    rows = [[label in choice for label in free.labels] for choice in sets.values()]
    fitted = latency.fitted_savings(list(alone.values()), rows, saved)
    return replace(ready, opts={**ready.opts, "latency_s": full, "saved_s": dict(zip(alone, fitted, strict=True))})


def _latencies(ready: Hunt, out: Run, archs: Mapping[str, Architecture]) -> dict[str, dict[str, float]]:
    """label => measure => value of the timings of `archs`, each in turn with the teacher; what has a row is not timed again."""
    rows = [row for row in out.rows() if row["kind"] == "timing"]
    done = {(row["label"], row["measure"]) for row in rows}
    plan = replace(ready.plan, measures=["latency"])
    for record in Scan(ready.bench.pipe, ready.bench.graph, archs, plan, done):
        assert isinstance(record, Score)
        rows.append({"kind": "timing", **record.to_json()})
        out.append(rows[-1])
    timings: dict[str, dict[str, float]] = {}
    for row in rows:
        timings.setdefault(row["label"], {})[row["measure"]] = row["value"]
    return timings


def _look_at_finalists(ready: Hunt, out: Run, finals: list[Evaluation]) -> None:
    """Latency, images and every measure of images that has its judge, of the teacher and of each finalist, on fresh seeds."""
    archs = {e.candidate.label: e.candidate.arch for e in finals}
    _latencies(ready, out, archs)
    judges = ready.plan.judges
    measures = [m for m in possible(judges) if m in STATISTICS]
    protocol = replace(ready.plan.protocol, seed=ready.fresh.protocol.seed)
    if not measures:
        protocol = replace(protocol, n_images=ready.plan.n_pictures)
    examiner = Examiner(ready.bench.pipe, ready.bench.graph, replace(ready.plan, protocol=protocol))
    done = {row["label"] for row in out.rows() if row["kind"] == "seen"}
    if done >= {FULL, *archs}:
        return
    teacher, pictures = examiner.teacher()
    for label, arch in {FULL: Architecture(), **archs}.items():
        if label in done:
            continue
        try:
            seen, shown = (teacher, pictures) if label == FULL else examiner.observe(arch, label)
        except NotFinite as err:
            lost = failed(arch.key, label, measures, protocol.n_images, protocol.seed, str(err))
            out.append({"kind": "seen", "label": label, "scores": [score.to_json() for score in lost]})
            continue
        outputs.keep_picture(out, arch, shown)
        scores = judge(arch.key, label, measures, seen, teacher, judges, protocol.seed)
        out.append({"kind": "seen", "label": label, "scores": [score.to_json() for score in scores]})


def solve_only(opts: Mapping[str, Any]) -> None:
    """Prints the exact solutions of the budgets on the scores of --from-scan, without a forward pass or weights.

    Where there is an --out, it becomes a run directory with solutions.json and each solution for `--arch`.
    """
    if not opts["from_scan"]:
        raise UserError("--solve-only solves on the scores of an earlier run: give --from-scan, a scan or search directory")
    source, objective = Path(opts["from_scan"]), opts["objective"]
    config = pretrained.configs(opts["model"])
    graph = trace(config.unet, config.latent(opts["resolution"]), config.n_tokens)
    said = read_run(source)
    if said["asked"].get("teacher") != pretrained.identity(opts["model"]):
        raise UserError(f"the scores in {str(source)!r} are of another teacher: give the --model that they were made with")
    problem = Problem(graph, opts)
    if problem.timed:
        raise UserError("--solve-only predicts no latency: give a budget in parameters or MACs")
    scores = list(scores_in(source, objective))
    scored = {arch.key for _, arch, _ in scores}
    unscored = [label for label, unit in problem.units.items() if unit.key not in scored]
    problem.units = {label: unit for label, unit in problem.units.items() if label not in unscored}
    if not problem.units:
        raise UserError(
            f"{str(source)!r} has {objective} of no unit {opts['unit']!r}: scan them, or give the --unit or the --objective there"
        )
    solutions = problem.strategy(opts["seed"]).solutions(_evaluated(problem, scores))
    if not solutions:
        raise UserError(
            f"{str(source)!r} has no {objective} of the teacher, above which the others are: scan it, or give --objective"
        )
    if opts["out"]:
        _keep_solutions(opts, source, graph, solutions)
    if unscored:
        print(f"left out, for want of {objective} in {source}: {', '.join(unscored)}")
    console.print_solutions(solutions, objective, graph.total, console.make_console())
    if opts["out"]:
        print(f"solutions.json and an architecture for each, solution-1.json and so on, are in {opts['out']}")


def _keep_solutions(opts: Mapping[str, Any], source: Path, graph: BlockGraph, solutions: Sequence[tuple[Candidate, float]]) -> None:
    """A run directory of the solutions; UserError where --out holds something else."""
    same = ("model", "objective", "unit", "keep", "budget", "scope", "macs", "pareto", "trials")
    asked = {name: opts[name] for name in same} | {"from_scan": str(source), "scores": inputs.fingerprint([repr(solutions)])}
    data = [
        {
            "architecture": candidate.arch.to_json(),
            "predicted": {opts["objective"]: total, "how": "sum of the scores of the units alone, above the teacher's"},
            "cost": graph.cost(candidate.arch).to_json(),
            "over_budget": dict(candidate.over),
        }
        for candidate, total in solutions
    ]
    with Run(Path(opts["out"]), "solve", asked, {}) as out:
        out.write("solutions.json", json.dumps({"format": 1, "asked": asked, "solutions": data}, indent=2) + "\n")
        for i, solution in enumerate(data, 1):
            out.write(f"solution-{i}.json", json.dumps({"format": 1, **solution}, indent=2) + "\n")


def _evaluated(problem: Problem, known: Iterable[tuple[str, Architecture, Score]]) -> list[Evaluation]:
    """Scores of an earlier run as evaluations of this search's candidates."""
    strategy = problem.strategy(problem.opts["seed"])
    first = {c.arch.key: c for c in [*strategy.alone(), *strategy.known_designs()]}
    return [Evaluation(0, first.get(a.key) or strategy.of(a, "known", label), (score,), 0.0, 0.0) for label, a, score in known]
