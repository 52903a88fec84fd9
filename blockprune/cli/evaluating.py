"""How an evaluation runs: what was asked as values, one process's share of the images, scores once all images are seen."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from blockprune import checkpoints, workbench
from blockprune.arch import Architecture
from blockprune.cli import console, measuring, options, outputs, timing
from blockprune.cli.trained import Trained
from blockprune.errors import UserError
from blockprune.evaluate import Drawn, Evaluator, in_order
from blockprune.imaging import NEEDS, STATISTICS, Judges, check_judges, failed, judge
from blockprune.latency import weight_bytes
from blockprune.pricing import pipeline_costs
from blockprune.protocol import FIDS, Rules, Setting, grid, protocol_hash, read_protocol
from blockprune.quantize import check_quantizer, quantized
from blockprune.records import Score
from blockprune.sampling import NotFinite, Protocol, scheduler_name
from blockprune.store import Claims, Run
from blockprune.workbench import Subject

POLL_S = 0.3
UNJUDGED = ("feature_distance",)  # needs the teacher's own images


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


class Job:
    """What was asked: the model, the protocol with every gap filled, the settings, the judges. UserError for what cannot be."""

    def __init__(self, opts: Mapping[str, Any], rules: Rules) -> None:
        self.opts, self.rules = opts, rules
        for name in opts["quantize"]:
            if name:
                check_quantizer(name)
        self.trained = Trained.of(opts["checkpoints"]) if opts["checkpoints"] else None
        self.measures = self._measures()
        self.reference, self.prompts_file = workbench.laid_out(rules, opts["reference"], opts["prompts"])
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
        self.batch_size = options.at_least("--batch-size", _first(opts["batch_size"], self.subject.defaults["batch_size"]), 1)
        self.prompts = self._prompts()
        self.judges = self._judges()

    def _measures(self) -> list[str]:
        asked = self.opts["measures"]
        names: list[str] = [*self.rules.measures] if asked is None else [n.strip() for n in asked.split(",") if n.strip()]
        known = [name for name in STATISTICS if name not in UNJUDGED]
        for name in names:
            if name not in known:
                raise UserError(f"evaluate does not measure {name!r}: choose from {', '.join(known)}")
        if not names:
            raise UserError(f"--measures is empty: choose from {', '.join(known)}")
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
            return workbench.load_subject(opts["model"] or "tiny-digits", opts["arch"], resolution, *place)
        if opts["arch"] != "full":
            raise UserError("--checkpoints says what is removed: leave out --arch")
        model = opts["model"] or trained.teacher
        if checkpoints.identity(model) != trained.teacher_id:
            raise UserError(f"{model!r} is not the teacher of the run in {str(trained.folder)!r}: give that as --model")
        whole = workbench.load_subject(model, "full", resolution, *place)
        arch = trained.archs[max(trained.places)]
        return replace(whole, arch=arch, teacher=model, teacher_id=whole.identity)

    def _prompts(self) -> list[str]:
        """The prompt of each image."""
        found = workbench.prompts_of(self.prompts_file, self.subject)
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
            judges = Judges(scorer=workbench.judges_of(self.without_defaults, None, None, clip, None).scorer)
        else:
            subject = self.subject if "scorer" in needs else replace(self.subject, defaults=_less(self.subject.defaults, "clip"))
            read = workbench.reference_reader(self.rules)
            wanted = self.reference if "reference" in needs else None
            judges = workbench.judges_of(
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
        return replace(self.subject, defaults=_less(self.subject.defaults, *workbench.PATHS))

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
        terms |= {**workbench.describe(self.judges), "prompts": workbench.fingerprint(self.prompts)}
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
            "made_with": workbench.made_with(pipe.device),
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
        return Path(self.opts["out"] or Path("runs") / f"evaluate-{self.label.replace(' ', '-').replace('/', '-')}")

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
        self.folder, self.left = folder, set(range(n_images))
        self.known: set[Path] = set()

    def paths(self) -> list[Path]:
        return sorted(p for p in self.folder.glob("*.safetensors") if not p.name.startswith("."))

    def missing(self) -> set[int]:
        for path in self.paths():
            if path not in self.known:
                with safe_open(path, framework="np") as file:
                    self.left -= set(file.get_tensor("index").tolist())
                self.known.add(path)
        return self.left


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next(value for value in values if value is not None) if any(v is not None for v in values) else None


def _less(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
