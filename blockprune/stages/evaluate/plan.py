"""What an evaluation was asked for, with every gap filled: the model, the protocol, the settings and the judges as values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from blockprune.cost.components import outside_params
from blockprune.errors import UserError
from blockprune.export.runtimes.network import check_runtime
from blockprune.measures.images import Judges
from blockprune.measures.measure import MEASURES, measure, names
from blockprune.model.architecture import Architecture
from blockprune.model.model import Model
from blockprune.model.pretrained import configs_of
from blockprune.model.quantize import check_quantizer, quantized
from blockprune.model.sampling import Protocol, check_schedule, scheduler_name
from blockprune.runs.provenance import fingerprint, made_with
from blockprune.stages import loading
from blockprune.stages.evaluate.inputs import Inputs, inputs_of
from blockprune.stages.evaluate.protocol import FIDS, Rules, Setting, grid, protocol_hash, read_protocol
from blockprune.stages.evaluate.request import EvaluateRequest
from blockprune.stages.evaluate.subject import Subject, laid_out, reference_reader, subject_of
from blockprune.stages.evaluate.teacher import Teacher, check_run, paired_teacher
from blockprune.stages.plan import N_PICTURES
from blockprune.stages.train.finished import Finished

OF_IMG2IMG = ("feature_distance", "clip_score", "input_l1")  # measured where the request names no measures
OF_PROTOCOL = ("n_images", "steps", "cfg_scale", "scheduler")  # what a protocol may set where the request does not


@dataclass(frozen=True)
class EvaluationPlan:
    """What is evaluated and how. `request` has every gap filled; `prompts` holds the prompt of each image.

    `inputs` are what the images are made from, None for text to image. `teacher` is whose images a student's are paired with, None
    where no measure asks for it and where the teacher itself is evaluated.
    """

    request: EvaluateRequest
    rules: Rules
    subject: Subject
    finished: Finished | None
    prompts: Sequence[str]
    judges: Judges
    inputs: Inputs | None = None
    teacher: Teacher | None = None

    @property
    def model(self) -> Model:
        return self.subject.model

    @property
    def n_images(self) -> int:
        return len(self.prompts)

    @property
    def batch_size(self) -> int:
        return self.request.batch_size or 1

    @cached_property
    def settings(self) -> Sequence[Setting]:
        return settings_of(self.request, list(self.finished.places) if self.finished else [None])

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """Everything that must be equal for two runs to be compared, with a hash over it."""
        terms: dict[str, Any] = {"n_images": self.n_images, "seed": self.request.seed, **self.rules.judged()}
        terms |= {**loading.describe(self.judges), "prompts": fingerprint(self.prompts), "latent": list(self.model.latent)}
        terms |= {"device_type": self.model.device.type, "dtype": str(self.model.dtype).removeprefix("torch.")}
        if self.inputs is not None:
            strengths = sorted({*self.request.strength})
            terms |= {"task": self.request.task, "strength": strengths, "inputs": self.inputs.identity()}
        name = self.request.protocol
        return {"name": Path(name).stem if name.endswith(".toml") else name, "hash": protocol_hash(terms), **terms}

    @property
    def asked(self) -> dict[str, Any]:
        """What is compared when the run is opened again."""
        terms: dict[str, Any] = {"identity": self.model.identity, "arch": self.subject.arch.terms}
        terms |= {"protocol": {name: value for name, value in self.protocol.items() if name != "name"}}
        terms |= {"settings": [setting.to_json() for setting in self.settings]}
        terms |= {"runtime": self.request.runtime} if self.request.runtime != "torch" else {}
        terms |= {} if self.teacher is None else {"paired_with": self.teacher.identity}
        return {**self.request.compared(), **terms} | ({"checkpoints": self.finished.digests()} if self.finished else {})

    @property
    def about(self) -> dict[str, Any]:
        """What a reader of the run needs besides."""
        s, pipe = self.subject, self.model.pipe
        resolved = [setting.to_json() | {"scheduler": scheduler_name(pipe, setting.scheduler)} for setting in self.settings]
        return {
            "made_with": made_with(self.model.device),
            "label": self.request.title,
            "model": self.model.name if self.finished else self.request.model,
            "teacher": s.teacher,
            "teacher_id": s.teacher_id,
            "arch": s.arch.terms,
            "graph": s.graph.to_json() if s.graph else None,
            "outside_params": outside_params(configs_of(self.model.pipe)),
            "protocol": self.protocol,
            "settings": resolved,
            "measures": [measure(name).to_json() for name in self.request.measures],
            "pictured_prompts": self.prompts[:N_PICTURES],
        }

    @property
    def warnings(self) -> Iterator[str]:
        if self.inputs is not None and self.inputs.skipped:
            skipped = self.inputs.skipped
            yield f"{len(skipped)} images of {self.request.data!r} cannot be read, such as {skipped[0]!r}: others take their places"
        detector = self.judges.detector
        if detector and "fid" in self.request.measures and self.n_images < detector.n_features:
            yield (
                f"FID of {self.n_images} images with {detector.n_features} features: biased upwards; compare it at equal n only, "
                f"and take at least {detector.n_features} images for a number to publish"
            )

    def arch(self, setting: Setting) -> Architecture:
        """What the network of a setting lacks."""
        at = setting.checkpoint
        return self.finished.archs[at] if self.finished and at is not None else self.subject.arch

    def masked(self, setting: Setting) -> Architecture:
        """What the model's own network is without while it runs a setting."""
        return self.arch(setting) if self.finished else self.subject.masked

    def network(self, setting: Setting) -> UNet2DConditionModel:
        """The network of a setting: the model's own, a checkpoint, or a copy of one of these in 8 bits."""
        network, model = self.model.network, self.model
        if self.finished and setting.checkpoint is not None:
            network = self.finished.unet(setting.checkpoint, self.subject.configs.unet, model.device, model.dtype)
        return quantized(network, setting.quantize) if setting.quantize else network


