"""Students of tiny-digits at the sizes of the three BK-SDM designs: designs, winners of ways to search, random sets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from exhaustive_pairs import space as space_of

from blockprune.measures.denoising import Denoiser
from blockprune.measures.images import judge
from blockprune.measures.runner import MeasureRunner, Plan
from blockprune.measures.score import Score
from blockprune.model import presets, surgery
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.model.model import Model
from blockprune.runs.records import Candidate
from blockprune.stages.search.problem import touches, units_of
from blockprune.stages.search.search import Strategy, search
from blockprune.stages.search.space import Space
from blockprune.stages.search.storage import open_storage
from blockprune.stages.search.trials import Trials

# design => its own parameters, whole pipeline, and its own MACs of a U-Net step, on this model
SIZES = {
    "bk-sdm-base": ("1.7756M", "36.671MMACs"),
    "bk-sdm-small": ("1.5194M", "35.538MMACs"),
    "bk-sdm-tiny": ("1.108M", "33.5302MMACs"),
}
# where the scan shows that captions are heard: without them the CLIP score falls, while the denoising error hardly rises
HEARS = Architecture(frozenset({"mid_block.attentions.0", "down_blocks.2.attentions.0"}))
UNIFORM, INFORMED, SPREAD = 2, 5, 1.0  # random sets at each size; how far scores of single removals are spread for `informed`
N_SAMPLES, N_EVALUATIONS = 128, 110
BY_IMAGES = "search by feature_distance, linear"
GROWN = "by images, winners of this size and of the smaller one with blocks put back"
Scorer = Callable[[Architecture], float]


@dataclass(frozen=True)
class Student:
    """A candidate: the design whose size it has, how it was found, and what it lacks."""

    name: str
    size: str
    source: str
    removed: tuple[str, ...]

    @property
    def arch(self) -> Architecture:
        return Architecture(frozenset(self.removed))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Remembering:
    """A score of architectures, each computed once."""

    def __init__(self, score: Scorer) -> None:
        self.score, self.known = score, dict[str, float]()

    def __call__(self, arch: Architecture) -> float:
        if arch.key not in self.known:
            self.known[arch.key] = self.score(arch)
        return self.known[arch.key]


def scorers(model: Model, plan: Plan) -> dict[str, Remembering]:
    """Errors on `N_SAMPLES` samples of held-out scenes, of plain students and of those with linear fits."""
    runner = MeasureRunner(model, plan)
    fitter = runner.fitter({})
    of: dict[str, Remembering] = {}
    for name in ("eps_mse", "guided_mse"):
        denoiser = Denoiser(model.network, model.graph, runner.noisy({}, name), 64, fits=fitter)
        for fit in ("none", "linear"):

            def score(arch: Architecture, denoiser: Denoiser = denoiser, fit: str = fit) -> float:
                return float(denoiser.errors(arch if arch.fits else model.graph.fitted(arch, fit)).mean())

            of[f"{name}, {fit}"] = Remembering(score)
    return of


def by_images(model: Model, plan: Plan) -> Remembering:
    """The distance to the teacher's images from the same captions and noise, of students with linear fits."""
    runner = MeasureRunner(model, plan)
    teacher, _ = runner.observe(Architecture(), "teacher")
    fitter = runner.fitter(teacher)

    def score(arch: Architecture) -> float:
        fitted = model.graph.fitted(arch, "linear")
        with surgery.removed(model.network, fitted, fitter(fitted)) as network, model.running(network):
            student, _ = runner.observe(Architecture(), "student")
        (distance,) = judge("", "student", ["feature_distance"], student, teacher, plan.judges, 0)
        return distance.loss

    return Remembering(score)


def units(graph: BlockGraph) -> dict[str, Architecture]:
    return graph.units("block") | {"innermost": graph.units("stage")["innermost"]}


def hearing(graph: BlockGraph) -> dict[str, Architecture]:
    """The units without those that captions are heard by."""
    return {label: unit for label, unit in units(graph).items() if not touches(unit, HEARS)}


def fittable(graph: BlockGraph) -> dict[str, Architecture]:
    """The units, and each with a linear map in its place."""
    return units_of(graph, "block", Architecture(), ("linear",))


def found(of: Space, score: Scorer, n: int = N_EVALUATIONS) -> Architecture:
    """The best within the budgets of a search by `score`."""
    trials = Trials(open_storage(None, None), "candidates", "eps_mse", {})

    def scored(candidate: Candidate, _: Any) -> tuple[Score, ...]:
        return (Score(candidate.arch.key, candidate.label, "eps_mse", score(candidate.arch), N_SAMPLES, 0),)

    done = search(trials, Strategy(of, [of], presets.fitting(of.graph)), scored, n)
    return min((e for e in done if e.candidate.fits), key=lambda e: e.loss).candidate.arch


