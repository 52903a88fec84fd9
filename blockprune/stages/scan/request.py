"""What a scan is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from blockprune.errors import UserError
from blockprune.model.architecture import FITS
from blockprune.model.graph import UNITS
from blockprune.request import option
from blockprune.stages.fields import MEASURES, REMOVE, Measuring, OnModel


@dataclass(frozen=True, kw_only=True)
class ScanRequest(OnModel, Measuring):
    """Which removals to score, by which measures."""

    unit: str | None = option(None, "what to remove one by one; block where no --arch is given", REMOVE, choices=UNITS)
    arch: tuple[str, ...] = option((), "an architecture to score: preset, block names or JSON file; repeatable", REMOVE)
    base: str | None = option(
        None, "an architecture to scan around: what to remove next, and what is worth most to put back", REMOVE
    )
    fit: tuple[str, ...] = option(
        ("none",),
        f"what stands in for what is removed, each scored: none, {', '.join(FITS)} (fitted in closed form); comma-separated",
        REMOVE,
        commas=True,
        choices=("none", *FITS),
    )
    measures: tuple[str, ...] = option((), "comma-separated; all that have what they need when left out", MEASURES, commas=True)
    by_timestep: bool = option(False, "also the denoising errors of each removal by timestep", MEASURES, compared=False)

    def check(self) -> None:
        if self.base is not None and self.arch:
            raise UserError(f"--base {self.base} and --arch {self.arch[0]}: give one of them")
        if self.by_timestep and self.measures and not {"eps_mse", "guided_mse"} & set(self.measures):
            raise UserError(
                f"--by-timestep shows eps_mse and guided_mse: got --measures {','.join(self.measures)}; add one of them"
            )
