"""Evaluated models, each under one name: however often it was evaluated, its protocols and settings are a choice, not more models.

Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from blockprune.measures.score import Score
from blockprune.model.architecture import Architecture
from blockprune.model.graph import Cost
from blockprune.model.presets import fitting
from blockprune.reports.model_view import ModelView, Setting, TrainingView


@dataclass(frozen=True)
class Reading:
    """One way of judging a model: a protocol, by its hash, and how images are drawn. `n` counts images, None where not recorded."""

    protocol: str
    setting: Setting
    n: int | None

    @property
    def label(self) -> str:
        return f"{self.setting.label}, n = {self.n:,}" if self.n is not None else self.setting.label


@dataclass(frozen=True)
class Model:
    """A model's evaluations by the hash of their protocol. `updates` is what it was trained for, in the run `training`: 0 for a
    student as its teacher left it, None where no run says; `trained_s` are the seconds of these updates. `design` is the preset
    that it is, "" for none."""

    name: str
    views: Mapping[str, ModelView]
    design: str = ""
    training: str = ""
    updates: int | None = None
    trained_s: float | None = None

    @property
    def _first(self) -> ModelView:
        return next(iter(self.views.values()))

    @property
    def arch(self) -> Architecture:
        return self._first.arch

    @property
    def cost(self) -> Cost | None:
        return next((view.cost for view in self.views.values() if view.cost), None)

    @property
    def whole_params(self) -> int | None:
        """Parameters of text encoders, U-Net and VAE decoder."""
        return next((view.whole_params for view in self.views.values() if view.whole_params is not None), None)

    @property
    def priced(self) -> ModelView:
        """The evaluation that says what the model's components cost, else the first."""
        return next((view for view in self.views.values() if view.components), self._first)

    @property
    def kind(self) -> str:
        return "teacher" if not self.arch else "hand" if self.design else "found"

    @property
    def readings(self) -> list[Reading]:
        return [
            Reading(key, setting, view.protocol.get("n_images")) for key, view in self.views.items() for setting in view.settings
        ]

    def score(self, reading: Reading, measure: str) -> Score | None:
        """The score that a reading gives; None when it was not measured, failed, or is not finite."""
        view = self.views.get(reading.protocol)
        score = view.scores.get(reading.setting.label, {}).get(measure) if view else None
        return score if score and score.finite is not None else None

    @property
    def folder(self) -> str:
        """Where a student of its own weights lies; "" for one that is its teacher without blocks, and for the teacher."""
        return self._first.model if self.updates != 0 and self._first.model != self._first.teacher else ""

    @property
    def latency_ratio(self) -> float | None:
        """A U-Net step over the teacher's, not quantised where that was timed."""
        if not self.arch:
            return 1.0
        readings = sorted(self.readings, key=lambda r: bool(r.setting.quantize))
        ratios = (self.views[r.protocol].step_times(r.setting)[1] for r in readings)
        return next((ratio for ratio in ratios if ratio is not None), None)


def models_of(evaluations: Mapping[str, ModelView], trainings: Mapping[str, TrainingView]) -> dict[str, Model]:
    """The models by name, the teacher first, then from the largest to the smallest.

    Evaluations are of one model when label and architecture are the same, and the training or else the folder.
    """
    same: dict[tuple[object, ...], dict[str, ModelView]] = {}
    for name, view in evaluations.items():
        origin = _training(view, trainings) or Path(view.model).parts[-2:]
        same.setdefault((view.label, view.arch, origin), {})[name] = view
    labels = [label for label, _, _ in same]
    models = [
        _model(str(label) if labels.count(label) == 1 else next(iter(runs)), list(runs.values()), trainings)
        for (label, _, _), runs in same.items()
    ]
    return {model.name: model for model in sorted(models, key=_order)}


def _model(name: str, views: Sequence[ModelView], trainings: Mapping[str, TrainingView]) -> Model:
    by_protocol: dict[str, ModelView] = {}
    for view in views:
        key = str(view.protocol.get("hash", ""))
        by_protocol[key] = merged(by_protocol[key], view) if key in by_protocol else view
    first = views[0]
    presets = fitting(first.graph) if first.graph else {}
    design = next((preset for preset, arch in presets.items() if arch == first.arch), "")
    training = _training(first, trainings)
    rows = trainings[training].rows if training else []
    updates = max((row["step"] for row in rows), default=None) if _is_trained(first) else 0
    return Model(name, by_protocol, design, training, updates, sum(row.get("seconds", 0.0) for row in rows) or None)


def merged(first: ModelView, second: ModelView) -> ModelView:
    """Two evaluations of one model under one protocol as one; where both have a number the first one's counts."""
    settings = {s.label: s for s in (*second.settings, *first.settings)}
    order = dict.fromkeys(s.label for s in (*first.settings, *second.settings))
    scores = {label: {**second.scores.get(label, {}), **first.scores.get(label, {})} for label in order}
    return replace(
        first,
        settings=[settings[label] for label in order],
        scores=scores,
        components=first.components or second.components,
        images={**second.images, **first.images},
        teacher_images={**second.teacher_images, **first.teacher_images},
        inputs=first.inputs if first.inputs is not None else second.inputs,
        prompts=first.prompts or second.prompts,
    )


def _is_trained(view: ModelView) -> bool:
    """False for the teacher, and for a student that is its teacher without blocks."""
    return bool(view.arch) and (view.model != view.teacher or any(s.checkpoint is not None for s in view.settings))


def _training(view: ModelView, trainings: Mapping[str, TrainingView]) -> str:
    """The distillation whose folder the model lies in, else the only one of its architecture; "" for none."""
    alike = [name for name, training in trainings.items() if training.arch == view.arch] if _is_trained(view) else []
    inside = [name for name in alike if f"/{name}/" in f"/{view.model}/" or name == view.label]
    return next(iter(inside or (alike if len(alike) == 1 else [])), "")


def _order(model: Model) -> tuple[float, bool, str]:
    """No student is larger than its teacher."""
    size = model.whole_params or (model.cost.params if model.cost else 0)
    return -float(size or (0 if model.arch else math.inf)), bool(model.arch), model.name


def at_own_best(models: Sequence[Model], measure: str) -> list[tuple[Setting, Score]]:
    """The best score of each over the guidance scales at which all were drawn alike; [] where there are less than two of them."""
    scores = [{r: s for r in m.readings if not r.setting.quantize and (s := m.score(r, measure))} for m in models]
    sweeps: dict[tuple[object, ...], list[Reading]] = {}
    for r in scores[0] if scores else ():
        if all(r in of for of in scores):
            sweeps.setdefault((r.protocol, replace(r.setting, label="", cfg_scale=0.0)), []).append(r)
    sweep = max(sweeps.values(), key=len, default=[])
    best = [min(sweep, key=lambda r: of[r].loss) for of in scores] if len(sweep) > 1 else []
    return [(r.setting, of[r]) for r, of in zip(best, scores, strict=False)]


def readings_of(models: Mapping[str, Model]) -> list[Reading]:
    """Every reading, that of most models first, then of most images."""
    counts: dict[Reading, int] = {}
    for model in models.values():
        for reading in dict.fromkeys(model.readings):
            counts[reading] = counts.get(reading, 0) + 1
    return sorted(counts, key=lambda r: (-counts[r], -(r.n or 0)))
