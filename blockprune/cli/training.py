"""How a distillation runs: its phases, what it keeps, where it goes on, validation, and the pipeline that it ends with."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from diffusers import UNet2DConditionModel

from blockprune.cli import console, outputs
from blockprune.cli.measuring import N_PICTURES, plan_of, possible
from blockprune.cli.samples import provider_of, samples_of
from blockprune.cost.components import pipeline_costs
from blockprune.errors import UserError
from blockprune.export.pipeline import ARCHITECTURE, export_pipeline, load_student, save_student
from blockprune.measures.examiner import FULL, Examiner
from blockprune.measures.images import STATISTICS, judge
from blockprune.model import presets, pretrained, surgery
from blockprune.model.architecture import Architecture
from blockprune.model.sampling import NotFinite, Protocol, check_schedule
from blockprune.model.trace import trace
from blockprune.runs.directory import Run
from blockprune.runs.records import TrainState
from blockprune.stages import inputs
from blockprune.stages.inputs import Bench
from blockprune.stages.train.checkpoints import Snapshot, drop_oldest, read_snapshot, write_snapshot
from blockprune.stages.train.distill import Distiller, Settings, student_of
from blockprune.stages.train.recipe import Phase, Recipe, read_recipe


@dataclass(frozen=True)
class Stretch:
    """A phase as it will run: optimiser steps `first` to `last`, exclusive."""

    teacher: str
    arch: Architecture
    first: int
    last: int


def stretches(recipe: Recipe, opts: Mapping[str, Any]) -> list[Stretch]:
    """The phases with their teachers, architectures and steps filled in; each may remove more than the one before, not less."""
    phases = list(recipe.phases)
    if len(opts["teacher"]) > 1:
        if len(phases) > 1:
            raise UserError("several --teacher and a recipe with phases: name the teachers in the recipe's phases")
        phases = [Phase(None, name, None) for name in opts["teacher"]]
    open_ended = [p for p in phases if p.steps is None]
    left = opts["max_train_steps"] - sum(p.steps or 0 for p in phases)
    if left < len(open_ended) or (left and not open_ended):
        raise UserError(
            f"--max-train-steps {opts['max_train_steps']} does not match the recipe's phases: {sum(p.steps or 0 for p in phases)} "
            f"steps are given there, {len(open_ended)} phases share the rest"
        )
    config = pretrained.configs(opts["teacher"][0])
    graph = trace(config.unet, config.latent(opts["resolution"]), config.n_tokens)
    found: list[Stretch] = []
    teacher, arch = opts["teacher"][0], Architecture()
    for i, phase in enumerate(phases):
        teacher = phase.teacher or teacher
        last_one = i == len(phases) - 1
        wanted = presets.parse(opts["arch"] if phase.arch is None or last_one else phase.arch, graph)
        if not arch <= wanted:
            raise UserError(f"phase {i + 1} puts back {', '.join(arch - wanted)}: a phase may only remove more than the one before")
        share = phase.steps or (left // len(open_ended) + (left % len(open_ended) if phase is open_ended[-1] else 0))
        first = found[-1].last if found else 0
        arch = wanted
        found.append(Stretch(teacher, arch, first, first + share))
    return found


def run(opts: Mapping[str, Any], folder: Path) -> None:
    """Trains phase after phase, goes on where an earlier attempt stopped, and exports the student."""
    if opts["report_to"] and find_spec(opts["report_to"]) is None:
        raise UserError(f"--report-to {opts['report_to']} needs its package: pip install {opts['report_to']}")
    recipe = read_recipe(opts["recipe"])
    if opts["learning_rate"] is not None:
        recipe = replace(recipe, learning_rate=opts["learning_rate"])
    plan = stretches(recipe, opts)
    opts = {**opts, "data": inputs.training_data(plan[0].teacher, opts["data"], "--data")}
    try:
        accelerator = Accelerator(
            cpu=opts["cpu"],
            mixed_precision=opts["mixed_precision"],
            gradient_accumulation_steps=opts["gradient_accumulation_steps"],
            log_with=opts["report_to"],
            project_dir=str(folder),
        )
    except ValueError as err:
        why = str(err).splitlines()[0][:100]
        raise UserError(
            f"cannot train with --mixed-precision {opts['mixed_precision']} here ({why}): give bf16 or no, or use a GPU"
        ) from None
    if opts["mixed_precision"] == "fp16" and accelerator.device.type == "cpu":
        raise UserError("cannot train with --mixed-precision fp16 on a processor: give bf16 or no, or use a GPU")
    _check_distribution(accelerator)
    training = Training(opts, folder, recipe, plan, accelerator)
    with training.opened() as out:
        training.train(out)
        if accelerator.is_main_process and out is not None:
            training.finish(out)


def _check_distribution(accelerator: Accelerator) -> None:
    """Raises UserError for a way to share the work by which weights cannot be put together by name."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
        kind == DistributedType.FSDP and not accelerator.is_fsdp2
    ):
        raise UserError(
            f"distill runs on one device, under data parallelism, or under FSDP 2: got {kind.value}; "
            "launch it with --fsdp_version 2 or without --use_fsdp and --use_deepspeed"
        )


