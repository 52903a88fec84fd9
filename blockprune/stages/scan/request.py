"""What a scan is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from blockprune.errors import UserError
from blockprune.measures.measure import measure, of_drawings
from blockprune.model.architecture import FITS
from blockprune.model.graph import UNITS
from blockprune.request import option
from blockprune.stages.fields import MEASURES, REMOVE, SAMPLING, Measuring, Shared


@dataclass(frozen=True, kw_only=True)
class ScanRequest(Shared, Measuring):
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
    racing: str | None = option(
        None, "give no more images to a removal whose rank by this measure is clear, such as feature_distance", SAMPLING
    )
    by_timestep: bool = option(False, "also the denoising errors of each removal by timestep", MEASURES, compared=False)

    def check(self) -> None:
        if self.racing is not None:
            self._check_racing(self.racing)
        if self.base is not None and self.arch:
            raise UserError(f"--base {self.base} and --arch {self.arch[0]}: give one of them")
        if self.by_timestep and self.measures and not {"eps_mse", "guided_mse"} & set(self.measures):
            raise UserError(
                f"--by-timestep shows eps_mse and guided_mse: got --measures {','.join(self.measures)}; add one of them"
            )

    def _check_racing(self, name: str) -> None:
        if measure(name).kind != "images" or measure(name).biased:
            fair = [m for m in of_drawings() if measure(m).kind == "images" and not measure(m).biased]
            raise UserError(f"--racing cannot go by {name}: choose from {', '.join(fair)}")
        if biased := [m for m in self.measures if measure(m).biased]:
            why = "is biased by the number of images, which --racing makes differ"
            raise UserError(f"measure {biased[0]!r} {why}: leave one of them out")
