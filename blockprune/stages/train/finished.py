"""The checkpoints of a distillation, for a stage that looks at them along training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from diffusers import UNet2DConditionModel

from blockprune.errors import UserError, first_line
from blockprune.export import pipeline
from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.model.config_schema import Config
from blockprune.runs.directory import read_run
from blockprune.runs.schema import PhaseRecord, TrainedRun
from blockprune.stages.train.checkpoints import MANIFEST, file_digest, read_weights, snapshot_folders


@dataclass(frozen=True)
class Finished:
    """Where the weights of a run are by optimiser step, the final student last, and what is removed at each."""

    folder: Path
    teacher: str
    teacher_id: str
    places: Mapping[int, Path]
    archs: Mapping[int, Architecture]

    @classmethod
    def of(cls, folder: Path) -> Finished:
        """UserError when `folder` is no distillation, or has nothing to look at yet."""
        if (run_json := read_run(folder))["command"] != "distill":
            raise UserError(
                f"--checkpoints takes the run directory of a distillation: {str(folder)!r} holds a run of {run_json['command']!r}"
            )
        asked = msgspec.convert(read_run(folder, TrainedRun), TrainedRun).asked
        phases = asked.phases
        places = snapshot_folders(folder / "checkpoints")
        if (folder / "student" / pipeline.ARCHITECTURE).is_file():
            places[phases[-1].last] = folder / "student"
        if not places:
            raise UserError(f"{str(folder)!r} has no checkpoint yet: wait for its first, or lower its --checkpointing-steps")
        archs = {step: Architecture(frozenset(_phase(phases, step).arch)) for step in places}
        return cls(folder, asked.teacher_model, asked.teacher, dict(sorted(places.items())), archs)

    def digests(self) -> dict[str, str]:
        """What each place holds, in a few characters."""
        return {str(step): _digest(place) for step, place in self.places.items()}

    def unet(self, step: int, config: Config, device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
        """The student at that step: its averaged weights where there are any."""
        place = self.places[step]
        if place.name == "student":
            return pipeline.load_student(place).to(device, dtype).requires_grad_(False)
        try:
            weights = read_weights(place)
            unet = surgery.skeleton(config, self.archs[step])
            unet.load_state_dict(weights, assign=True)
        except (UserError, ValueError, RuntimeError) as err:
            raise UserError(f"the checkpoint {str(place)!r} cannot be used ({first_line(err)}): remove it") from None
        return unet.to(device, dtype).requires_grad_(False)


def _phase(phases: Sequence[PhaseRecord], step: int) -> PhaseRecord:
    return next((p for p in phases if p.first < step <= p.last), phases[-1])


def _digest(place: Path) -> str:
    return file_digest(place / (pipeline.WEIGHTS if place.name == "student" else MANIFEST))[:12]
