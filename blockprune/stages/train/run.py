"""How a distillation runs: phase after phase, what is kept on the way, where it goes on, and the student it ends with."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from blockprune.cost.components import outside_params
from blockprune.data.encoded import Provider
from blockprune.errors import UserError
from blockprune.export.pipeline import ARCHITECTURE, export_pipeline, load_student, save_student
from blockprune.model import pretrained, surgery
from blockprune.model.architecture import Architecture
from blockprune.model.defaults import defaults_of
from blockprune.model.fit import Fitter, at_a_time, enough
from blockprune.model.graph import BlockGraph
from blockprune.model.model import Model, load_model
from blockprune.model.sampling import NotFinite
from blockprune.model.trace import trace
from blockprune.progress import Listener, Silent
from blockprune.runs import open_run
from blockprune.runs.directory import Run
from blockprune.runs.memory import MemoryRun
from blockprune.runs.parts import strip_png
from blockprune.runs.provenance import made_with
from blockprune.runs.records import TrainState
from blockprune.stages import loading
from blockprune.stages.plan import N_PICTURES
from blockprune.stages.train.checkpoints import Snapshot, drop_oldest, read_snapshot, write_snapshot
from blockprune.stages.train.distill import Distiller, Sampler, Settings, student_of
from blockprune.stages.train.launch import accelerated, launched
from blockprune.stages.train.phases import PlannedPhase, planned
from blockprune.stages.train.recipe import Recipe, read_recipe
from blockprune.stages.train.request import TrainRequest
from blockprune.stages.train.samples import data_of, provider_of, samples_of
from blockprune.stages.train.validation import Validation

Weights = Mapping[str, Tensor]
FIT_FROM = 2**40  # the first of them; updates take samples 0, 1, …


@dataclass(frozen=True)
class Distilled:
    """A distillation that is done: its run, its first teacher, and the student, in float32.

    In processes that only helped, the run holds what they saw of it, and `leads` is False.
    """

    run: Run | MemoryRun
    teacher: Model
    student: UNet2DConditionModel
    arch: Architecture
    leads: bool

    @cached_property
    def pipeline(self) -> DiffusionPipeline:
        """The teacher's pipeline with the student in place of its network, in its precision; that pipeline stays as it is."""
        pipe, device, dtype = copy.copy(self.teacher.pipe), self.teacher.device, self.teacher.dtype
        same = self.student.dtype == dtype and self.student.device == device
        with pretrained.silence():
            setattr(pipe, self.teacher.family.network, self.student if same else copy.deepcopy(self.student).to(device, dtype))
        return pipe

    def export(self, folder: Path, card: Mapping[str, Any]) -> str:
        """Writes the pipeline with the student to a folder, unless it is there already; returns where it is and what loads it."""
        if folder.exists():
            return f"the pipeline is in {folder} already"
        named = self.run.about["asked"]["teacher_model"], self.teacher.identity
        stock = export_pipeline(self.teacher.pipe, self.student, self.arch, folder, card, named)
        loads = f"only blockprune.load_pipeline loads it: {stock}" if isinstance(stock, str) else "any diffusers loads it"
        return f"the pipeline is in {folder}; {loads}"


def distill(given: Model | None, request: TrainRequest, out: Path | None, progress: Listener, dataset: Any = None) -> Distilled:
    """Trains phase after phase, from the newest sound checkpoint in `out` on; `out` None keeps all in memory.

    `given` is the first teacher where it is loaded already; it stays as it was. `dataset` are training pairs in place of the
    request's. Every process of `accelerate launch` calls this; only the main one writes.
    """
    if request.report_to and out is None:
        raise UserError(f"--report-to {request.report_to} writes to the run directory: give --out")
    if request.report_to and find_spec(request.report_to) is None:
        raise UserError(f"--report-to {request.report_to} needs its package: pip install {request.report_to}")
    recipe = read_recipe(request.recipe)
    if request.learning_rate is not None:
        recipe = replace(recipe, learning_rate=request.learning_rate)
    phases = planned(recipe, request, given.graph if given else _graph(request))
    data = _data(given, request) if dataset is None else dataset
    device = request.device if given is None or launched() else str(given.device)
    accumulation = request.gradient_accumulation_steps
    with accelerated(device, request.mixed_precision, accumulation, request.report_to, out) as accelerator:
        model = _loaded(request.teacher[0], request, accelerator) if given is None else _own(given, accelerator.device)
        request = request.filled(model.defaults)
        Validation(model, request).check()
        provider = provider_of(model, data)
        leads = accelerator.is_main_process
        about = _about(model, request, recipe, phases, provider, accelerator)
        about[1]["data_source"] = data if isinstance(data, str) else type(data).__name__
        run = open_run(out if leads else None, "distill", *about)
        accelerator.wait_for_everyone()
        with run, model.undisturbed():
            told = progress if leads else Silent()
            student = Training(model, request, recipe, phases, provider, accelerator, run, out, told).student()
    return Distilled(run, given or model, student, phases[-1].arch, leads)


