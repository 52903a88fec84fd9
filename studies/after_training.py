"""Which score of an untrained student says what it will be worth after training?

    python studies/after_training.py --out runs/after --reports reports/after-training     # about two hours on two CPU cores

Candidates are students of tiny-digits at the sizes of the three BK-SDM designs, within their parameters and their MACs: the
designs themselves, the winners of each way of searching, sets drawn at random, and random sets that go by the scores of
single removals (`studies/candidates.py`); the designs with linear maps alone are 2 to 3 % above. Each is scored untrained in
many ways, distilled for the same updates (a third of them with two seeds of data order and noise), and then drawn with at
four guidance scales. The truth is what the trained student draws: digits that an independent reader reads in their captioned
places, CLIP score, FID at its best scale, and the denoising error on held-out scenes. Every row is a file in `--reports`, so
a killed run goes on; checkpoints in `--out` let a longer training go on from a shorter one: `--updates 600 2000 --only
bk-sdm-base base-mixed` trains these further, with three seeds.
`--part` does some of it, `--dry-run` prints the plan. `after_training_table.py` makes the table.
Expected: scores of students with fits rank better than those of plain ones, and a short training better than both. Measured: the
first holds for the digits read; the second only of the same reader's digits after 100 updates; no score ranks FID
(`reports/after-training/table.md`).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from candidates import BY_IMAGES, Student, alike, by_images, chance, fitted, grown, scorers, winners
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from quality_tiny_digits import cells, real_scenes, train_reader

from blockprune.data.digits import EMPTY
from blockprune.measures.denoising import Denoiser
from blockprune.measures.images import judge
from blockprune.measures.intervals import interval, mean_statistic
from blockprune.measures.runner import MeasureRunner, Plan
from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.model.model import load_model
from blockprune.runs.atomic import writing
from blockprune.stages.fields import Measuring
from blockprune.stages.plan import plan_of
from blockprune.stages.train.recover import Recovery

UPDATES = (50, 200, 600)
BATCH_SIZE = 16
CFG_SCALES = (1.5, 2.0, 3.0, 4.5)
CFG_SCALE = 3.0  # the model's own; there more images are drawn
N_READ, N_IMAGES, STEPS = 512, 256, 6
N_NOISY, SEED, CAPTIONS_SEED = 256, 50_000, 17
N_UNTRAINED = 128
N_LOOKED_AT = 64  # images of a candidate in the search by what it draws
TWICE = 3  # a third of the candidates, designs and winners first, is trained with a second seed
LISTS = ("chance", "winners", "fitted", "alike", "grown")
PARTS = (*LISTS, "teacher", "rows")
Row = dict[str, Any]


class Judge:
    """Scores students of the built-in model, all on the same held-out captions, seeds and noise."""

    def __init__(self) -> None:
        self.model = load_model("tiny-digits")
        asked = Measuring(n_images=N_READ, steps=STEPS, cfg_scale=CFG_SCALE, seed=SEED, eps_samples=N_NOISY, batch_size=64)
        plan = plan_of(self.model, asked.filled(self.model.defaults), ["eps_mse", "guided_mse", "fid", "clip_score"])
        real, captions, self.digits = real_scenes(CAPTIONS_SEED, N_READ)
        clean = self.model.encode_images(torch.from_numpy(real[:N_NOISY]).permute(0, 3, 1, 2)).float()
        self.plan: Plan = replace(plan, prompts=captions, clean=(clean, captions[:N_NOISY]), n_pictures=N_READ)
        self.runner, self.reader = MeasureRunner(self.model, self.plan), train_reader(4000)
        self.fitter = self.runner.fitter({})
        network, graph = self.model.network, self.model.graph
        self.errors = {
            name: Denoiser(network, graph, self.runner.noisy({}, name), 64, fits=self.fitter) for name in ("eps_mse", "guided_mse")
        }

    def untrained(self, arch: Architecture) -> Row:
        """Errors with nothing, a scale and shift, and a linear map fitted in place of each block; and what it draws."""
        row: Row = {}
        for fit in ("none", "channel", "linear"):
            fitted = self.model.graph.fitted(arch, fit)
            row |= {f"{name}, {fit}": float(of.errors(fitted).mean()) for name, of in self.errors.items()}
            if fit != "channel":
                with self._removed(fitted) as student:
                    drawn = self.drawn(student, CFG_SCALE, N_UNTRAINED)
                row |= {f"{name}, {fit}": drawn[name] for name in ("fid", "clip_score", "digits_read")}
        return row

    def _removed(self, arch: Architecture) -> AbstractContextManager[UNet2DConditionModel]:
        return surgery.removed(self.model.network, arch, self.fitter(arch))

    def denoised(self, student: UNet2DConditionModel) -> Row:
        return {name: float(of.errors_of(student).mean()) for name, of in self.errors.items()}

    def drawn(self, student: UNet2DConditionModel, cfg_scale: float, n: int) -> Row:
        """What the judges and the reader say of `n` images at a guidance scale, with 95 % intervals."""
        protocol = replace(self.plan.protocol, n_images=n, cfg_scale=cfg_scale)
        runner = MeasureRunner(self.model, replace(self.plan, protocol=protocol, measures=["fid", "clip_score"]))
        runner._conditions = self.runner.conditions
        with self.model.running(student):
            seen, images = runner.observe(Architecture(), "student")
        row: Row = {"cfg_scale": cfg_scale, "n": n}
        for score in judge("", "student", ["fid", "clip_score"], seen, None, self.plan.judges, 0):
            row |= {score.measure: score.value, f"{score.measure}_interval": [score.low, score.high]}
        few = {name: values[:N_IMAGES] for name, values in seen.items()}  # FID falls with n, so it is compared at one n
        (fid,) = judge("", "student", ["fid"], few, None, self.plan.judges, 0)
        row |= {f"fid_{N_IMAGES}": fid.value, f"fid_{N_IMAGES}_interval": [fid.low, fid.high]} if n >= N_IMAGES else {}
        read = self._read(images)
        return row | {"digits_read": float(read.mean()), "digits_read_interval": interval(mean_statistic(read), n, 0)}

    def _read(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """(n,) the share of an image's captioned digits that is read in its place."""
        digits = self.digits[: len(images)]
        right, there = self.reader.predict(cells(images)).reshape(-1, 4) == digits, digits != EMPTY
        return np.asarray((right & there).sum(1) / there.sum(1), dtype=np.float64)


