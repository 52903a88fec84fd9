"""What an evaluation was asked for: the model, the protocol, the settings and the judges as values."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from blockprune.cli import measuring, options
from blockprune.cli.trained import Trained
from blockprune.cost.components import pipeline_costs
from blockprune.errors import UserError
from blockprune.measures.images import NEEDS, STATISTICS, Judges, check_judges
from blockprune.model import pretrained
from blockprune.model.architecture import Architecture
from blockprune.model.quantize import check_quantizer, quantized
from blockprune.model.sampling import Protocol, check_schedule, scheduler_name
from blockprune.stages import inputs
from blockprune.stages.evaluate.protocol import FIDS, Rules, Setting, grid, protocol_hash
from blockprune.stages.inputs import Subject

UNJUDGED = ("feature_distance",)  # needs the teacher's own images


class Job:
    """What was asked: the model, the protocol with every gap filled, the settings, the judges. UserError for what cannot be."""

    def __init__(self, opts: Mapping[str, Any], rules: Rules) -> None:
        self.opts, self.rules = opts, rules
        for name in opts["quantize"]:
            if name:
                check_quantizer(name)
        self.trained = Trained.of(opts["checkpoints"]) if opts["checkpoints"] else None
        self.measures = self._measures()
        self.reference, self.prompts_file = inputs.laid_out(rules, opts["reference"], opts["prompts"])
        self._check_detector()
        for steps, cfg, name in itertools.product(opts["steps"] or [1], opts["cfg_scale"] or [1.0], opts["scheduler"] or [""]):
            Protocol(1 if opts["n_images"] is None else opts["n_images"], steps, cfg, opts["seed"], (1, 1), name)
        self.subject = self._subject()
        self.n_images: int = _first(opts["n_images"], rules.n_images, self.subject.defaults["n_images"])
        if self.n_images < 2 and {"fid", "kid"} & {*self.measures}:
            raise UserError(f"FID and KID need at least 2 images: got --n-images {self.n_images}; leave them out of --measures")
        if "is" in self.measures and self.n_images < rules.is_splits:
            raise UserError(
                f"the protocol's Inception Score is over {rules.is_splits} splits, which need as many images: got {self.n_images}"
            )
        for setting in self.settings:
            drawn = Protocol(self.n_images, setting.steps, setting.cfg_scale, opts["seed"], self.subject.latent, setting.scheduler)
            check_schedule(self.subject.pipe, drawn)
        self.batch_size = options.at_least("--batch-size", _first(opts["batch_size"], self.subject.defaults["batch_size"]), 1)
        self.prompts = self._prompts()
        self.judges = self._judges()

    def _measures(self) -> list[str]:
        asked = self.opts["measures"]
        names: list[str] = [*self.rules.measures] if asked is None else [n.strip() for n in asked.split(",")]
        known = [name for name in STATISTICS if name not in UNJUDGED]
        for name in names:
            if name not in known:
                raise UserError(f"evaluate does not measure {name!r}: choose from {', '.join(known)}")
        return names

    def _check_detector(self) -> None:
        wanted, given = FIDS[self.rules.fid], self.opts["detector"]
        if given and (given == FIDS["legacy_pytorch"]) != (self.rules.fid == "legacy_pytorch"):
            raise UserError(
                f"the protocol's FID is of the kind {self.rules.fid!r}, for which the detector is {wanted!r}: got {given!r}; "
                "leave out --detector, or copy the protocol and change its fid"
            )

    def _subject(self) -> Subject:
        opts, trained = self.opts, self.trained
        place = options.device_of(opts["device"]), options.dtype_of(opts["dtype"])
        resolution = opts["resolution"] or self.rules.resolution or None
        if trained is None:
            return inputs.load_subject(opts["model"] or "tiny-digits", opts["arch"], resolution, *place)
        if opts["arch"] != "full":
            raise UserError("--checkpoints says what is removed: leave out --arch")
        model = opts["model"] or trained.teacher
        if pretrained.identity(model) != trained.teacher_id:
            raise UserError(f"{model!r} is not the teacher of the run in {str(trained.folder)!r}: give that as --model")
        whole = inputs.load_subject(model, "full", resolution, *place)
        arch = trained.archs[max(trained.places)]
        return replace(whole, arch=arch, teacher=model, teacher_id=whole.identity)

    def _prompts(self) -> list[str]:
        """The prompt of each image."""
        found = inputs.prompts_of(self.prompts_file, self.subject)
        if not self.rules.cycle_prompts and len(found) < self.n_images:
            raise UserError(
                f"the protocol takes a prompt of its own for each of {self.n_images:,} images: got {len(found):,} prompts; "
                "give --prompts with enough, or a smaller --n-images"
            )
        return [found[i % len(found)] for i in range(self.n_images)]

    def _judges(self) -> Judges:
        opts, needs = self.opts, {NEEDS[name] for name in self.measures}
        detector = FIDS["legacy_pytorch"] if self.rules.fid == "legacy_pytorch" else opts["detector"]
        clip = _first(opts["clip"], self.rules.clip or None, self.subject.defaults.get("clip"))
        if not needs & {"detector", "reference"}:
            judges = Judges(scorer=inputs.judges_of(self.without_defaults, None, None, clip, None).scorer)
        else:
            subject = self.subject if "scorer" in needs else replace(self.subject, defaults=_less(self.subject.defaults, "clip"))
            read = inputs.reference_reader(self.rules)
            wanted = self.reference if "reference" in needs else None
            judges = inputs.judges_of(
                subject, detector, opts["inception_weights"], clip if "scorer" in needs else None, wanted, read
            )
        judges = replace(judges, is_splits=self.rules.is_splits)
        check_judges(self.measures, judges)
        if "is" in self.measures and judges.detector is not None:
            look = judges.look(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [""])
            if "probs" not in look:
                raise UserError(f"the Inception Score needs a detector with classes: {judges.detector.name!r} has none")
        return judges

    @property
    def without_defaults(self) -> Subject:
        return replace(self.subject, defaults=_less(self.subject.defaults, *inputs.PATHS))

    @cached_property
    def settings(self) -> Sequence[Setting]:
        opts, rules, own = self.opts, self.rules, self.subject.defaults
        steps = opts["steps"] or [_first(rules.steps, own["steps"])]
        cfg = opts["cfg_scale"] or [float(_first(rules.cfg_scale, own["cfg_scale"]))]
        places: Sequence[int | None] = list(self.trained.places) if self.trained else [None]
        return grid(steps, cfg, opts["scheduler"] or [rules.scheduler], opts["quantize"], places)

    @cached_property
    def protocol(self) -> dict[str, Any]:
        """Everything that must be equal for two runs to be compared, with a hash over it."""
        pipe = self.subject.pipe
        terms: dict[str, Any] = {"n_images": self.n_images, "seed": self.opts["seed"], **self.rules.judged()}
        terms |= {**inputs.describe(self.judges), "prompts": inputs.fingerprint(self.prompts)}
        terms |= {"latent": list(self.subject.latent), "device_type": pipe.device.type, "dtype": self.opts["dtype"]}
        name = self.opts["protocol"]
        return {"name": Path(name).stem if name.endswith(".toml") else name, "hash": protocol_hash(terms), **terms}

    @cached_property
    def asked(self) -> dict[str, Any]:
        terms = {name: value for name, value in self.protocol.items() if name != "name"}
        asked: dict[str, Any] = {
            "identity": self.subject.identity,
            "arch": list(self.subject.arch),
            "protocol": terms,
            "measures": self.measures,
        }
        asked |= {"settings": [setting.to_json() for setting in self.settings]}
        return asked | ({"checkpoints": self.trained.digests()} if self.trained else {})

    @cached_property
    def note(self) -> dict[str, Any]:
        """What the run records beside the request."""
        s, pipe = self.subject, self.subject.pipe
        n = min(measuring.N_PICTURES, self.n_images)
        resolved = [setting.to_json() | {"scheduler": scheduler_name(pipe, setting.scheduler)} for setting in self.settings]
        return {
            "made_with": inputs.made_with(pipe.device),
            "label": self.label,
            "model": self.opts["model"] or s.name,
            "teacher": s.teacher,
            "teacher_id": s.teacher_id,
            "arch": list(s.arch),
            "graph": s.graph.to_json() if s.graph else None,
            "outside_params": sum(c.params for c in pipeline_costs(s.configs, s.latent).values()),
            "protocol": self.protocol,
            "settings": resolved,
            "pictured_prompts": self.prompts[:n],
        }

    @cached_property
    def label(self) -> str:
        opts, folder = self.opts, Path(self.subject.name)
        if opts["label"]:
            return str(opts["label"])
        if self.trained:
            return self.trained.folder.resolve().name
        name = (folder.resolve().parent if folder.name == "pipeline" else folder).name
        arch = Path(opts["arch"]).stem if opts["arch"].endswith(".json") else opts["arch"]
        return f"{name} without {arch}" if opts["arch"] not in ("", "full") else name

    @property
    def folder(self) -> Path:
        return Path(self.opts["out"] or options.default_out("evaluate", self.label))

    @property
    def warnings(self) -> Iterator[str]:
        detector = self.judges.detector
        if detector and "fid" in self.measures and self.n_images < detector.n_features:
            yield (
                f"FID of {self.n_images} images with {detector.n_features} features: biased upwards; compare it at equal n only, "
                f"and take at least {detector.n_features} images for a number to publish"
            )

    def arch(self, setting: Setting) -> Architecture:
        return self.trained.archs[setting.checkpoint] if self.trained and setting.checkpoint is not None else self.subject.arch

    def unet(self, setting: Setting) -> Any:
        """The U-Net of a setting."""
        pipe, trained = self.subject.pipe, self.trained
        unet = self.own_unet
        if trained and setting.checkpoint is not None:
            unet = trained.unet(setting.checkpoint, self.subject.configs.unet, pipe.device, unet.dtype)
        return quantized(unet, setting.quantize) if setting.quantize else unet

    @cached_property
    def own_unet(self) -> Any:
        return self.subject.pipe.unet


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next(value for value in values if value is not None) if any(v is not None for v in values) else None


def _less(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
