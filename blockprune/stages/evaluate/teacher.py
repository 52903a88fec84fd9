"""The teacher that a student's images are paired with: it draws them in the student's run, or has done so in a run of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blockprune.errors import UserError
from blockprune.model.defaults import BUILT_IN
from blockprune.model.device import device_of
from blockprune.model.identity import identity
from blockprune.model.model import Model, load_model
from blockprune.model.pretrained import ALIASES
from blockprune.runs.directory import Stored, differences
from blockprune.runs.series import Series
from blockprune.stages.evaluate.protocol import Setting
from blockprune.stages.evaluate.request import EvaluateRequest
from blockprune.stages.evaluate.subject import Subject

ALIKE = "evaluate the teacher by the same command, or leave out --teacher"


@dataclass(frozen=True)
class Teacher:
    """Whose images those of a student are held against, at the same settings, prompts, inputs and seeds.

    `identity` is its content id. `run` is an evaluation that has its images; without one, the model that `load` gives draws them.
    """

    identity: str
    load: Callable[[], Model]
    run: Stored | None = None


def paired_teacher(request: EvaluateRequest, subject: Subject, resolution: str | None, along_training: bool) -> Teacher:
    """The teacher of a student, by what `--teacher` says or what the student knows; UserError where it cannot be paired."""
    model, given = subject.model, request.teacher
    known = subject.teacher_id or ("" if subject.arch else model.identity)
    if given and os.path.isfile(Path(given, "run.json")):
        return _of_run(Stored(Path(given)), known)
    if subject.masked or along_training or not subject.arch:  # the model at hand is the teacher
        if given and identity(given) != model.identity:
            raise UserError(f"--teacher {given!r} is not the model that is evaluated: leave it out")
        return Teacher(model.identity, lambda: model)
    name = given or subject.teacher
    if not name or not (name in (*BUILT_IN, *ALIASES) or os.path.exists(name)):
        is_called = f"is called {name!r}, which is not here" if name else "is not known"
        raise UserError(f"the teacher of {model.name!r} {is_called}, and feature_distance is to its images: give --teacher DIR")
    if known and identity(name) != known:
        raise UserError(f"{name!r} is not the teacher of {model.name!r}, which has the identity {known}: give that as --teacher")
    return Teacher(known or identity(name), partial(_loaded, name, resolution, request, subject))


def _loaded(name: str, resolution: str | None, request: EvaluateRequest, subject: Subject) -> Model:
    model = load_model(name, resolution, device_of(request.device), getattr(torch, request.dtype))
    if (model.latent, model.pixels) != (subject.model.latent, subject.model.pixels):
        sizes = [f"{height}x{width}" for height, width in (model.pixels, subject.model.pixels)]
        raise UserError(f"the teacher {name!r} draws {sizes[0]} pixels, its student {sizes[1]}: give --resolution")
    return model


def _of_run(run: Stored, known: str) -> Teacher:
    """The teacher that another evaluation was about."""
    if run.command != "evaluate":
        raise UserError(f"--teacher {str(run.path)!r} holds a {run.command!r} run: give a model, or an evaluate run of it")
    about = run.about
    if about["arch"]:
        raise UserError(f"--teacher {str(run.path)!r} is about a student, {about['label']!r}: give an evaluate run of the teacher")
    of_run = str(about["asked"].get("identity"))
    if known and of_run != known:
        raise UserError(f"--teacher {str(run.path)!r} is about another model ({of_run}, not {known}): give a run of the teacher")

    def no_model() -> Model:
        raise AssertionError("its images are there already")

    return Teacher(of_run, no_model, run)


def check_run(run: Stored, protocol: Mapping[str, Any], settings: Sequence[Setting], suffix: str) -> None:
    """Raises UserError for an evaluation of the teacher whose images cannot be paired with those of this one."""
    if why := next(_unpaired(run, protocol, settings, suffix), ""):
        raise UserError(f"--teacher {str(run.path)!r} {why}: {ALIKE}")


def _unpaired(run: Stored, protocol: Mapping[str, Any], settings: Sequence[Setting], suffix: str) -> Iterator[str]:
    held, asked = ({k: v for k, v in p.items() if k not in ("name", "hash")} for p in (run.about["protocol"], protocol))
    if changes := list(differences(held, asked)):
        yield f"was evaluated differently ({'; '.join(changes)})"
    if "runtime" in run.about["asked"]:
        yield f"was computed by {run.about['asked']['runtime']}"
    there = {setting["label"] for setting in run.about["settings"]}
    for label in dict.fromkeys(setting.of_teacher.label for setting in settings):
        if label not in there:
            yield f"has no setting {label!r}"
        series = Series(run, label, protocol["n_images"], suffix)
        if series.missing() or series.file(0) is None:
            yield f"has not all its images at {label!r}"