def settings_of(request: EvaluateRequest, places: Sequence[int | None]) -> Sequence[Setting]:
    """The settings of a filled request; `places` are the checkpoints, None for the model itself."""
    quantize = ["" if name == "none" else name for name in request.quantize]
    return grid(request.steps, request.cfg_scale, request.scheduler or ("",), quantize, places, request.strength or (None,))


def filled(request: EvaluateRequest, rules: Rules, defaults: Mapping[str, Any]) -> EvaluateRequest:
    """The request with the protocol's values, then the model's `defaults`, where it leaves them open."""
    of_protocol = {name: value for name in OF_PROTOCOL if (value := getattr(rules, name)) not in (None, "")}
    measures = request.measures or (OF_IMG2IMG if request.task == "img2img" else rules.measures)
    return replace(request, measures=measures).filled({**defaults, **of_protocol})


def plan_of(request: EvaluateRequest, pipe: DiffusionPipeline | None = None) -> EvaluationPlan:
    """The plan of a request for the model that it names, or for `pipe`. UserError for what cannot be."""
    rules = read_protocol(request.protocol)
    _check_measures(filled(request, rules, {}), rules)
    check_runtime(request.runtime)
    for name in request.quantize:
        if name != "none":
            check_quantizer(name)
    finished = Finished.of(Path(request.checkpoints)) if request.checkpoints else None
    reference, prompts_file = laid_out(rules, request.reference, request.prompts)
    resolution = request.resolution or rules.resolution or None
    subject = subject_of(request, resolution, finished, pipe)
    request = filled(request, rules, subject.model.defaults)
    n_images = request.n_images or 0
    _check_count(n_images, request, rules)
    _check_schedules(n_images, request, subject.model)
    inputs = _inputs(n_images, request, subject.model)
    if inputs is not None and request.prompts is None:
        prompts = inputs.prompts()
    else:
        prompts = _prompts(prompts_file, subject.model, n_images, rules)
    judges = _judges(request, rules, subject.model, reference)
    return _paired(EvaluationPlan(request, rules, subject, finished, prompts, judges, inputs), resolution)


def _paired(plan: EvaluationPlan, resolution: str | None) -> EvaluationPlan:
    """The plan with the teacher where a measure compares with its images."""
    request = plan.request
    plain = request.runtime == "torch" and all(setting == setting.of_teacher for setting in plan.settings)
    if not any(measure(name).paired for name in request.measures):
        if request.teacher:
            raise UserError("--teacher is for a measure that compares with its images: add feature_distance to --measures")
        return plan
    if plain and not plan.subject.arch and not request.teacher:  # the teacher itself, which its own images are paired with
        return plan
    teacher = paired_teacher(request, plan.subject, resolution, plan.finished is not None)
    if teacher.run is not None:
        check_run(teacher.run, plan.protocol, plan.settings, plan.rules.suffix)
    return replace(plan, teacher=teacher)


