"""How an evaluation runs: one process's share of the images, scores once all images are seen."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockprune.cli import console, measuring, outputs, timing
from blockprune.cli.job import Job
from blockprune.cost.latency import weight_bytes
from blockprune.measures.images import STATISTICS, failed, judge
from blockprune.model.sampling import NotFinite
from blockprune.runs.directory import Claims, Run
from blockprune.runs.records import Score
from blockprune.stages.evaluate.evaluator import Drawn, Evaluator, in_order
from blockprune.stages.evaluate.protocol import Setting, read_protocol

POLL_S = 0.3


def run(opts: dict[str, Any]) -> None:
    """Draws, looks and scores until nothing is left, together with other processes that were given the same command."""
    rules = read_protocol(opts["protocol"])
    job = Job(opts, rules)
    with Run(job.folder, "evaluate", job.asked, job.note, shared=True) as out:
        err = console.make_console(stderr=True)
        for line in job.warnings:
            err.print(f"warning: {line}", style="yellow", soft_wrap=True)
        with console.WorkProgress(err, {}) as progress:
            share = Share(job, out, progress)
            share.work()
        with out.alone():
            timing.measure_all(job, out, share.unet)
            view = outputs.write_evaluation(out)
        console.print_evaluation(view, console.make_console())
        print(f"evaluate.csv, evaluate.json, rows and images are in {job.folder}")


@dataclass
class Share:
    """One process's share of a run. Images are claimed, drawn and looked at batch by batch; who finds all seen scores, once."""

    job: Job
    out: Run
    progress: console.WorkProgress
    _held: tuple[Any, Any] = (None, None)

    def work(self) -> None:
        """Ends when every setting has its scores, by this process or another."""
        while left := [s for s in self.job.settings if self.missing_measures(s)]:
            if not any(self.step(setting) for setting in left):
                time.sleep(POLL_S)

    def unet(self, setting: Setting) -> Any:
        """The setting's U-Net, which is also put into the pipeline; the last one is kept."""
        key = (setting.quantize, setting.checkpoint)
        own = self.job.own_unet
        if self._held[0] != key:
            self._held = (None, None)
            self._held = (key, own if key == ("", None) else self.job.unet(setting))
        self.job.subject.pipe.unet = self._held[1]
        return self._held[1]

    def step(self, setting: Setting) -> bool:
        """Does what there is to do for a setting now; False when that is nothing."""
        self.seen = SeenParts(self.out.path / "parts" / setting.slug, self.job.n_images)
        with Claims(self.out.path / "parts" / setting.slug / ".claims") as claims:
            batches = iter(lambda: claims.take(self.job.batch_size, self.seen.missing), [])
            first = next(batches, None)
            if first is not None:
                return self._draw(setting, itertools.chain([first], batches))
            if self.seen.missing() or not claims.take(1, lambda: [self.job.n_images] if self.missing_measures(setting) else []):
                return False
            self._score(setting)
            return True

    def _draw(self, setting: Setting, batches: Iterator[list[int]]) -> bool:
        job, rules = self.job, self.job.rules
        folder = self.out.path / "drawn" / setting.slug
        self.unet(setting)
        self.progress.steps.setdefault(setting.label, len(self.seen.missing()))
        evaluator = Evaluator(
            job.subject.pipe, rules, job.prompts, job.subject.latent, job.opts["seed"], job.judges, self.progress.tick
        )

        def name(i: int) -> str:
            return f"{i:06d}{rules.suffix}"

        def recall(i: int) -> bytes | None:
            return (folder / name(i)).read_bytes() if (folder / name(i)).is_file() else None

        try:
            for record in evaluator.look(setting, batches, recall):
                if not isinstance(record, Drawn):
                    outputs.keep_arrays(self.out, f"{setting.slug}/{record.arrays['index'][0]:06d}", record.arrays)
                elif job.opts["save_images"] or record.index < measuring.N_PICTURES:
                    self.out.write(f"drawn/{setting.slug}/{name(record.index)}", record.file)
        except NotFinite as err:
            row = (job.arch(setting).key, job.label)
            with self.out.alone():
                self._keep(setting, failed(*row, self.missing_measures(setting), job.n_images, job.opts["seed"], str(err)))
            self.progress.say(f"{setting.label} failed: {err}", "red")
        return True

    def _score(self, setting: Setting) -> None:
        job, seed = self.job, self.job.opts["seed"]
        row = (job.arch(setting).key, job.label)
        missing = self.missing_measures(setting)
        if "weight_bytes" in missing:
            self._keep(setting, [Score(*row, "weight_bytes", weight_bytes(self.unet(setting)), 0, seed)])
        n = len(job.note["pictured_prompts"])
        files = [self.out.path / "drawn" / setting.slug / f"{i:06d}{job.rules.suffix}" for i in range(n)]
        self.out.write(f"images/{setting.slug}.png", outputs.strip_of_files(files))
        seen = in_order(outputs.read_arrays(path) for path in self.seen.paths())
        self._keep(setting, judge(*row, [m for m in missing if m in STATISTICS], seen, None, job.judges, seed))

    def _keep(self, setting: Setting, scores: Any) -> None:
        for score in scores:
            self.out.append({"kind": "score", "setting": setting.label, **score.to_json()})

    def missing_measures(self, setting: Setting) -> list[str]:
        rows = self.out.rows()
        have = {row["measure"] for row in rows if row["kind"] == "score" and row["setting"] == setting.label}
        failed = any(row["kind"] == "score" and row["setting"] == setting.label and row["error"] for row in rows)
        return [] if failed else [m for m in ("weight_bytes", *self.job.measures) if m not in have]


class SeenParts:
    """Which images of a setting have been looked at, by the files that say so; each file is read once."""

    def __init__(self, folder: Path, n_images: int) -> None:
        self.folder, self.n_images, self.left = folder, n_images, set(range(n_images))
        self.known: set[Path] = set()

    def paths(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("*.safetensors") if not p.name.startswith("."))

    def missing(self) -> set[int]:
        for path in self.paths():
            if path not in self.known:
                self.left -= set(outputs.read_index(path, self.n_images))
                self.known.add(path)
        return self.left
