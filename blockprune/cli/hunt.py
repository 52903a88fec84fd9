"""One search in one process: what it scores with, which candidates it considers, and where it keeps the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from blockprune.cli import options, outputs
from blockprune.cli.measuring import plan_of, terms
from blockprune.cli.problem import Problem
from blockprune.cli.samples import provider_of, samples_of
from blockprune.cost import latency
from blockprune.cost.components import unet_inputs
from blockprune.errors import UserError
from blockprune.measures.examiner import DENOISING, Arrays, Examiner, Objective, Plan, check_kept
from blockprune.measures.images import Judges
from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.model.sampling import NotFinite
from blockprune.runs.records import Candidate, Evaluation, Score
from blockprune.stages import inputs
from blockprune.stages.inputs import Bench
from blockprune.stages.search.search import Chance, Listed, Tiers, finalists, search
from blockprune.stages.search.trials import Ledger, open_storage
from blockprune.stages.train.distill import Distiller, Sampler, Settings, student_of
from blockprune.stages.train.recipe import read_recipe

FRESH = 1_000_003  # finals use seeds from here on, so that what won by luck does not win again
MAX_FINAL = 10**6  # samples of a finalist
RECOVERY_RATE = 5e-4  # higher than the papers': a recovery is short
PICTURE_TERMS = ("prompts", "n_images", "steps", "cfg_scale", "scheduler")
JUDGE_TERMS = ("detector", "clip", "reference", "n_reference")
COMMON_TERMS = ("teacher", "latent", "dtype", "device", "seed")


def relevant(asked: Mapping[str, Any], objective: str) -> dict[str, Any]:
    """Those of a run's terms that change the numbers of one measure."""
    names = [*COMMON_TERMS]
    if objective not in DENOISING:
        names += [*PICTURE_TERMS, *JUDGE_TERMS]
    else:
        names += ["eps_samples", "data", *(PICTURE_TERMS if asked.get("data") == "the teacher's own samples" else ())]
        names += ["cfg_scale"] if objective == "guided_mse" else []
    return {name: asked.get(name) for name in names}