class Training:
    """One distillation. Every process of `accelerate launch` holds one; only the main process writes."""

    def __init__(
        self, opts: Mapping[str, Any], folder: Path, recipe: Recipe, plan: Sequence[Stretch], accelerator: Accelerator
    ) -> None:
        self.opts, self.folder, self.recipe, self.plan, self.accelerator = opts, folder, recipe, plan, accelerator
        self.bench = self._load(plan[0].teacher)
        steps, scale = (self.bench.defaults[k] if opts[k] is None else opts[k] for k in ("steps", "cfg_scale"))
        check_schedule(self.bench.pipe, Protocol(1, steps, scale, opts["seed"], self.bench.latent))
        self.provider = provider_of(self.bench, opts["data"])
        self.err = console.make_console(stderr=True)

    def _load(self, model: str) -> Bench:
        return inputs.load_bench(model, self.opts["resolution"], self.accelerator.device, torch.float32)

    @property
    def settings(self) -> Settings:
        o = self.opts
        return Settings(
            o["train_batch_size"],
            o["gradient_accumulation_steps"],
            o["seed"],
            o["ema"],
            gradient_checkpointing=o["gradient_checkpointing"],
            compiler="inductor" if o["compile"] else "",
        )

    @property
    def asked(self) -> dict[str, Any]:
        """What must be the same for a run to go on. How the global batch is cut over processes changes no number but rounding."""
        o, world = self.opts, self.accelerator.num_processes
        phases = [{"teacher": s.teacher, "arch": list(s.arch), "first": s.first, "last": s.last} for s in self.plan]
        same = ("mixed_precision", "ema", "seed", "flip")
        return {
            "recipe": {k: v for k, v in self.recipe.to_json().items() if k != "phases"},
            "phases": phases,
            "teacher": self.bench.identity,
            "teacher_model": self.plan[0].teacher,
            "data": self.provider.identity,
            "latent": self.bench.latent,
            "batch": o["train_batch_size"] * o["gradient_accumulation_steps"] * world,
            **{name: o[name] for name in same},
        }

    @property
    def note(self) -> dict[str, Any]:
        """What a reader of the run needs besides: versions, the student, the teacher's graph and costs, and the images' prompts."""
        outside = pipeline_costs(pretrained.configs(self.plan[0].teacher), self.bench.latent).values()
        prompts = inputs.prompts_of(self.opts["validation_prompts"], self.bench)
        n = min(N_PICTURES, self.opts["n_images"] or self.bench.defaults["n_images"])
        return {
            "made_with": inputs.made_with(self.accelerator.device),
            "arch": list(self.plan[-1].arch),
            "graph": self.bench.graph.to_json(),
            "outside_params": sum(c.params for c in outside),
            "pictured_prompts": [prompts[i % len(prompts)] for i in range(n)],
        }

    @contextmanager
    def opened(self) -> Iterator[Run | None]:
        """The run directory in the main process, None in the others."""
        out = None
        if self.accelerator.is_main_process:
            out = Run(self.folder, "distill", self.asked, self.note)
        self.accelerator.wait_for_everyone()
        try:
            yield out
        finally:
            if out is not None:
                out.close()

    def train(self, out: Run | None) -> None:
        """Every phase that is not done yet, from the newest sound checkpoint on."""
        start, wrong = read_snapshot(self.folder / "checkpoints")
        done = start.step if start else 0
        if out is not None:
            for line in wrong:
                self.err.print(line, style="red")
            out.keep(lambda row: row["step"] <= done)
            if not wrong:
                drop_oldest(self.folder / "checkpoints", self.opts["checkpoints_total_limit"])
            self.accelerator.init_trackers("blockprune")
        weights: Mapping[str, torch.Tensor] | None = start.parts["student"] if start else None
        total = self.plan[-1].last
        with console.WorkProgress(self.err, {"training": (total - done) * self.n_images}) as progress:
            for stretch in self.plan:
                if stretch.last <= done and (stretch is not self.plan[-1] or (self.folder / "student" / ARCHITECTURE).exists()):
                    continue
                inside = start if start and start.step > stretch.first else None
                distiller = self._distiller(stretch, weights, inside)
                self._phase(distiller, stretch, out, progress)
                distiller.close()
                weights = distiller.weights(averaged=False)
        self.accelerator.end_training()

    @property
    def n_images(self) -> int:
        """Images of one optimiser step."""
        return self.asked["batch"]

    def _distiller(self, stretch: Stretch, weights: Mapping[str, torch.Tensor] | None, start: Snapshot | None) -> Distiller:
        """The phase ready to run: its teacher, and the student as the phase before left it, with more removed."""
        bench = self.bench if stretch.teacher == self.plan[0].teacher else self._load(stretch.teacher)
        pipe, o = bench.pipe, self.opts
        student = student_of(pipe.unet, stretch.arch, self.recipe.initialise, o["seed"])
        if weights is not None and start is None:
            student.load_state_dict({name: weights[name] for name in student.state_dict()})
        sampler = samples_of(bench, self.provider, o["seed"], o["flip"], self.recipe.caption_dropout)
        run = (sampler, self.recipe, self.settings, stretch.first, start)
        return Distiller(self.accelerator, pipe.unet, student, bench.graph, stretch.arch, *run)

    def _phase(self, distiller: Distiller, stretch: Stretch, out: Run | None, progress: console.WorkProgress) -> None:
        every, validate = self.opts["checkpointing_steps"], self.opts["validation_steps"]
        try:
            for state in distiller.run(stretch.last - stretch.first):
                self._log(state, out, progress)
                last = state.step == stretch.last
                # before the checkpoint: a run goes on behind its last one, and would never come back to this validation
                if validate and state.step % validate == 0 and state.step < self.plan[-1].last:
                    self._validate(distiller.weights(averaged=True), stretch.arch, state.step, out)
                if state.step % every == 0 or last:
                    self._snapshot(distiller, state.step)
                self.accelerator.wait_for_everyone()
        except FloatingPointError as err:
            kept, _ = read_snapshot(self.folder / "checkpoints")
            where = f"the last good checkpoint is {str(kept.path)!r}" if kept else "there is no checkpoint yet"
            raise UserError(f"{err}: {where}; lower --learning-rate or use --mixed-precision no, in another --out") from None
        if stretch is self.plan[-1]:
            weights = distiller.weights(averaged=True)
            if out is not None:
                out.keep(lambda row: row["kind"] != "validation" or row["step"] < stretch.last)  # of an attempt that ended here
                self._validate(weights, stretch.arch, stretch.last, out)
                save_student(self._unet(weights, stretch.arch), stretch.arch, self.folder / "student")

    def _log(self, state: TrainState, out: Run | None, progress: console.WorkProgress) -> None:
        if out is None:
            return
        out.append({"kind": "train", **state.to_json()})
        main = {name: value for name, value in state.losses.items() if not name.startswith("feature/")}
        self.accelerator.log(main, step=state.step)
        progress.tick("training", state.n_images)
        if state.step % max(1, self.plan[-1].last // 20) == 0:
            terms = ", ".join(f"{name} {value:.4g}" for name, value in main.items())
            progress.say(f"step {state.step}/{self.plan[-1].last}: {terms}; {state.n_images / state.seconds:.3g} images/s")

    def _snapshot(self, distiller: Distiller, step: int) -> None:
        parts = distiller.parts()
        if self.accelerator.is_main_process:
            write_snapshot(self.folder / "checkpoints", step, parts, self.opts["checkpoints_total_limit"])

    def _unet(self, weights: Mapping[str, torch.Tensor], arch: Architecture) -> UNet2DConditionModel:
        """A student with these weights, for inference, apart from the one in training."""
        unet = surgery.skeleton(self.bench.pipe.unet.config, arch)
        unet.load_state_dict(weights, assign=True)
        return unet.eval().requires_grad_(False)

    def _validate(self, weights: Mapping[str, torch.Tensor], arch: Architecture, step: int, out: Run | None) -> None:
        """Images and their scores at fixed seeds, a row for each measure; by the main process alone."""
        if out is None:
            return
        opts = {**MEASURING, **self.opts, "model": self.plan[0].teacher, "prompts": self.opts["validation_prompts"]}
        opts |= {k: v for k, v in self.bench.defaults.items() if opts.get(k) is None}
        plan = plan_of(self.bench, opts, ["params"])
        measures = [m for m in possible(plan.judges) if m in STATISTICS and m != "feature_distance"]
        teacher, self.bench.pipe.unet = self.bench.pipe.unet, self._unet(weights, arch)
        examiner = Examiner(self.bench.pipe, self.bench.graph, plan)
        if not measures:
            protocol = replace(plan.protocol, n_images=plan.n_pictures)
            examiner = Examiner(self.bench.pipe, self.bench.graph, replace(plan, protocol=protocol))
        try:
            seen, pictures = examiner.observe(Architecture(), FULL)
        except NotFinite as err:
            self.err.print(f"validation at step {step}: {err}", style="red")
            return
        finally:
            self.bench.pipe.unet = teacher
        out.write(f"images/step-{step:07d}.png", outputs.strip_png(pictures))
        key = self.plan[-1].arch.key
        for score in judge(key, f"step {step}", measures, seen, None, plan.judges, plan.protocol.seed):
            out.append({"kind": "validation", "step": step, "score": score.to_json()})

    def finish(self, out: Run) -> None:
        """Curves, the model card's entries, and the pipeline."""
        outputs.write_curves(out)
        if (self.folder / "pipeline").exists():
            print(f"the pipeline is in {self.folder / 'pipeline'} already")
            return
        card = self._card(out.rows())
        out.write("card.json", json.dumps(card, indent=2) + "\n")
        unet = load_student(self.folder / "student")
        pipe = self._load(self.plan[0].teacher).pipe.to("cpu")
        teacher = self.plan[0].teacher, self.bench.identity
        found = export_pipeline(pipe, unet, self.plan[-1].arch, self.folder / "pipeline", card, teacher)
        loads = f"only blockprune.load_pipeline loads it: {found}" if isinstance(found, str) else "any diffusers loads it"
        print(f"the pipeline is in {self.folder / 'pipeline'}; {loads}")

    def _card(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        last = max((row["step"] for row in rows if row["kind"] == "validation"), default=None)
        scores = [_score(row["score"]) for row in rows if row["kind"] == "validation" and row["step"] == last]
        graph, arch = self.bench.graph, self.plan[-1].arch
        return {
            "teacher": ", then ".join(dict.fromkeys(s.teacher for s in self.plan)),
            "data": self.opts["data"] or "digits",
            "steps": self.plan[-1].last,
            "batch": self.n_images,
            "recipe": self.opts["recipe"],
            "costs": {"teacher": graph.total.to_json(), "student": graph.cost(arch).to_json()},
            "scores": scores,
        }


MEASURING: dict[str, Any] = dict.fromkeys(
    ("eps_samples", "detector", "inception_weights", "clip", "reference", "batch_size"), None
) | {"scheduler": ""}


def _score(score: Mapping[str, Any]) -> dict[str, Any]:
    return {"measure": score["measure"], "value": score["value"], "low": score["low"], "high": score["high"], "n": score["n"]}
