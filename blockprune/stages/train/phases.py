"""The phases of a recipe as they will run: which teacher, what is removed, from which update to which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from blockprune.errors import UserError
from blockprune.model import presets
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.stages.train.recipe import Phase, Recipe
from blockprune.stages.train.request import TrainRequest


@dataclass(frozen=True)
class PlannedPhase:
    """Updates `first` to `last`, exclusive, against one teacher, of a student without the blocks of `arch`."""

    teacher: str
    arch: Architecture
    first: int
    last: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"arch": self.arch.terms}


def planned(recipe: Recipe, request: TrainRequest, graph: BlockGraph) -> list[PlannedPhase]:
    """The phases with their teachers, architectures and updates filled in; each may remove more than the one before, not less."""
    phases = _phases(recipe, request.teacher)
    teacher, arch, first = request.teacher[0], Architecture(), 0
    found: list[PlannedPhase] = []
    for i, (phase, n_steps) in enumerate(zip(phases, _shares(phases, request.max_train_steps), strict=True), 1):
        text = request.arch if phase.arch is None or i == len(phases) else phase.arch
        wanted = presets.parse(text or "full", graph)
        wanted = graph.fitted(wanted, request.fit) if request.fit else wanted
        if not arch <= wanted:
            raise UserError(f"phase {i} puts back {', '.join(arch - wanted)}: a phase may only remove more than the one before")
        teacher, arch = phase.teacher or teacher, wanted
        found.append(PlannedPhase(teacher, arch, first, first + n_steps))
        first += n_steps
    return found


def _phases(recipe: Recipe, teachers: Sequence[str]) -> Sequence[Phase]:
    """The recipe's phases, or one for each of several teachers."""
    if len(teachers) == 1:
        return recipe.phases
    if len(recipe.phases) > 1:
        raise UserError("several --teacher and a recipe with phases: name the teachers in the recipe's phases")
    return [Phase(None, name, None) for name in teachers]


def _shares(phases: Sequence[Phase], n_steps: int) -> list[int]:
    """The updates of each phase; those that do not say share what is left, the last of them with the rest."""
    given = sum(p.steps or 0 for p in phases)
    open_ended = [i for i, p in enumerate(phases) if p.steps is None]
    left = n_steps - given
    if left < len(open_ended) or (left and not open_ended):
        raise UserError(
            f"--max-train-steps {n_steps} does not match the recipe's phases: {given} steps are given there, "
            f"{len(open_ended)} phases share the rest"
        )
    each, rest = divmod(left, len(open_ended)) if open_ended else (0, 0)
    return [p.steps or each + (rest if i == open_ended[-1] else 0) for i, p in enumerate(phases)]
