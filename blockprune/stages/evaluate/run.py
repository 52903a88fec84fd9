"""How an evaluation runs: one process's share of the images, scores once all images are seen."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from blockprune.cost.latency import weight_bytes
from blockprune.errors import UserError
from blockprune.export.runtimes.network import in_runtime
from blockprune.measures.images import failed, judge
from blockprune.measures.measure import names
from blockprune.measures.score import Score
from blockprune.model.sampling import NotFinite
from blockprune.progress import Listener
from blockprune.runs import AnyRun, open_run, parts
from blockprune.runs.directory import MAKE_AGAIN
from blockprune.stages.evaluate import timing
from blockprune.stages.evaluate.evaluator import Arrays, Drawn, Evaluator, in_order
from blockprune.stages.evaluate.plan import EvaluationPlan, plan_of
from blockprune.stages.evaluate.protocol import Setting
from blockprune.stages.evaluate.request import EvaluateRequest
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
        plan.model.removed(plan.subject.masked),
    ):
        for line in plan.warnings:
            progress.say(f"warning: {line}", "yellow")
        share = Share(plan, run, progress, out or Path(scratch))
        share.work()
        with run.alone():
            for row in timing.rows(plan, run.rows(), share.network):
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
    _seen: dict[Setting, SeenParts] = field(default_factory=dict)
    _announced: set[str] = field(default_factory=set)

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

    def step(self, setting: Setting) -> bool:
        """Does what there is to do for a setting now; False when that is nothing."""
        n_images, folder = self.plan.n_images, f"parts/{setting.slug}"
        seen = self._seen.setdefault(setting, SeenParts(self.run, setting.slug, n_images))
        with self.run.claims(f"{folder}/.claims") as claims:
            batches = iter(lambda: claims.take(self.plan.batch_size, seen.missing), [])
            first = next(batches, None)
            if first is not None:
                self._draw(setting, len(seen.missing()), itertools.chain([first], batches))
                return True
            if seen.missing() or not claims.take(1, lambda: [n_images] if self.missing_measures(setting) else []):
                return False
            self._score(setting, in_order(seen.arrays()))
            return True

    def _draw(self, setting: Setting, n_missing: int, batches: Iterator[list[int]]) -> None:
        plan, seed = self.plan, self.plan.request.seed
        folder = f"drawn/{setting.slug}"
        if setting.label not in self._announced:
            self._announced.add(setting.label)
            self.progress.plan({setting.label: n_missing})
        evaluator = Evaluator(plan.model, plan.rules, plan.prompts, seed, plan.judges, self.progress.tick)
        try:
            with plan.model.running(self.computed(setting)):
                for record in evaluator.look(setting, batches, lambda i: self.run.read(f"{folder}/{self._file(i)}")):
                    if not isinstance(record, Drawn):
                        parts.keep_arrays(self.run, f"{setting.slug}/{record.arrays['index'][0]:06d}", record.arrays)
                    elif plan.request.save_images or record.index < N_PICTURES:
                        self.run.write(f"{folder}/{self._file(record.index)}", record.file)
        except NotFinite as err:
            row = (plan.arch(setting).key, plan.request.title)
            with self.run.alone():
                self._keep(setting, failed(*row, self.missing_measures(setting), plan.n_images, seed, str(err)))
            self.progress.say(f"{setting.label} failed: {err}", "red")

    def _file(self, index: int) -> str:
        return f"{index:06d}{self.plan.rules.suffix}"

    def _score(self, setting: Setting, seen: Arrays) -> None:
        plan, seed = self.plan, self.plan.request.seed
        row = (plan.arch(setting).key, plan.request.title)
        missing = self.missing_measures(setting)
        if "weight_bytes" in missing:
            self._keep(setting, [Score(*row, "weight_bytes", weight_bytes(self.network(setting)), 0, seed)])
        files = (self.run.read(f"drawn/{setting.slug}/{self._file(i)}") for i in range(min(N_PICTURES, plan.n_images)))
        self.run.write(f"images/{setting.slug}.png", parts.strip_of_files([file for file in files if file]))
        of_images = [name for name in missing if name in names("images")]
        self._keep(setting, judge(*row, of_images, seen, None, plan.judges, seed))

    def _keep(self, setting: Setting, scores: Iterable[Score]) -> None:
        for score in scores:
            self.run.append({"kind": "score", "setting": setting.label, **score.to_json()})

    def missing_measures(self, setting: Setting) -> list[str]:
        rows = [row for row in self.run.rows() if row["kind"] == "score" and row["setting"] == setting.label]
        have = {row["measure"] for row in rows}
        return (
            [] if any(row["error"] for row in rows) else [m for m in ("weight_bytes", *self.plan.request.measures) if m not in have]
        )


class SeenParts:
    """Which images of a setting have been looked at, by the parts of the run that say so; each is read once."""

    def __init__(self, run: AnyRun, slug: str, n_images: int) -> None:
        self.run, self.slug, self.n_images, self.left = run, slug, n_images, set(range(n_images))
        self.known: set[str] = set()

    def _arrays(self, file: str) -> Arrays | None:
        return parts.recall_arrays(self.run, f"{self.slug}/{file.removesuffix('.safetensors')}")

    def missing(self) -> set[int]:
        for file in self.run.names(f"parts/{self.slug}"):
            if file not in self.known and (arrays := self._arrays(file)):
                self.left -= self._numbers(file, arrays)
                self.known.add(file)
        return self.left

    def _numbers(self, file: str, arrays: Arrays) -> set[int]:
        """Which images a part is about; UserError where it does not say."""
        index = arrays.get("index")
        if index is None or index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
            why = "it does not say which images it is about"
        elif not ((index >= 0) & (index < self.n_images)).all():
            why = f"its index is not of images 0 to {self.n_images - 1}"
        else:
            return set(index.tolist())
        raise UserError(f"the part parts/{self.slug}/{file} is damaged ({why}): {MAKE_AGAIN}")

    def arrays(self) -> Iterator[Arrays]:
        """What was seen, part by part."""
        return (arrays for file in self.run.names(f"parts/{self.slug}") if (arrays := self._arrays(file)))
