"""An evaluation and a distillation read back, each as one value. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockprune.cost.table import Component
from blockprune.measures.score import Score
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph, Cost

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Setting:
    """How images were drawn: one line of a result table. `quantize` is "" for none, `checkpoint` the step it was taken at,
    `strength` that of an edit."""

    label: str
    steps: int
    cfg_scale: float
    scheduler: str
    quantize: str = ""
    checkpoint: int | None = None
    strength: float | None = None


@dataclass(frozen=True)
class ModelView:
    """What an evaluate directory says about one model.

    `arch` is empty for a teacher; `graph` is the teacher's, None when it is not known; `scores` maps a setting's label to its rows
    by measure; `images` maps it to (k, H, W, 3) uint8 images at fixed seeds, captioned by `prompts`, and `teacher_images` to those
    of the teacher that they are paired with; `inputs` are what these were made from, None for text to image. `protocol["hash"]` is
    equal for runs whose numbers compare. `model` is what was given to be evaluated.
    """

    label: str
    protocol: Mapping[str, Any]
    made_with: Mapping[str, Any]
    teacher: str
    teacher_id: str
    arch: Architecture
    graph: BlockGraph | None
    outside_params: int | None
    settings: Sequence[Setting]
    scores: Mapping[str, Mapping[str, Score]]
    components: Sequence[Component]
    images: Mapping[str, Images]
    prompts: Sequence[str]
    model: str = ""
    teacher_images: Mapping[str, Images] = field(default_factory=dict)
    inputs: Images | None = None

    def value(self, setting: Setting, measure: str) -> float | None:
        """The number; None when it was not measured, failed, or is not finite."""
        score = self.scores.get(setting.label, {}).get(measure)
        return score.finite if score else None

    def teacher_value(self, setting: Setting, measure: str) -> float | None:
        """The number of the teacher's images that a setting's are paired with; None when they were not compared."""
        score = self.scores.get(setting.label, {}).get(measure)
        return score.finite - score.delta if score and score.finite is not None and score.delta is not None else None

    def step_times(self, setting: Setting) -> tuple[float | None, float | None]:
        """(seconds, ratio) of a U-Net step: the teacher's in seconds, all else as the ratio to a teacher timed in turn with it."""
        scores, plain = self.scores.get(setting.label, {}), not setting.quantize and setting.checkpoint is None
        unet = self.part("U-Net x 1")
        if not self.arch and plain:
            return scores["latency"].finite if "latency" in scores else unet.latency_s if unet else None, None
        if "latency_ratio" in scores:
            return None, scores["latency_ratio"].finite
        return None, unet.ratio if unet and plain else None

    def part(self, name: str, who: str = "") -> Component | None:
        """The row of one component, of this model itself unless `who` says teacher; None when it was not recorded."""
        who = who or ("student" if self.arch else "teacher")
        return next((c for c in self.components if c.name == name and c.who == who), None)

    @property
    def cost(self) -> Cost | None:
        """Of the U-Net, from the graph, else as the components were recorded; None when neither is there."""
        if self.graph is not None:
            return self.graph.cost(self.arch)
        unet = self.part("U-Net x 1")
        return Cost(params=unet.params, **unet.macs) if unet else None

    @property
    def whole_params(self) -> int | None:
        """Parameters of text encoders, U-Net and VAE decoder."""
        if (whole := self.part("whole")) is not None:
            return whole.params
        return self.cost.params + self.outside_params if self.cost and self.outside_params is not None else None


@dataclass(frozen=True)
class TrainingView:
    """What a distill directory says: its rows, and images at the last validation, captioned by `prompts` where these are known."""

    protocol: Mapping[str, Any]
    arch: Architecture
    graph: BlockGraph | None
    outside_params: int | None
    rows: Sequence[Mapping[str, Any]]
    images: Mapping[int, Images]
    prompts: Sequence[str]