def _graph(request: TrainRequest) -> BlockGraph:
    config = pretrained.configs(request.teacher[0])
    return trace(config.unet, config.latent(request.resolution), config.n_tokens)


def _data(given: Model | None, request: TrainRequest) -> str:
    name, defaults = (given.name, given.defaults) if given else (request.teacher[0], defaults_of(request.teacher[0]))
    return data_of(name, defaults, request.data)


def _loaded(name: str, request: TrainRequest, accelerator: Accelerator) -> Model:
    return load_model(name, request.resolution, accelerator.device)


def _own(model: Model, device: torch.device) -> Model:
    """The model in float32 on the device, with a network of its own, whose layout and precision training changes."""
    pipe = copy.copy(model.pipe)
    for name, part in model.pipe.components.items():
        if isinstance(part, torch.nn.Module) and (name == model.family.network or not _fits(part, device)):
            setattr(pipe, name, copy.deepcopy(part).to(device).float())
    return replace(model, pipe=pipe)


def _fits(part: torch.nn.Module, device: torch.device) -> bool:
    """True for a part that is in float32 on the device; a device without an index is any of its type."""
    p = next(part.parameters())
    return p.dtype == torch.float32 and p.device.type == device.type and device.index in (None, p.device.index)


def _about(
    model: Model,
    request: TrainRequest,
    recipe: Recipe,
    phases: Sequence[PlannedPhase],
    provider: Provider,
    accelerator: Accelerator,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What must be the same for a run to go on, and what a reader of it needs besides.

    How the global batch is cut over processes changes no number but rounding.
    """
    asked = {
        **request.compared(),
        "recipe": {k: v for k, v in recipe.to_json().items() if k != "phases"},
        "phases": [phase.to_json() for phase in phases],
        "teacher": model.identity,
        "teacher_model": request.teacher[0],
        "data": provider.identity,
        "latent": list(model.latent),
        "batch": request.train_batch_size * request.gradient_accumulation_steps * accelerator.num_processes,
    }
    prompts = loading.prompts_of(request.validation_prompts, model)
    return asked, {
        "made_with": made_with(accelerator.device),
        "arch": phases[-1].arch.terms,
        "graph": model.graph.to_json(),
        "outside_params": outside_params(pretrained.configs_of(model.pipe)),
        "recipe_name": request.recipe,
        "pictured_prompts": [prompts[i % len(prompts)] for i in range(min(N_PICTURES, request.n_images or 1))],
    }


@dataclass(frozen=True)
class Training:
    """One process's part of a distillation; `run` is in memory, and `progress` silent, in those that only help."""

    model: Model
    request: TrainRequest
    recipe: Recipe
    phases: Sequence[PlannedPhase]
    provider: Provider
    accelerator: Accelerator
    run: Run | MemoryRun
    out: Path | None
    progress: Listener

    @property
    def n_steps(self) -> int:
        return self.phases[-1].last

    @property
    def n_images(self) -> int:
        """Images of one update, over all processes."""
        return self.request.train_batch_size * self.request.gradient_accumulation_steps * self.accelerator.num_processes

    def student(self) -> UNet2DConditionModel:
        """The trained student: every phase that is not done yet is run, the last one ends with a validation."""
        validation = Validation(self.model, self.request)
        start = self._start()
        done = start.step if start else 0
        self.run.keep(lambda row: row["step"] <= done)
        self.progress.plan({"training": (self.n_steps - done) * self.n_images})
        self.accelerator.init_trackers("blockprune")
        weights: Weights | None = start.parts["student"] if start else None
        ended = done == self.n_steps and self.out is not None and (self.out / "student" / ARCHITECTURE).exists()
        for phase in self.phases:
            last = phase is self.phases[-1]
            if phase.last <= done and (ended or not last):
                continue
            weights = self._trained(phase, weights, start if start and start.step > phase.first else None, validation)
        self.accelerator.end_training()
        if ended or weights is None:
            return load_student(Path(self.out or "") / "student").requires_grad_(False)
        return self._kept(weights, validation)

    def _start(self) -> Snapshot | None:
        """The newest sound checkpoint; those beyond the limit, left by a killed process, go where all are sound."""
        if self.out is None:
            return None
        start, wrong = read_snapshot(self.out / "checkpoints")
        for line in wrong:
            self.progress.say(line, "red")
        if not wrong and self.accelerator.is_main_process:
            drop_oldest(self.out / "checkpoints", self.request.checkpoints_total_limit)
        return start

    def _trained(self, phase: PlannedPhase, weights: Weights | None, start: Snapshot | None, validation: Validation) -> Weights:
        """The weights after a phase: those to go on with, or of the last phase those of the student."""
        distiller = self._distiller(phase, weights, start)
        try:
            for state in distiller.run(phase.last - phase.first):
                self._log(state)
                every = self.request.validation_steps
                if every and state.step % every == 0 and state.step < self.n_steps:
                    # before the checkpoint: a run goes on behind its last one, and would never come back to this validation
                    self._validate(self._network(distiller.weights(averaged=True), phase.arch), phase.arch, state.step, validation)
                if state.step % self.request.checkpointing_steps == 0 or state.step == phase.last:
                    self._checkpoint(distiller, state.step)
                self.accelerator.wait_for_everyone()
            return distiller.weights(averaged=phase is self.phases[-1])
        except FloatingPointError as err:
            raise UserError(
                f"{err}: {self._last_good()}; lower --learning-rate or use --mixed-precision no, in another --out"
            ) from None
        finally:
            distiller.close()

    def _distiller(self, phase: PlannedPhase, weights: Weights | None, start: Snapshot | None) -> Distiller:
        """The phase ready to run: its teacher, and the student as the phase before left it, with more removed."""
        r, first = self.request, self.phases[0]
        teacher = self.model if phase.teacher == first.teacher else _loaded(phase.teacher, r, self.accelerator)
        samples = samples_of(teacher, self.provider, r.seed, r.random_flip, self.recipe.caption_dropout)
        fits = None
        if start is None and phase.arch.fits:
            fits, said = enough(partial(self._fitter, teacher, samples), phase.arch)
            self.progress.say(said)
        student = student_of(teacher.network, phase.arch, self.recipe.initialise, r.seed, fits)
        if weights is not None and start is None:
            student.load_state_dict({name: weights.get(name, t) for name, t in student.state_dict().items()})
        settings = Settings(
            r.train_batch_size,
            r.gradient_accumulation_steps,
            r.seed,
            r.ema,
            gradient_checkpointing=r.gradient_checkpointing,
            compiler="inductor" if r.compile else "",
        )
        how = (samples, self.recipe, settings, phase.first, start)
        return Distiller(self.accelerator, teacher.network, student, teacher.graph, phase.arch, *how)

    def _fitter(self, teacher: Model, samples: Sampler, n: int) -> Fitter:
        """Fits what stands in for removed blocks, on `n` training samples that no update sees with the same noise."""
        size = at_a_time(n, teacher.latent, self.request.train_batch_size)
        drawn = (samples.batch(range(g, g + size), self.accelerator.device) for g in range(FIT_FROM, FIT_FROM + n, size))
        return Fitter(teacher.network, teacher.graph, [(b.noisy, b.timesteps, b.condition) for b in drawn])

    def _log(self, state: TrainState) -> None:
        self.run.append({"kind": "train", **state.to_json()})
        main = {name: value for name, value in state.losses.items() if not name.startswith("feature/")}
        self.accelerator.log(main, step=state.step)
        self.progress.tick("training", state.n_images)
        if state.step % max(1, self.n_steps // 20) == 0:
            terms = ", ".join(f"{name} {value:.4g}" for name, value in main.items())
            self.progress.say(f"step {state.step}/{self.n_steps}: {terms}; {state.n_images / state.seconds:.3g} images/s")

    def _checkpoint(self, distiller: Distiller, step: int) -> None:
        if self.out is None:
            return
        parts = distiller.parts()  # every process must ask
        if self.accelerator.is_main_process:
            write_snapshot(self.out / "checkpoints", step, parts, self.request.checkpoints_total_limit)

    def _last_good(self) -> str:
        kept = read_snapshot(self.out / "checkpoints")[0] if self.out else None
        return f"the last good checkpoint is {str(kept.path)!r}" if kept else "there is no checkpoint yet"

    def _network(self, weights: Weights, arch: Architecture) -> UNet2DConditionModel:
        """A student with these weights, for inference, apart from the one in training."""
        network = surgery.skeleton(self.model.network.config, arch)
        network.load_state_dict(weights, assign=True)
        return network.eval().requires_grad_(False)

    def _validate(self, student: UNet2DConditionModel, arch: Architecture, step: int, validation: Validation) -> None:
        """A picture and a row for each measure, made by the main process alone."""
        if not self.accelerator.is_main_process:
            return
        try:
            pictures, scores = validation.look(student, arch, f"step {step}")
        except NotFinite as err:
            self.progress.say(f"validation at step {step}: {err}", "red")
            return
        self.run.write(f"images/step-{step:07d}.png", strip_png(pictures))
        for score in scores:
            self.run.append({"kind": "validation", "step": step, "score": score.to_json()})

    def _kept(self, weights: Weights, validation: Validation) -> UNet2DConditionModel:
        """The student of these weights, looked at, and saved where there is a run directory."""
        arch = self.phases[-1].arch
        # laid out as after a reload, by which kernels round; `contiguous()` leaves 1x1 convolutions in channels last
        plain = {name: t.clone(memory_format=torch.contiguous_format) for name, t in weights.items()}
        student = self._network(plain, arch)
        self.run.keep(lambda row: row["kind"] != "validation" or row["step"] < self.n_steps)  # of an attempt that ended here
        self._validate(student, arch, self.n_steps, validation)
        if self.out is not None and self.accelerator.is_main_process:
            save_student(student, arch, self.out / "student")
        return student
