"""Values: how a student is trained. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from blockprune.errors import UserError
from blockprune.named import read_named

RECIPES = Path(__file__).parent / "recipes"
TAPS = ("stages", "layers")


@dataclass(frozen=True)
class Phase:
    """A stretch of training: `steps` optimiser steps against a teacher; None means as before, or as the command says."""

    steps: int | None = None
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
            if getattr(self, name) < 0:
                raise UserError(f"recipe: {name} must not be negative: got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm"):
            if getattr(self, name) <= 0:
                raise UserError(f"recipe: {name} must be above 0: got {getattr(self, name)}")
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
        return asdict(self)


def read_recipe(text: str) -> Recipe:
    """The recipe of that name, or of a TOML file; UserError for a file that is not one, and for keys it may not have."""
    path, data = read_named("recipe", RECIPES, text)
    phases = data.pop("phases", [{}])
    if not isinstance(phases, list) or not all(isinstance(p, dict) for p in phases):
        raise UserError(f"recipe {str(path)!r}: write each phase as a [[phases]] table")
    built = tuple(Phase(**_known(p, Phase, f"{path}: phases")) for p in phases)
    values = _known(data, Recipe, str(path))
    if isinstance(values.get("taps"), list):
        values["taps"] = tuple(values["taps"])
    return Recipe(**values, phases=built)


def _known(data: Mapping[str, Any], kind: type[Recipe] | type[Phase], where: str) -> dict[str, Any]:
    """The values, of keys and types that the class has."""
    defaults: Any = kind()
    names = {f.name for f in fields(kind)} - {"phases"}
    if unknown := sorted(data.keys() - names):
        raise UserError(f"recipe {where}: unknown key {unknown[0]!r}: it may have {', '.join(sorted(names))}")
    for name, value in data.items():
        if not _same_type(value, getattr(defaults, name), name):
            raise UserError(f"recipe {where}: {name} has the wrong type: got {value!r}")
    return dict(data)


def _same_type(value: object, default: object, name: str) -> bool:
    if name == "taps":
        return isinstance(value, str) or (isinstance(value, Sequence) and all(isinstance(v, str) for v in value))
    if name in ("teacher", "arch", "initialise"):
        return isinstance(value, str)
    if isinstance(default, bool):
        return isinstance(value, bool)
    if name == "steps":
        return isinstance(value, int) and not isinstance(value, bool) and value > 0
    return isinstance(value, int | float) and not isinstance(value, bool)
