"""Values: how a student is trained. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from blockprune.assets import ASSETS
from blockprune.decode import read_named_toml
from blockprune.errors import UserError

RECIPES = ASSETS / "recipes"
TAPS = ("stages", "layers")


class Phase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stretch of training: `steps` optimiser steps against a teacher; None means as before, or as the command says."""

    steps: Annotated[int, Meta(ge=1, le=10**9)] | None = None
    teacher: str | None = None
    arch: str | None = None


@dataclass(frozen=True)
class Recipe:
    """Weights of the losses, where features are compared, and the optimiser's settings; `phases` in their order.

    loss = task * L_task + output * L_output + feature * sum over taps L_feature (arXiv 2305.15798, eq. 4).
    """

    task: float = 1.0
    output: float = 1.0
    feature: float = 1.0
    taps: str | tuple[str, ...] = "stages"
    normalise_taps: bool = False
    self_attention: bool = False
    caption_dropout: float = 0.0
    min_snr_gamma: float = 0.0
    initialise: str = "teacher"
    learning_rate: float = 5e-5
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    phases: tuple[Phase, ...] = (Phase(),)

    def __post_init__(self) -> None:
        for name in ("task", "output", "feature", "caption_dropout", "min_snr_gamma", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"recipe: {name} must not be negative, and finite: got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"recipe: {name} must be above 0, and finite: got {getattr(self, name)}")
        if self.task + self.output + self.feature == 0:
            raise UserError("recipe: all losses have weight 0: give at least one of task, output and feature a weight")
        if isinstance(self.taps, str) and self.taps not in TAPS:
            raise UserError(f"recipe: taps must be {', '.join(TAPS)} or a list of module paths: got {self.taps!r}")
        if self.initialise not in ("teacher", "random"):
            raise UserError(f"recipe: initialise must be teacher or random: got {self.initialise!r}")
        if self.caption_dropout > 1:
            raise UserError(f"recipe: caption_dropout is a share between 0 and 1: got {self.caption_dropout}")
        if not self.phases:
            raise UserError("recipe: phases is empty: leave it out for a single phase")

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"phases": [msgspec.structs.asdict(phase) for phase in self.phases]}


def read_recipe(text: str) -> Recipe:
    """The recipe of that name, or of a TOML file; UserError for a file that is not one, and for keys it may not have."""
    return read_named_toml("recipe", RECIPES, text, Recipe)