def random_sets(of: Space, losses: Mapping[str, float], seed: int) -> Iterator[tuple[str, Architecture]]:
    """(source, architecture): nothing can be put back into any of them."""
    for source, n in (("uniform", UNIFORM), ("informed", INFORMED)):
        draw, made = np.random.default_rng(seed if source == "uniform" else [seed, 1]), set[Architecture]()
        while len(made) < n:
            flat = {label: float(x) for label, x in zip(of.labels, draw.permutation(len(of.labels)) + 1.0, strict=True)}
            spread = {label: loss * math.exp(SPREAD * draw.standard_normal()) for label, loss in losses.items()}
            scores = flat if source == "uniform" else spread
            chosen = of.drawn(sorted(scores, key=scores.__getitem__)) if source == "uniform" else frozenset()
            choice = None if chosen is None else of.repair(chosen, scores)
            if choice is not None and of.arch(choice) not in made:
                made.add(of.arch(choice))
                yield source, of.arch(choice)


def chance(score: Scorer) -> Iterator[Student]:
    """The designs, and random sets; `score` of single removals guides the informed ones."""
    for i, (design, budgets) in enumerate(SIZES.items()):
        of = space_of(*budgets, units=units)
        yield Student(design, design, "design", tuple(presets.parse(design, of.graph).terms))
        losses = {label: score(unit) for label, unit in of.units.items()}
        for k, (source, arch) in enumerate(random_sets(of, losses, i)):
            yield Student(f"{design.rpartition('-')[2]}-{source}-{k}", design, source, tuple(arch.terms))


def winners(by: Mapping[str, Scorer]) -> Iterator[Student]:
    """At each size: the least sum of single errors, exactly, and the winners of searches."""
    for design, budgets in SIZES.items():
        size, of, heard = design.rpartition("-")[2], space_of(*budgets, units=units), space_of(*budgets, units=hearing)
        sums = {label: by["eps_mse, none"](unit) for label, unit in of.units.items()}
        yield Student(f"{size}-sum", design, "least sum of eps_mse", tuple(of.arch(next(of.best(sums, 1))).terms))
        for name, score in by.items():
            yield Student(f"{size}-{name}", design, f"search by {name}", tuple(found(of, score).terms))
        arch = found(heard, by["guided_mse, none"])
        yield Student(f"{size}-heard", design, "search by guided_mse, none, the two attentions kept", tuple(arch.terms))


def alike(score: Scorer) -> Iterator[Student]:
    """At each size: the winner of a search by the distance to the teacher's images."""
    for design, budgets in SIZES.items():
        arch = found(space_of(*budgets, units=units), score)
        name = f"{design.rpartition('-')[2]}-feature_distance, linear"
        yield Student(name, design, BY_IMAGES, tuple(arch.terms))


def grown(score: Scorer, closer: Scorer, by_size: Mapping[str, Architecture]) -> Iterator[Student]:
    """At each size the best, by `closer`, of: the winner by images, that of the next smaller size, and that one with what fits of
    its blocks put back."""
    for (design, budgets), smaller in zip(SIZES.items(), [*list(SIZES)[1:], None], strict=True):
        contenders = [by_size[design]]
        if smaller:
            lacks = by_size[smaller]
            inside = partial(units_within, lacks=lacks)
            contenders += [lacks, found(space_of(*budgets, units=inside), score)]
        name = f"{design.rpartition('-')[2]}-grown"
        yield Student(name, design, GROWN, tuple(min(contenders, key=closer).terms))


def units_within(graph: BlockGraph, lacks: Architecture) -> dict[str, Architecture]:
    return {label: unit for label, unit in units(graph).items() if unit.removed <= lacks.removed}


def fitted(by: Mapping[str, Scorer]) -> Iterator[Student]:
    """At each size: the designs with linear maps in place of their blocks, which adds to them; and the winner of a search in which
    each block stays, goes, or goes with a linear map in its place."""
    for design, budgets in SIZES.items():
        of = space_of(*budgets, units=fittable)
        arch = found(of, by["guided_mse, none"], N_EVALUATIONS + len(of.labels) // 2)
        yield Student(f"{design.rpartition('-')[2]}-mixed", design, "search by guided_mse, with linear maps", tuple(arch.terms))
        with_maps = of.graph.fitted(presets.parse(design, of.graph), "linear")
        yield Student(f"{design}, linear", design, "design with linear maps", tuple(with_maps.terms))
