"""One search in one process: what it scores with, which candidates it considers, and where it keeps the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers import UNet2DConditionModel
from optuna.storages import BaseStorage

from blockprune.cost import latency
from blockprune.cost.components import outside_params, unet_inputs
from blockprune.export.stock_config import Stock, expressible
from blockprune.measures.images import Judges
from blockprune.measures.measure import measure
from blockprune.measures.runner import FULL, Arrays, MeasureRunner, Objective, Plan
from blockprune.measures.score import Score
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.model.model import Model
from blockprune.model.pretrained import configs_of
from blockprune.model.sampling import NotFinite
from blockprune.runs.parts import check_kept, strip_png
from blockprune.runs.records import BoundCheck, Candidate, Evaluation, deaf
from blockprune.stages import loading
from blockprune.stages.plan import plan_of, terms
from blockprune.stages.search.bounds import Bound, Bounded
from blockprune.stages.search.halving import survivors
from blockprune.stages.search.hearing import Hearing
from blockprune.stages.search.problem import Latencies, Problem
from blockprune.stages.search.request import SearchRequest
from blockprune.stages.search.search import Chance, Listed, Tiers, finalists, search
from blockprune.stages.search.storage import open_storage
from blockprune.stages.search.trials import Trials
from blockprune.stages.train.recover import Recovery

FRESH = 1_000_003  # finals use seeds from here on, so that what won by luck does not win again
PICTURE_TERMS = ("prompts", "n_images", "steps", "cfg_scale", "scheduler")
JUDGE_TERMS = ("detector", "clip", "reference", "n_reference")
COMMON_TERMS = ("teacher", "latent", "dtype", "device", "seed")
PROBLEM_TERMS = ("unit", "keep", "budget", "scope", "macs", "pareto")
RECOVERY_TERMS = ("recover_batch_size", "train_data")
KINDS = ("search", "random", "final")
OWN_SAMPLES = "the teacher's own samples"


def relevant(asked: dict[str, Any], objective: str) -> dict[str, Any]:
    """Those of a run's terms that change the numbers of one measure."""
    names = [*COMMON_TERMS]
    if measure(objective).kind == "images":
        names += [*PICTURE_TERMS, *JUDGE_TERMS]
    else:
        names += ["eps_samples", "data", *(PICTURE_TERMS if asked.get("data") == OWN_SAMPLES else ())]
        names += ["cfg_scale"] if "guidance" in measure(objective).needs else []
    return {name: asked.get(name) for name in names}


def as_scored(arch: Architecture, graph: BlockGraph, kind: str) -> Architecture:
    """`arch` with fits of that kind in place of its blocks, but where it says itself what stands in."""
    return arch if arch.fits or kind == "none" else graph.fitted(arch, kind)


def tier_sizes(n: int, request: SearchRequest) -> list[int]:
    """On how many of `n` samples an architecture is scored, one after the other while it may still be among the best."""
    shares = (1,) if request.pareto else (0.25, 1)
    return sorted({max(1, round(share * n)) for share in shares})


@dataclass(frozen=True)
class AsFitted:
    """An objective by which an architecture has fits of that kind ("none" for no change) in place of its blocks, but where it says
    itself what stands in."""

    objective: Objective
    graph: BlockGraph
    kind: str

    def __call__(self, arch: Architecture, label: str, n: int | None = None) -> Score:
        return replace(self.objective(as_scored(arch, self.graph, self.kind), label, n), arch=arch.key)

    def of(self, student: UNet2DConditionModel, arch: Architecture, label: str) -> Score:
        """The score of a U-Net of its own, as it is."""
        return self.objective.of(student, arch, label)