def _inputs(n_images: int, request: EvaluateRequest, model: Model) -> Inputs | None:
    """What is edited; None for text to image."""
    if request.data is None:
        return None
    if model.family.img2img is None:
        raise UserError(
            f"the models of the family {model.family.name!r}, such as {model.name!r}, have no img2img pipeline: leave out --task"
        )
    for steps, strength in product(request.steps, request.strength):
        if int(steps * strength) < 1:  # as diffusers counts
            raise UserError(
                f"--strength {strength:g} of --steps {steps} leaves no denoising step: give at least 1/{steps}, or more steps"
            )
    return inputs_of(request.data, n_images, model)


def _check_measures(request: EvaluateRequest, rules: Rules) -> None:
    known = [name for name in names("images") if request.task == "img2img" or "input" not in MEASURES[name].needs]
    for name in request.measures:
        if name not in known:
            raise UserError(f"evaluate does not measure {name!r}: choose from {', '.join(known)}")
    wanted, detector = FIDS[rules.fid], request.detector
    if detector and (detector == FIDS["legacy_pytorch"]) != (rules.fid == "legacy_pytorch"):
        raise UserError(
            f"the protocol's FID is of the kind {rules.fid!r}, for which the detector is {wanted!r}: got {detector!r}; "
            "leave out --detector, or copy the protocol and change its fid"
        )


def _check_count(n_images: int, request: EvaluateRequest, rules: Rules) -> None:
    if n_images < 2 and {"fid", "kid"} & {*request.measures}:
        raise UserError(f"FID and KID need at least 2 images: got --n-images {n_images}; leave them out of --measures")
    if "is" in request.measures and n_images < rules.is_splits:
        raise UserError(
            f"the protocol's Inception Score is over {rules.is_splits} splits, which need as many images: got {n_images}"
        )


def _check_schedules(n_images: int, request: EvaluateRequest, model: Model) -> None:
    for setting in grid(request.steps, request.cfg_scale, request.scheduler or ("",)):
        check_schedule(
            model.pipe, Protocol(n_images, setting.steps, setting.cfg_scale, request.seed, model.latent, setting.scheduler)
        )


def _prompts(file: str | None, model: Model, n_images: int, rules: Rules) -> list[str]:
    """The prompt of each image."""
    prompts = loading.prompts_of(file, model)
    if not rules.cycle_prompts and len(prompts) < n_images:
        raise UserError(
            f"the protocol takes a prompt of its own for each of {n_images:,} images: got {len(prompts):,} prompts; "
            "give --prompts with enough, or a smaller --n-images"
        )
    return [prompts[i % len(prompts)] for i in range(n_images)]


def _judges(request: EvaluateRequest, rules: Rules, model: Model, reference: str | None) -> Judges:
    """Whom the measures need, and nobody else: what no measure asks for is not loaded."""
    needs = {need for name in request.measures for need in measure(name).needs}
    detects, scores = "detector" in needs, "scorer" in needs
    idle = (*(() if detects else ("detector", "reference")), *(() if scores else ("clip",)))
    judges = loading.judges_of(
        replace(model, defaults={name: value for name, value in model.defaults.items() if name not in idle}),
        detector=(FIDS["legacy_pytorch"] if rules.fid == "legacy_pytorch" else request.detector) if detects else None,
        weights=request.inception_weights if detects else None,
        clip=(request.clip or rules.clip or None) if scores else None,
        reference=reference if "reference" in needs else None,
        read=reference_reader(rules),
    )
    judges = loading.with_subject(judges, model, request) if "subject" in needs else judges
    judges = replace(judges, is_splits=rules.is_splits, inputs=request.task == "img2img").with_own(request.measures)
    judges.check(request.measures)
    if "classes" in needs and judges.detector is not None:
        _, probs = judges.detector.features_and_probs(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        if probs is None:
            raise UserError(f"the Inception Score needs a detector with classes: {judges.detector.name!r} has none")
    return judges
