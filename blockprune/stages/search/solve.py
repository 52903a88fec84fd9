"""Another budget from scores that are there already: the exact solutions, without a forward pass or weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blockprune.cost.components import outside_params
from blockprune.errors import UserError
from blockprune.measures.score import Score
from blockprune.model import pretrained
from blockprune.model.architecture import Architecture
from blockprune.model.defaults import defaults_of
from blockprune.model.graph import BlockGraph
from blockprune.model.identity import identity
from blockprune.model.trace import trace
from blockprune.runs.directory import Run, read_run
from blockprune.runs.provenance import fingerprint
from blockprune.runs.records import Candidate
from blockprune.stages.search.problem import Problem
from blockprune.stages.search.request import SearchRequest
from blockprune.stages.search.run import evaluated, scores_in
from blockprune.stages.search.worker import PROBLEM_TERMS


@dataclass(frozen=True)
class Solutions:
    """The exact solutions, best first, each with the sum that predicts what it loses; units left out for want of a score."""

    request: SearchRequest
    graph: BlockGraph
    candidates: list[tuple[Candidate, float]]
    unscored: list[str]

    def save(self, folder: Path) -> None:
        """Makes the folder a run directory of the solutions; UserError where it holds something else."""
        request = self.request
        asked = {name: getattr(request, name) for name in ("model", "trials", *PROBLEM_TERMS)} | {"objective": request.measure}
        asked |= {"stock_only": True} if request.stock_only else {}
        asked |= {"from_scan": request.from_scan, "scores": fingerprint([repr(self.candidates)])}
        solutions = [self._to_json(candidate, total) for candidate, total in self.candidates]
        with Run(folder, "solve", asked, {}) as run:
            run.write("solutions.json", json.dumps({"format": 1, "asked": asked, "solutions": solutions}, indent=2) + "\n")
            for name, solution in zip(_names(len(solutions)), solutions, strict=True):
                run.write(name, json.dumps({"format": 1, **solution}, indent=2) + "\n")

    def _to_json(self, candidate: Candidate, total: float) -> dict[str, Any]:
        return {
            "architecture": candidate.arch.to_json(),
            "predicted": {self.request.measure: total, "how": "sum of the scores of the units alone, above the teacher's"},
            "cost": self.graph.cost(candidate.arch).to_json(),
            "over_budget": dict(candidate.over),
        }


def _names(n: int) -> list[str]:
    """The files of `n` solutions, best first."""
    return ["best.json", *(f"solution-{i}.json" for i in range(2, n + 1))][:n]


def solve(request: SearchRequest) -> Solutions:
    """The removal sets with the least sum of the scores in the run `request.from_scan` that hold the budgets.

    Without an objective that of an earlier search, of a scan the one that a search would have."""
    if request.from_scan is None:
        raise UserError("--solve-only solves on the scores of an earlier run: give --from-scan, a scan or search directory")
    if request.arch:
        raise UserError(f"--solve-only scores nothing, so it cannot choose from --arch {request.arch[0]}: leave out one of them")
    source = Path(request.from_scan)
    about = read_run(source)
    if not request.objective and (theirs := about["asked"].get("objective")):
        request = replace(request, objective=(theirs,))
    request = request.filled(defaults_of(request.model))
    if request.bounds:
        raise UserError(
            f"--solve-only draws nothing, so it cannot hold {request.bounds[0].text}: give --objective {request.measure} alone"
        )
    configs = pretrained.configs(request.model)
    latent = configs.latent(request.resolution)
    graph = trace(configs.unet, latent, configs.n_tokens)
    if about["asked"].get("teacher") != identity(request.model):
        raise UserError(f"the scores in {str(source)!r} are of another teacher: give the --model that they were made with")
    outside = outside_params(configs)
    problem = Problem(graph, request, outside)
    if problem.timed:
        raise UserError("--solve-only predicts no latency: give a budget in parameters or MACs")
    objective = request.measure
    known = list(scores_in(source, objective))
    known += _summed(problem.units, known) if request.stock_only else []
    scored = {arch.key for _, arch, _ in known}
    unscored = [label for label, unit in problem.units.items() if unit.key not in scored]
    problem.units = {label: unit for label, unit in problem.units.items() if label not in unscored}
    if not problem.units:
        raise UserError(
            f"{str(source)!r} has {objective} of no unit {request.unit!r}: scan them, or give the --unit or the --objective there"
        )
    solutions = problem.strategy(request.seed).solutions(evaluated(problem, known))
    if not solutions:
        raise UserError(
            f"{str(source)!r} has no {objective} of the teacher, above which the others are: scan it, or give --objective"
        )
    return Solutions(request, graph, solutions, unscored)


def _summed(
    units: Mapping[str, Architecture], known: Sequence[tuple[str, Architecture, Score]]
) -> list[tuple[str, Architecture, Score]]:
    """Units of several blocks that were scored each alone, with the sum of what these lose above the teacher."""
    alone = {arch: score for _, arch, score in known}
    teacher = alone.get(Architecture())
    base, summed = (teacher.value or 0.0) if teacher else 0.0, []
    for label, unit in units.items():
        parts = [alone.get(Architecture(frozenset({name}))) for name in unit]
        values = [part.value for part in parts if part is not None and part.value is not None]
        if unit not in alone and parts and len(values) == len(parts) and parts[0]:
            total = base + sum(value - base for value in values)
            summed.append((label, unit, replace(parts[0], arch=unit.key, label=label, value=total, low=None, high=None)))
    return summed
