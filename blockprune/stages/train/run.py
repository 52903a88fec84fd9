"""How a distillation runs: phase after phase, and the student it ends with."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from blockprune.cost.components import outside_params
from blockprune.data.encoded import Provider
from blockprune.export.pipeline import ARCHITECTURE, export_pipeline, load_student, save_student
from blockprune.export.stock_config import expressible, who_loads
from blockprune.model import pretrained, surgery
from blockprune.model.architecture import Architecture
from blockprune.model.defaults import defaults_of
from blockprune.model.fit import Fitter, at_a_time, enough
from blockprune.model.graph import BlockGraph
from blockprune.model.model import Model, load_model
from blockprune.model.trace import trace
from blockprune.progress import Listener, Silent
from blockprune.runs import open_run
from blockprune.runs.directory import Run
from blockprune.runs.memory import MemoryRun
from blockprune.runs.provenance import made_with
from blockprune.stages import loading
from blockprune.stages.outline import outlined, say_how_long
from blockprune.stages.plan import N_PICTURES
from blockprune.stages.train.checkpoints import Snapshot
from blockprune.stages.train.distill import Distiller, student_of
from blockprune.stages.train.launch import accelerated, launched
from blockprune.stages.train.phases import PlannedPhase, planned
from blockprune.stages.train.recipe import Recipe, read_recipe
from blockprune.stages.train.recorded import Recorded, check_tracker
from blockprune.stages.train.request import TrainRequest
from blockprune.stages.train.samples import Sampler, data_of, provider_of, samples_of
from blockprune.stages.train.trainer import Settings
from blockprune.stages.train.validation import Validation
from blockprune.stages.train.work import counted

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
        return f"the pipeline is in {folder}; {who_loads(stock)}"


def distill(given: Model | None, request: TrainRequest, out: Path | None, progress: Listener, dataset: Any = None) -> Distilled:
    """Trains phase after phase, from the newest sound checkpoint in `out` on; `out` None keeps all in memory.

    `given` is the first teacher where it is loaded already; it stays as it was. `dataset` are training pairs in place of the
    request's. Every process of `accelerate launch` calls this; only the main one writes.
    """
    check_tracker(request.report_to, out)
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
        Validation(model, request.drawing()).check()
        provider = provider_of(model, data)
        leads = accelerator.is_main_process
        about = _about(model, request, recipe, phases, provider, accelerator)
        about[1]["data_source"] = data if isinstance(data, str) else type(data).__name__
        run = open_run(out if leads else None, "distill", *about)
        accelerator.wait_for_everyone()
        with run, model.undisturbed():
            told = progress if leads else Silent()
            recorded = Recorded(request, phases[-1].last, accelerator, run, out, told)
            if leads and not run.rows():
                say_how_long(counted(outlined(model), request, recipe, phases, encoded=0), model, told)
            student = Training(model, request, recipe, phases, provider, recorded).student()
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
    """One process's part of a distillation: phase after phase, recorded in a run."""

    model: Model
    request: TrainRequest
    recipe: Recipe
    phases: Sequence[PlannedPhase]
    provider: Provider
    recorded: Recorded

    def student(self) -> UNet2DConditionModel:
        """The trained student: every phase that is not done yet is run, the last one ends with a validation."""
        validation = Validation(self.model, self.request.drawing(), tick=partial(self.recorded.progress.tick, "validation"))
        start, out = self.recorded.start(), self.recorded.out
        done = start.step if start else 0
        weights: Weights | None = start.parts["student"] if start else None
        ended = done == self.recorded.n_steps and out is not None and (out / "student" / ARCHITECTURE).exists()
        if not ended:
            self.recorded.announce_validations(validation.plan.protocol.n_images, done)
        for phase in self.phases:
            last = phase is self.phases[-1]
            if phase.last <= done and (ended or not last):
                continue
            weights = self._trained(phase, weights, start if start and start.step > phase.first else None, validation)
        self.recorded.accelerator.end_training()
        if ended or weights is None:
            return load_student(Path(out or "") / "student").requires_grad_(False)
        return self._kept(weights, validation)

    def _trained(self, phase: PlannedPhase, weights: Weights | None, start: Snapshot | None, validation: Validation) -> Weights:
        """The weights after a phase: those to go on with, or of the last phase those of the student."""
        distiller = self._distiller(phase, weights, start)
        if phase is self.phases[-1]:  # whose first sample could be read
            self.recorded.progress.say(f"the student: {who_loads(expressible(self.model.network.config, phase.arch))}")

        def validate(step: int) -> None:
            student = self._network(distiller.weights(averaged=True), phase.arch)
            self.recorded.validate(partial(validation.look, student, phase.arch), step)

        try:
            self.recorded.train(distiller, phase.last, validate)
            return distiller.weights(averaged=phase is self.phases[-1])
        finally:
            distiller.close()

    def _distiller(self, phase: PlannedPhase, weights: Weights | None, start: Snapshot | None) -> Distiller:
        """The phase ready to run: its teacher, and the student as the phase before left it, with more removed."""
        r, first, accelerator = self.request, self.phases[0], self.recorded.accelerator
        teacher = self.model if phase.teacher == first.teacher else _loaded(phase.teacher, r, accelerator)
        samples = samples_of(teacher, self.provider, r.seed, r.random_flip, self.recipe.caption_dropout)
        fits = None
        if start is None and phase.arch.fits:
            fits, said = enough(partial(self._fitter, teacher, samples), phase.arch)
            self.recorded.progress.say(said)
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
        return Distiller(accelerator, teacher.network, student, teacher.graph, phase.arch, *how)

    def _fitter(self, teacher: Model, samples: Sampler, n: int) -> Fitter:
        """Fits what stands in for removed blocks, on `n` training samples that no update sees with the same noise."""
        size = at_a_time(n, teacher.latent, self.request.train_batch_size)
        device = self.recorded.accelerator.device
        drawn = (samples.batch(range(g, g + size), device) for g in range(FIT_FROM, FIT_FROM + n, size))
        return Fitter(teacher.network, teacher.graph, [(b.noisy, b.timesteps, b.condition) for b in drawn])

    def _network(self, weights: Weights, arch: Architecture) -> UNet2DConditionModel:
        """A student with these weights, for inference, apart from the one in training."""
        network = surgery.skeleton(self.model.network.config, arch)
        network.load_state_dict(weights, assign=True)
        return network.eval().requires_grad_(False)

    def _kept(self, weights: Weights, validation: Validation) -> UNet2DConditionModel:
        """The student of these weights, looked at, and saved where there is a run directory."""
        arch, out = self.phases[-1].arch, self.recorded.out
        # laid out as after a reload, by which kernels round; `contiguous()` leaves 1x1 convolutions in channels last
        plain = {name: t.clone(memory_format=torch.contiguous_format) for name, t in weights.items()}
        student = self._network(plain, arch)
        self.recorded.validate_last(partial(validation.look, student, arch))
        if out is not None and self.recorded.accelerator.is_main_process:
            save_student(student, arch, out / "student")
        return student