@dataclass(frozen=True)
class Job:
    """A candidate, and the seed that it is trained with; `updates` ends with the last of its checkpoints."""

    student: Student
    seed: int
    updates: tuple[int, ...]
    runs: Path
    rows: Path
    scales: tuple[float, ...] = CFG_SCALES

    @property
    def stem(self) -> str:
        return f"{re.sub('[^a-z0-9_]+', '-', self.student.name)}-{self.seed}"

    @property
    def row(self) -> Path:
        return self.rows / f"{self.stem}-{self.updates[-1]}.json"

    @property
    def known(self) -> Row:
        """What is measured of it already."""
        row: Row = json.loads(self.row.read_text(encoding="utf-8")) if self.row.exists() else {}
        return row

    @property
    def scales_left(self) -> list[float]:
        """The guidance scales that it was not drawn with yet."""
        drawn = {d["cfg_scale"] for d in self.known.get("truth", ())}
        return [scale for scale in self.scales if scale not in drawn]


@lru_cache(maxsize=1)
def the_judge() -> Judge:
    torch.set_num_threads(1)
    return Judge()


@lru_cache(maxsize=1)
def recovery(seed: int, runs: Path) -> Recovery:
    """One for each seed, so that all candidates are taught the same."""
    of = the_judge()
    return Recovery(of.model, None, BATCH_SIZE, seed, runs / f"seed-{seed}", of.fitter)


def run(job: Job) -> str:
    """Writes the row of a job; what it is called and how long it took."""
    begun, of = time.perf_counter(), the_judge()
    cost = of.model.graph.cost(job.student.arch)
    row: Row = {**job.student.to_json(), "seed": job.seed, "params": cost.params, "macs_thop": cost.thop}
    row |= job.known
    scales_left = job.scales_left
    if job.seed == 0 and "untrained" not in row:
        row["untrained"] = of.untrained(job.student.arch)
    school = recovery(job.seed, job.runs)
    row.setdefault("training", [])
    for updates in job.updates[len(row["training"]) :] or job.updates[-1:]:
        student = school.student(job.student.arch, updates)
        if len(row["training"]) < len(job.updates):
            row["training"].append({"updates": updates, **of.denoised(student)})
    drawn = [of.drawn(student, s, N_READ if s == CFG_SCALE else N_IMAGES) for s in scales_left]
    row["truth"] = sorted([*row.get("truth", ()), *drawn], key=lambda d: d["cfg_scale"])
    row["seconds"] = row.get("seconds", 0) + round(time.perf_counter() - begun)
    with writing(job.row) as path:
        path.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
    of_last = " ".join(f"{name} {row['truth'][-1][name]:.3g}" for name in ("cfg_scale", "digits_read", "fid"))
    return f"{job.row.stem}: {row['seconds']} s, {of_last}"