@dataclass
class Recovered:
    """The scores of a finalist so far (`before`, by key), and that after `updates` updates; data, order and noise are the same for
    all finalists."""

    recovery: Recovery
    updates: int
    objective: AsFitted
    bounds: Sequence[tuple[Bound, AsFitted]]
    before: Mapping[str, tuple[Score, ...]]
    _student: UNet2DConditionModel | None = None

    def __call__(self, candidate: Candidate, evaluations: Sequence[Evaluation]) -> tuple[Score, ...]:
        arch, label, self._student = candidate.arch, candidate.label, None
        try:
            self._student = self.recovery.student(arch, self.updates)
            now = self.objective.of(self._student, arch, label)
        except FloatingPointError as err:
            now = replace(self.objective(arch, label, 1), value=None, low=None, high=None, error=str(err))
        return (*self.before.get(arch.key, ()), now)

    def bounded(self, candidate: Candidate, tiers: Sequence[Score]) -> list[BoundCheck]:
        """What must hold besides, of the student that was scored last."""
        student = self._student
        if student is None:
            return []
        return Bounded([(bound, partial(score.of, student)) for bound, score in self.bounds])(candidate, tiers)


@dataclass
class Worker:
    """A search on a loaded model. Several processes may hold the same one; they meet in its trials.

    `request` is filled with the model's defaults. `keep` stores what the teacher drew, which `recall` gives back; only the process
    that owns the run stores it. `folder` is that of the run; None for one in memory. `number` tells workers apart. `tick` hears of
    the images that are drawn of the teacher, and for captions.
    """

    model: Model
    request: SearchRequest
    folder: Path | None
    recall: Callable[[str], Arrays | None]
    keep: Callable[[str, Arrays], None] = lambda name, arrays: None
    number: int = 0
    latencies: Latencies | None = None
    tick: Callable[[str, int], None] = lambda step, n: None

    @cached_property
    def plan(self) -> Plan:
        return replace(self._whole_plan, measures=[self.request.measure])

    @cached_property
    def _whole_plan(self) -> Plan:
        """The plan with what must hold beside what is made best."""
        measures = [self.request.measure, *(bound.measure for bound in self.request.bounds)]
        return plan_of(self.model, self.request, list(dict.fromkeys(measures)))

    @cached_property
    def asked(self) -> dict[str, Any]:
        """What must be the same for two searches to share scores and candidates."""
        request = self.request.to_json()
        measured = self._relevant(self.request.measure) | {"objective": self.request.measure}
        for bound in self.request.bounds:
            measured |= self._relevant(bound.measure) | {"bounds": [b.text for b in self.request.bounds]}
        others = {"fit": request["fit"], "score_fit": self.request.scored_with, "stock_only": request["stock_only"]}
        others = {name: value for name, value in others.items() if value not in ([], "none", False)}
        return measured | {name: request[name] for name in PROBLEM_TERMS} | others

    def _relevant(self, measure: str) -> dict[str, Any]:
        return relevant(self.request.to_json() | terms(self.model, self.plan, self.request.data), measure)

    @cached_property
    def problem(self) -> Problem:
        return Problem(self.model.graph, self.request, outside_params(configs_of(self.model.pipe)), self.latencies)

    def trials(self, kind: str = "search", updates: int = 0) -> Trials:
        """The study of the "search", of "random" sets for comparison, of its "final", or of finalists that have "recovered"
        in so many updates."""
        asked, measured = dict(self.asked), self.request.measure
        asked |= {"final_factor": self.request.final_factor} if kind in ("final", "recovered") else {}
        if kind == "recovered":
            asked |= {name: getattr(self.request, name) for name in RECOVERY_TERMS} | {"updates": updates}
        if kind == "heard":
            measured = self.hearing.measure
            asked |= self._relevant(measured)
        parts = (self.request.study_name or "search", kind if kind != "search" else "", str(updates or ""))
        name = "-".join(filter(None, parts))
        artifacts = self.folder / "artifacts" if self.folder else None
        return Trials(self.storage, name, measured, asked, artifacts=artifacts)

    def studies(self) -> dict[str, Trials]:
        """Every study of this search by its kind; those of the recovery as "recovered 50"."""
        kinds = [*KINDS, *(["heard"] if self.hearing.measure else [])]
        recovered = {f"recovered {n}": self.trials("recovered", n) for n in self.request.recover}
        return {kind: self.trials(kind) for kind in kinds} | recovered

    @cached_property
    def storage(self) -> BaseStorage:
        return open_storage(self.request.storage, self.folder / "study.journal" if self.folder else None)

    def tiers(self) -> Tiers:
        return Tiers(self.objective(self.plan, "teacher"), tier_sizes(self.n, self.request))

    @property
    def n(self) -> int:
        return self.plan.n_noisy if self.plan.denoising_measures else self.plan.protocol.n_images

    @cached_property
    def fresh(self) -> Plan:
        """The plan of the finals: other seeds, and more samples."""
        factor, seed = self.request.final_factor, self.plan.protocol.seed + FRESH
        n_images = self.plan.protocol.n_images * (factor if self.needs_teacher else 1)
        protocol = replace(self.plan.protocol, seed=seed, n_images=n_images)
        n_noisy = self.plan.n_noisy * factor
        clean = self.plan.clean and loading.clean_latents(self.model, self.request.data, n_noisy, self.plan.batch_size)
        return replace(self.plan, protocol=protocol, n_noisy=n_noisy, clean=clean)

    @property
    def needs_teacher(self) -> bool:
        return bool(self._whole_plan.image_measures) or self.plan.clean is None

    def objective(self, plan: Plan, part: str, measure: str | None = None) -> AsFitted:
        """The score by a measure, the one that is made best unless another is named."""
        measure = measure or self.request.measure
        objective = Objective(MeasureRunner(self.fitted, replace(plan, measures=[measure])), measure, self.teacher(plan, part))
        return AsFitted(objective, self.model.graph, self.request.scored_with)

    def bounds(self, plan: Plan, part: str) -> list[tuple[Bound, AsFitted]]:
        """What must hold besides, each with its score under a plan."""
        return [(bound, self.objective(plan, part, bound.measure)) for bound in self.request.bounds]

    def as_scored(self, arch: Architecture) -> Architecture:
        """What is run and drawn with when an architecture is scored."""
        return as_scored(arch, self.model.graph, self.request.scored_with)

    @cached_property
    def fitted(self) -> Model:
        """The model, which fits what its students need."""
        return replace(self.model, fits=MeasureRunner(self.model, self.plan).fitter(self.teacher(self.plan, "teacher")))

    def teacher(self, plan: Plan, part: str) -> Arrays:
        """What the teacher drew under a plan, kept in the run; empty when nothing asks for it."""
        if not self.needs_teacher:
            return {}
        if (drawn := self.recall(part)) is None:
            plan = replace(plan, tick=lambda what, n: self.tick(part, n))
            drawn, _ = MeasureRunner(self.model, plan).teacher()
            self.keep(part, drawn)
        return check_kept(f"parts/{part}.safetensors", drawn, plan.observed, plan.protocol.n_images)

    def work(self) -> Iterator[tuple[str, Evaluation]]:
        """Scores until the search and its finals are done; yields what this process scored, with the kind of its trials."""
        seed, request = self.request.seed + 1000 * self.number, self.request
        main, strategy, tiers = self.trials(), self.problem.strategy(seed), self.tiers()
        bounded = Bounded(self.bounds(self.plan, "teacher"), len(tiers.sizes))
        for e in search(main, strategy, tiers, request.trials, bounded):
            main.count_cached(strategy.cached)
            yield "search", e
        for e in search(self.trials("random"), Chance(strategy, seed), tiers, request.random, bounded):
            yield "random", e
        finals, objective = self.trials("final"), self.objective(self.fresh, "teacher-fresh")
        bounds = self.bounds(self.fresh, "teacher-fresh")
        chosen = self.problem.timed and finals.known()  # another timing might choose others
        listed = [] if chosen else finalists(main.evaluations(), self.problem.spaces, request.finalists, self.sound)
        for e in search(finals, Listed(listed), lambda c, _: (objective(c.arch, c.label),), None, Bounded(bounds), self.picture):
            yield "final", e
        yield from (("recovered", e) for e in self._recover(finals.evaluations(), objective, bounds))

    def _recover(
        self, finals: Sequence[Evaluation], objective: AsFitted, bounds: Sequence[tuple[Bound, AsFitted]]
    ) -> Iterator[Evaluation]:
        """Distils every finalist for a few updates, the best third of them for more, and so on; yields each with all its scores."""
        going, before = [e.candidate for e in finals], dict[str, tuple[Score, ...]]()
        with TemporaryDirectory(prefix="blockprune-") as scratch:
            recovery = replace(self.recovery, folder=self.folder / "recovery" if self.folder else Path(scratch))
            for updates in self.request.recover:
                score = Recovered(recovery, updates, objective, bounds, before)
                trials = self.trials("recovered", updates)
                yield from search(trials, Listed(going), score, bounded=score.bounded)
                going = survivors(trials.evaluations())
                recovery.keep([c.arch for c in going])
                before |= {e.candidate.arch.key: e.tiers for e in trials.evaluations()}

    @property
    def recovery(self) -> Recovery:
        request = self.request
        return Recovery(self.model, request.train_data, request.recover_batch_size, request.seed, fits=self.fitted.fits)

    def sound(self, candidate: Candidate) -> bool:
        """True for a candidate that stock diffusers loads, where that is asked, keeps a latency budget and hears the prompt."""
        return self.loads(candidate) and self.fast_enough(candidate) and self.hears(candidate)

    def loads(self, candidate: Candidate) -> bool:
        """False where only what stock diffusers loads is asked for, and this it does not load."""
        if not self.request.stock_only:
            return True
        return isinstance(expressible(self.model.network.config, candidate.arch), Stock)

    @cached_property
    def hearing(self) -> Hearing:
        plan = replace(self.plan, tick=lambda what, n: self.tick("captions", n))
        return Hearing(self.fitted, plan, self.teacher(self.plan, "teacher"))

    def hears(self, candidate: Candidate) -> bool:
        """False for one that follows captions worse than every design by hand, unless it is allowed; all are scored for it."""
        if not self.hearing.measure:
            return True
        trials, designs = self.trials("heard"), self.problem.strategy(self.request.seed).known_designs()
        for _ in search(trials, Listed([*designs, candidate]), self.hearing):
            pass
        lost = {e.candidate.arch.key for e in deaf(trials.evaluations())}
        return candidate.arch.key not in lost or "prompt-deaf" in self.request.allow

    def fast_enough(self, candidate: Candidate) -> bool:
        """True when a candidate's step, measured in turn with the teacher's, keeps a latency budget with 1 % to spare."""
        limits = [b.limit for b in self.problem.space.budgets if b.quantity == "latency"]
        if not limits or self.latencies is None:
            return True
        network, model = self.model.network, self.model
        inputs = unet_inputs(network.config, model.latent, model.graph.n_tokens, 1, model.device, model.dtype)
        archs = {FULL: Architecture(), "student": candidate.arch}
        networks = {name: partial(self.fitted.removed, arch) for name, arch in archs.items()}
        timings = latency.measure(networks, inputs, self.plan.n_timings, 2, model.device, memory=())
        return self.latencies.full_s * latency.ratio(timings[FULL], timings["student"])[0] <= 0.99 * min(limits)

    def picture(self, candidate: Candidate) -> bytes | None:
        """The first images of a finalist, side by side; None when it draws none."""
        protocol = replace(self.plan.protocol, seed=self.fresh.protocol.seed, n_images=self.plan.n_pictures)
        runner = MeasureRunner(self.fitted, replace(self.plan, protocol=protocol, judges=Judges()))
        try:
            return strip_png(runner.observe(self.as_scored(candidate.arch), candidate.label)[1])
        except NotFinite:
            return None
