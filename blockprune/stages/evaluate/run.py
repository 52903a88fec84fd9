"""How an evaluation runs: one process's share of the images, scores once all images are seen."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from blockprune.cost.latency import weight_bytes
from blockprune.export.runtimes.network import in_runtime
from blockprune.measures.images import failed, judge
from blockprune.measures.measure import names
from blockprune.measures.score import Score
from blockprune.model.model import Model
from blockprune.model.sampling import NotFinite, teacher_fails
from blockprune.progress import Listener
from blockprune.runs import AnyClaims, AnyRun, open_run, parts
from blockprune.runs.parts import slug_of
from blockprune.runs.series import Series, keep_seen
from blockprune.stages.evaluate import timing
from blockprune.stages.evaluate.evaluator import Drawn, Evaluator
from blockprune.stages.evaluate.plan import EvaluationPlan, plan_of
from blockprune.stages.evaluate.protocol import Setting
from blockprune.stages.evaluate.request import EvaluateRequest
from blockprune.stages.evaluate.teacher import Teacher
from blockprune.stages.evaluate.work import counted
from blockprune.stages.outline import outlined, say_how_long
from blockprune.stages.plan import N_PICTURES

POLL_S = 0.3


def evaluate(request: EvaluateRequest, out: Path | None, progress: Listener, pipe: DiffusionPipeline | None = None) -> AnyRun:
    """Draws, looks and scores until nothing is left, together with other processes that were given the same `out`.

    `pipe` is the model where the request only names it. `out` None keeps the run in memory.
    """
    plan = plan_of(request, pipe)
    run = open_run(out, "evaluate", plan.asked, plan.about, shared=True)
    with (
        run,
        TemporaryDirectory(prefix="blockprune-") as scratch,
        plan.model.undisturbed(),
    ):
        for line in plan.warnings:
            progress.say(f"warning: {line}", "yellow")
        if not run.rows():
            work = counted(plan.request, outlined(plan.model), {setting: plan.masked(setting) for setting in plan.settings})
            say_how_long(work, plan.model, progress)
        share = Share(plan, run, progress, out or Path(scratch))
        share.announce()
        if plan.teacher is not None and plan.teacher.run is None:
            share.draw_teacher(plan.teacher)
        with plan.model.removed(plan.subject.masked):
            share.work()
            with run.alone():
                for row in timing.rows(plan, run.rows(), share.network, partial(progress.tick, "latency", 1)):
                    run.append(row)
    return run


@dataclass
class Share:
    """One process's share of a run. Images are claimed, drawn and looked at batch by batch; who finds all seen scores,
    once. Networks written for another runtime go to `folder`."""

    plan: EvaluationPlan
    run: AnyRun
    progress: Listener
    folder: Path
    _network: tuple[tuple[str, int | None] | None, UNet2DConditionModel | None] = (None, None)
    _computed: dict[Setting, torch.nn.Module] = field(default_factory=dict)
    _series: dict[str, Series] = field(default_factory=dict)

    def announce(self) -> None:
        """Says what is still to be drawn, scored and timed, by this process or another."""
        drawn_here = self.plan.teacher is not None and self.plan.teacher.run is None
        labels = [parts.paired_label(s.of_teacher.label) for s in self.plan.settings if drawn_here]
        left = {label: len(self.series(label).missing()) for label in [*labels, *(s.label for s in self.plan.settings)]}
        self.progress.plan(left, "images", "images")
        self.progress.plan({"scores": sum(bool(self.missing_measures(s)) for s in self.plan.settings)}, "settings")
        if n := timing.n_timings(self.plan, self.run.rows()):
            self.progress.plan({"latency": n}, "timings")

    def draw_teacher(self, teacher: Teacher) -> None:
        """Ends when the images of the teacher that a student's are paired with are all seen, by this process or another."""
        settings = {setting.of_teacher: self.series(parts.paired_label(setting.of_teacher.label)) for setting in self.plan.settings}
        model = teacher.load() if any(series.missing() for series in settings.values()) else None
        while left := [(setting, series) for setting, series in settings.items() if series.missing()]:
            assert model is not None, "images do not go missing"
            if not any(self._draw_of_teacher(model, setting, series) for setting, series in left):
                time.sleep(POLL_S)

    def _draw_of_teacher(self, teacher: Model, setting: Setting, series: Series) -> bool:
        with self.run.claims(series.claims) as claims:
            try:
                return self._draw(teacher, lambda: teacher.network, setting, series, claims)
            except NotFinite as err:
                raise teacher_fails(err) from None

    def work(self) -> None:
        """Ends when every setting has its scores, by this process or another."""
        while left := [s for s in self.plan.settings if self.missing_measures(s)]:
            if not any(self.step(setting) for setting in left):
                time.sleep(POLL_S)

    def network(self, setting: Setting) -> UNet2DConditionModel:
        """The setting's network; the last one that was made is kept."""
        key = (setting.quantize, setting.checkpoint)
        if self._network[0] != key:
            self._network = (None, None)  # lets go of the last before the next is made
            self._network = (key, self.plan.network(setting))
        return self._network[1]

    def computed(self, setting: Setting) -> torch.nn.Module:
        """The setting's network as the runtime that was asked for computes it."""
        runtime, graph, network = self.plan.request.runtime, self.plan.model.graph, self.network(setting)
        if runtime != "torch" and setting not in self._computed:
            folder = self.folder / "runtime" / f"{runtime}-{setting.checkpoint or ''}".strip("-")
            self._computed = {setting: in_runtime(network, runtime, self.plan.model.latent, graph.n_tokens, folder)}
        return self._computed.get(setting, network)

    def series(self, label: str) -> Series:
        """The images of this run under a label."""
        return self._series.setdefault(label, Series(self.run, label, self.plan.n_images, self.plan.rules.suffix))

    def step(self, setting: Setting) -> bool:
        """Does what there is to do for a setting now; False when that is nothing."""
        series = self.series(setting.label)
        with self.run.claims(series.claims) as claims:
            try:
                if self._draw(self.plan.model, partial(self.computed, setting), setting, series, claims):
                    return True
            except NotFinite as err:
                self._fail(setting, str(err))
                self.progress.tick("scores", 1)
                return True
            if series.missing() or not claims.take(1, lambda: [series.n] if self.missing_measures(setting) else []):
                return False
            self._score(setting, series)
            self.progress.tick("scores", 1)
            return True

    def _draw(
        self, model: Model, network: Callable[[], torch.nn.Module], setting: Setting, series: Series, claims: AnyClaims
    ) -> bool:
        """Draws what is missing of a series and nobody else is at; False when that is nothing. Raises NotFinite."""
        plan = self.plan
        batches = iter(lambda: claims.take(plan.batch_size, series.missing), [])
        first = next(batches, None)
        if first is None:
            return False
        tick = partial(self.progress.tick, series.label)
        evaluator = Evaluator(model, plan.rules, plan.prompts, plan.request.seed, plan.judges, plan.inputs, tick)
        with model.running(network()):
            for record in evaluator.look(setting, itertools.chain([first], batches), series.file):
                if not isinstance(record, Drawn):
                    keep_seen(self.run, series, record.arrays)
                elif plan.request.save_images or record.index < N_PICTURES:
                    self.run.write(series.path(record.index), record.file)
        return True

    def _fail(self, setting: Setting, why: str) -> None:
        row = (self.plan.arch(setting).key, self.plan.request.title)
        with self.run.alone():
            self._keep(setting, failed(*row, self.missing_measures(setting), self.plan.n_images, self.plan.request.seed, why))
        self.progress.say(f"{setting.label} failed: {why}", "red")

    def _score(self, setting: Setting, series: Series) -> None:
        plan, seed = self.plan, self.plan.request.seed
        row = (plan.arch(setting).key, plan.request.title)
        missing = self.missing_measures(setting)
        if "weight_bytes" in missing:
            self._keep(setting, [Score(*row, "weight_bytes", weight_bytes(self.network(setting)), 0, seed)])
        teacher = None if plan.teacher is None else self._of_teacher(plan.teacher, setting)
        self.run.write(f"images/{series.slug}.png", series.strip(N_PICTURES))
        if teacher is not None:
            self.run.write(f"images/{slug_of(parts.paired_label(setting.label))}.png", teacher.strip(N_PICTURES))
        if plan.inputs is not None:
            self.run.write(f"images/{slug_of(parts.INPUTS)}.png", parts.strip_png(plan.inputs.first(N_PICTURES)))
        of_images = [name for name in missing if name in names("images")]
        self._keep(setting, judge(*row, of_images, series.seen(), None if teacher is None else teacher.seen(), plan.judges, seed))

    def _of_teacher(self, teacher: Teacher, setting: Setting) -> Series:
        """The teacher's images at a setting, in the run that has drawn them."""
        if teacher.run is None:
            return self.series(parts.paired_label(setting.of_teacher.label))
        return Series(teacher.run, setting.of_teacher.label, self.plan.n_images, self.plan.rules.suffix)

    def _keep(self, setting: Setting, scores: Iterable[Score]) -> None:
        for score in scores:
            self.run.append({"kind": "score", "setting": setting.label, **score.to_json()})

    def missing_measures(self, setting: Setting) -> list[str]:
        rows = [row for row in self.run.rows() if row["kind"] == "score" and row["setting"] == setting.label]
        have = {row["measure"] for row in rows}
        return (
            [] if any(row["error"] for row in rows) else [m for m in ("weight_bytes", *self.plan.request.measures) if m not in have]
        )