def students(reports: Path) -> list[Student]:
    """Everything that is listed, each architecture once: designs and winners first."""
    unique: dict[tuple[str, ...], Student] = {}
    for name in ("fitted", "winners", "alike", "grown", "chance"):
        path = reports / f"{name}.json"
        for row in json.loads(path.read_text(encoding="utf-8")) if path.exists() else []:
            student = Student(**{**row, "removed": tuple(row["removed"])})
            unique.setdefault(student.removed, student)
    return sorted(unique.values(), key=lambda s: (s.source != "design", s.source in ("informed", "uniform")))


def jobs(args: argparse.Namespace) -> list[Job]:
    """Every candidate with the first seed, then a third with the second; or those that are named, with the seeds given."""
    listed, rows = students(args.reports), args.reports / "rows"
    chosen = [(s, 0) for s in listed] + [(s, 1) for s in listed[: len(listed) // TWICE]]
    if args.only:
        chosen = [(s, seed) for seed in args.seeds for s in listed if s.name in args.only]
    updates, scales = tuple(args.updates), tuple(args.cfg_scales)
    made = [Job(student, seed, updates, args.out, rows, scales) for student, seed in chosen]
    return [job for job in made if job.scales_left]


def listing(part: str, reports: Path) -> None:
    """Writes the candidates of a kind."""
    model = the_judge().model
    asked = Measuring(eps_samples=128, n_images=N_LOOKED_AT, steps=STEPS, batch_size=64).filled(model.defaults)
    if part in ("alike", "grown"):
        score, closer = (
            by_images(model, plan_of(model, replace(asked, n_images=n), ["feature_distance"])) for n in (N_LOOKED_AT, N_IMAGES)
        )
        by_size = {s.size: s.arch for s in students(reports) if s.source == BY_IMAGES}
        found = alike(score) if part == "alike" else grown(score, closer, by_size)
    else:
        by = scorers(model, plan_of(model, asked, []))
        made = {"chance": partial(chance, by["guided_mse, none"]), "winners": partial(winners, by), "fitted": partial(fitted, by)}
        found = made[part]()
    with writing(reports / f"{part}.json") as path:
        path.write_text(json.dumps([s.to_json() for s in found], indent=1) + "\n", encoding="utf-8")


def teacher(reports: Path) -> None:
    """Writes what the full model draws, as the students are judged."""
    of, cost = the_judge(), the_judge().model.graph.total
    truth = [of.drawn(of.model.network, s, N_READ if s == CFG_SCALE else N_IMAGES) for s in CFG_SCALES]
    row = {"name": "tiny-digits", "params": cost.params, "macs_thop": cost.thop, "truth": truth}
    with writing(reports / "teacher.json") as path:
        path.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--reports", type=Path, required=True, help="folder of the rows and tables")
    parser.add_argument("--updates", type=int, nargs="+", default=UPDATES, help="checkpoints; the last one is judged")
    parser.add_argument(
        "--cfg-scales", type=float, nargs="+", default=CFG_SCALES, help="guidance scales it is drawn with; more may follow later"
    )
    parser.add_argument("--only", nargs="+", help="candidates by name, with every one of --seeds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of --only")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done")
    args = parser.parse_args(words)
    for part in LISTS:
        if (not args.part or part in args.part) and not args.dry_run and not (args.reports / f"{part}.json").exists():
            listing(part, args.reports)
    if "teacher" in (args.part or PARTS) and not args.dry_run and not (args.reports / "teacher.json").exists():
        teacher(args.reports)
    left = jobs(args)
    print(f"{len(left)} trainings of {args.updates[-1]} updates are left", flush=True)
    if args.dry_run or (args.part and "rows" not in args.part):
        return
    with multiprocessing.get_context("spawn").Pool(args.workers) as pool:
        for line in pool.imap_unordered(run, left):
            print(line, flush=True)


if __name__ == "__main__":
    main()
