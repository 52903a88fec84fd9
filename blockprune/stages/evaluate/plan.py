"""What an evaluation was asked for, with every gap filled: the model, the protocol, the settings and the judges as values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
from blockprune.stages.evaluate.protocol import FIDS, Rules, Setting, grid, protocol_hash, read_protocol
from blockprune.stages.evaluate.request import EvaluateRequest
from blockprune.stages.evaluate.subject import Subject, laid_out, reference_reader, subject_of
from blockprune.stages.plan import N_PICTURES
from blockprune.stages.train.finished import Finished

OF_PROTOCOL = ("n_images", "steps", "cfg_scale", "scheduler")  # what a protocol may set where the request does not


@dataclass(frozen=True)
class EvaluationPlan:
    """What is evaluated and how. `request` has every gap filled; `prompts` holds the prompt of each image."""

    request: EvaluateRequest
    rules: Rules
    subject: Subject
    finished: Finished | None
    prompts: Sequence[str]
    judges: Judges

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
        request = self.request
        places: Sequence[int | None] = list(self.finished.places) if self.finished else [None]
        quantize = ["" if name == "none" else name for name in request.quantize]
        return grid(request.steps, request.cfg_scale, request.scheduler or ("",), quantize, places)

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """Everything that must be equal for two runs to be compared, with a hash over it."""
        terms: dict[str, Any] = {"n_images": self.n_images, "seed": self.request.seed, **self.rules.judged()}
        terms |= {**loading.describe(self.judges), "prompts": fingerprint(self.prompts), "latent": list(self.model.latent)}
        terms |= {"device_type": self.model.device.type, "dtype": str(self.model.dtype).removeprefix("torch.")}
        name = self.request.protocol
        return {"name": Path(name).stem if name.endswith(".toml") else name, "hash": protocol_hash(terms), **terms}

    @property
    def asked(self) -> dict[str, Any]:
        """What is compared when the run is opened again."""
        terms: dict[str, Any] = {"identity": self.model.identity, "arch": self.subject.arch.terms}
        terms |= {"protocol": {name: value for name, value in self.protocol.items() if name != "name"}}
        terms |= {"settings": [setting.to_json() for setting in self.settings]}
        terms |= {"runtime": self.request.runtime} if self.request.runtime != "torch" else {}
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

    def network(self, setting: Setting) -> UNet2DConditionModel:
        """The network of a setting: the model's own, a checkpoint, or a copy of one of these in 8 bits."""
        network, model = self.model.network, self.model
        if self.finished and setting.checkpoint is not None:
            network = self.finished.unet(setting.checkpoint, self.subject.configs.unet, model.device, model.dtype)
        return quantized(network, setting.quantize) if setting.quantize else network


def plan_of(request: EvaluateRequest, pipe: DiffusionPipeline | None = None) -> EvaluationPlan:
    """The plan of a request for the model that it names, or for `pipe`. UserError for what cannot be."""
    rules = read_protocol(request.protocol)
    request = replace(request, measures=request.measures or rules.measures)
    _check_measures(request, rules)
    check_runtime(request.runtime)
    for name in request.quantize:
        if name != "none":
            check_quantizer(name)
    finished = Finished.of(Path(request.checkpoints)) if request.checkpoints else None
    reference, prompts_file = laid_out(rules, request.reference, request.prompts)
    subject = subject_of(request, request.resolution or rules.resolution or None, finished, pipe)
    of_protocol = {name: value for name in OF_PROTOCOL if (value := getattr(rules, name)) not in (None, "")}
    request = request.filled({**subject.model.defaults, **of_protocol})
    n_images = request.n_images or 0
    _check_count(n_images, request, rules)
    _check_schedules(n_images, request, subject.model)
    prompts = _prompts(prompts_file, subject.model, n_images, rules)
    return EvaluationPlan(request, rules, subject, finished, prompts, _judges(request, rules, subject.model, reference))


def _check_measures(request: EvaluateRequest, rules: Rules) -> None:
    known = [name for name in names("images") if not MEASURES[name].paired]  # paired ones need the teacher's own images
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
    judges = replace(judges, is_splits=rules.is_splits).with_own(request.measures)
    judges.check(request.measures)
    if "classes" in needs and judges.detector is not None:
        _, probs = judges.detector.features_and_probs(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
        if probs is None:
            raise UserError(f"the Inception Score needs a detector with classes: {judges.detector.name!r} has none")
    return judges