@dataclass
class Hunt:
    """A search as the options say it, on a loaded bench. Several processes may hold the same one; they meet in its ledgers.

    `keep` stores what the teacher drew; only the process that owns the run directory may.
    """

    bench: Bench
    opts: Mapping[str, Any]
    folder: Path
    keep: Callable[[str, Arrays], None] = lambda name, arrays: None

    @cached_property
    def plan(self) -> Plan:
        return plan_of(self.bench, self.opts, [self.opts["objective"]])

    @cached_property
    def asked(self) -> dict[str, Any]:
        """What must be the same for two searches to share scores and candidates."""
        same = ("objective", "unit", "keep", "budget", "scope", "macs", "pareto")
        return relevant(terms(self.bench, self.opts, self.plan), self.opts["objective"]) | {k: self.opts[k] for k in same}

    @cached_property
    def problem(self) -> Problem:
        return Problem(self.bench.graph, self.opts)

    def ledger(self, kind: str = "search") -> Ledger:
        """The study of the "search", of "random" sets for comparison, of its "final", or of finalists that have "recovered"."""
        asked = self.asked | ({"final_factor": self.opts["final_factor"]} if kind in ("final", "recovered") else {})
        if kind == "recovered":
            asked |= {name: self.opts[name] for name in ("recover", "recover_batch_size", "train_data")}
        name = self.opts["study_name"] + ("" if kind == "search" else f"-{kind}")
        return Ledger(self.storage, name, self.opts["objective"], asked, artifacts=self.folder / "artifacts")

    @cached_property
    def storage(self) -> Any:
        return open_storage(self.opts["storage"], self.folder / "study.journal")

    def tiers(self) -> Tiers:
        shares = (1,) if self.opts["pareto"] else (0.25, 1)
        sizes = sorted({max(1, round(share * self.n)) for share in shares})
        return Tiers(self.objective(self.plan, "teacher"), sizes)

    @property
    def n(self) -> int:
        return self.plan.n_noisy if self.plan.denoising_measures else self.plan.protocol.n_images

    @cached_property
    def fresh(self) -> Plan:
        """The plan of the finals: other seeds, and more samples."""
        factor, seed = self.opts["final_factor"], self.plan.protocol.seed + FRESH
        n_images = self.plan.protocol.n_images * (factor if self.needs_teacher else 1)
        protocol = replace(self.plan.protocol, seed=seed, n_images=n_images)
        n_noisy = self.plan.n_noisy * factor
        clean = self.plan.clean and inputs.clean_latents(self.bench, self.opts["data"], n_noisy, self.plan.batch_size)
        return replace(self.plan, protocol=protocol, n_noisy=n_noisy, clean=clean)

    @property
    def needs_teacher(self) -> bool:
        return not self.plan.denoising_measures or self.plan.clean is None

    def objective(self, plan: Plan, part: str) -> Objective:
        return Objective(Examiner(self.bench.pipe, self.bench.graph, plan), self.opts["objective"], self.teacher(plan, part))

    def teacher(self, plan: Plan, part: str) -> Arrays:
        """What the teacher drew under a plan, kept in the run directory; empty when nothing asks for it."""
        if not self.needs_teacher:
            return {}
        if (kept := outputs.recall_arrays(self.folder, part)) is None:
            kept, _ = Examiner(self.bench.pipe, self.bench.graph, plan).teacher()
            self.keep(part, kept)
        return check_kept(part, kept, plan.observed, plan.protocol.n_images)

    def work(self) -> Iterator[tuple[str, Evaluation]]:
        """Scores until the search and its finals are done; yields what this process scored, with the kind of its ledger."""
        seed = self.opts["seed"] + 1000 * self.opts.get("worker", 0)
        main, strategy, tiers = self.ledger(), self.problem.strategy(seed), self.tiers()
        for e in search(main, strategy, tiers, self.opts["trials"]):
            main.count_cached(strategy.cached)
            yield "search", e
        for e in search(self.ledger("random"), Chance(strategy, seed), tiers, self.opts["random"]):
            yield "random", e
        finals, objective = self.ledger("final"), self.objective(self.fresh, "teacher-fresh")
        chosen = self.problem.timed and finals.known()  # another timing might choose others
        listed = [] if chosen else finalists(main.evaluations(), self.problem.spaces, self.opts["finalists"], self.fast_enough)
        for e in search(finals, Listed(listed), lambda c, _: (objective(c.arch, c.label),), picture=self.picture):
            yield "final", e

        if self.opts["recover"]:
            ours = Listed([e.candidate for e in self.ledger("final").evaluations()])
            for e in search(self.ledger("recovered"), ours, lambda c, _: (self.recovered(objective, c),)):
                yield "recovered", e

    def fast_enough(self, candidate: Candidate) -> bool:
        """True when a candidate's step, measured in turn with the teacher's, keeps a latency budget with 1 % to spare."""
        limits = [b.limit for b in self.problem.space.budgets if b.quantity == "latency"]
        if not limits:
            return True
        unet, n_tokens = self.bench.pipe.unet, self.bench.graph.n_tokens
        inputs = unet_inputs(unet.config, self.bench.latent, n_tokens, 1, unet.device, unet.dtype)
        archs = {"full": Architecture(), "own": candidate.arch}
        models = {name: partial(surgery.removed, unet, arch) for name, arch in archs.items()}
        timings = latency.measure(models, inputs, self.plan.n_timings, 2, unet.device)
        return self.opts["latency_s"] * latency.ratio(timings["full"], timings["own"])[0] <= 0.99 * min(limits)

    def recovered(self, objective: Objective, candidate: Candidate) -> Score:
        """The score of a finalist after a short distillation, on data, order and noise that are the same for all finalists."""
        settings = Settings(self.opts["recover_batch_size"], seed=self.opts["seed"])
        recipe = replace(read_recipe("bk-sdm"), learning_rate=RECOVERY_RATE)
        accelerator = Accelerator(cpu=self.bench.pipe.device.type == "cpu")
        student = student_of(self.bench.pipe.unet, candidate.arch, "teacher", 0)
        bench = self.bench
        run = Distiller(accelerator, bench.pipe.unet, student, bench.graph, candidate.arch, self.training_samples, recipe, settings)
        try:
            for _ in run.run(self.opts["recover"]):
                pass
        except FloatingPointError as err:
            return replace(objective(candidate.arch, candidate.label, 1), value=None, low=None, high=None, error=str(err))
        finally:
            run.close()
        return objective.of(run.bare.eval(), candidate.arch, candidate.label)

    @cached_property
    def training_samples(self) -> Sampler:
        """What finalists recover on: the training pairs of --train-data, encoded once."""
        return samples_of(self.bench, provider_of(self.bench, self.opts["train_data"]), self.opts["seed"])

    def picture(self, candidate: Candidate) -> bytes | None:
        """The first images of a finalist, side by side; None when it draws none."""
        protocol = replace(self.plan.protocol, seed=self.fresh.protocol.seed, n_images=self.plan.n_pictures)
        examiner = Examiner(self.bench.pipe, self.bench.graph, replace(self.plan, protocol=protocol, judges=Judges()))
        try:
            return outputs.strip_png(examiner.observe(candidate.arch, candidate.label)[1])
        except NotFinite:
            return None


def hunt(opts: Mapping[str, Any], folder: Path) -> Hunt:
    """The search that the options say, its model loaded."""
    device, dtype = options.device_of(opts["device"]), options.dtype_of(opts["dtype"])
    if opts["recover"]:
        opts = {**opts, "train_data": inputs.training_data(opts["model"], opts["train_data"], "--train-data")}
    bench = inputs.load_bench(opts["model"], opts["resolution"], device, dtype)
    filled = dict(opts) | {name: value for name, value in bench.defaults.items() if opts.get(name) is None}
    largest = max(filled["n_images"], filled["eps_samples"]) * filled["final_factor"]
    if largest > MAX_FINAL:
        raise UserError(
            f"finalists would get {largest} samples, at most {MAX_FINAL}: lower --final-factor, --n-images or --eps-samples"
        )
    return Hunt(bench, filled, folder)
