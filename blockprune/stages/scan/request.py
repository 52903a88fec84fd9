"""What a scan is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from blockprune.model.architecture import FITS
from blockprune.model.graph import UNITS
from blockprune.request import option
from blockprune.stages.fields import MEASURES, REMOVE, Measuring, OnModel


@dataclass(frozen=True, kw_only=True)
class ScanRequest(OnModel, Measuring):
    """Which removals to score, by which measures."""

    unit: str | None = option(None, "what to remove one by one; block where no --arch is given", REMOVE, choices=UNITS)
    arch: tuple[str, ...] = option((), "an architecture to score: preset, block names or JSON file; repeatable", REMOVE)
    fit: tuple[str, ...] = option(
        ("none",),
        f"what stands in for what is removed, each scored: none, {', '.join(FITS)} (fitted in closed form); comma-separated",
        REMOVE,
        commas=True,
        choices=("none", *FITS),
    )
    measures: tuple[str, ...] = option((), "comma-separated; all that have what they need when left out", MEASURES, commas=True)
