"""A small search of the built-in model, for tests: its options, and what a run has scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blockprune.runs import directory

SMALL = ["--n-images", "4", "--steps", "2", "--eps-samples", "4", "--batch-size", "4", "--final-factor", "2", "--finalists", "2"]
BY_ERROR = ["--objective", "guided_mse"]  # which takes no images
N_TRIALS = 16  # ten units alone, the exact solutions, the presets, and what a sampler proposes
QUICK = ["--unit", "stage", "--budget", "75%params", "--trials", str(N_TRIALS), *SMALL, *BY_ERROR]


def scored(folder: Path, kind: str = "search") -> dict[str, Any]:
    """Architecture key => value of everything a run has scored."""
    rows = [row for row in directory.read_rows(folder) if row["kind"] == kind]
    keys = [row["tiers"][-1]["arch"] for row in rows]
    assert len(keys) == len(set(keys))
    return {key: row["tiers"][-1]["value"] for key, row in zip(keys, rows, strict=True)}
