"""A small evaluation of the built-in model, for tests: its options, and what a run has scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from blockprune.measures import detectors
from blockprune.runs import directory

N = 6
QUICK = ["--n-images", str(N), "--steps", "2", "--batch-size", "2"]
SLUG = "cfg-3-2-steps"


def scores(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(setting, measure) => its row; each must be there once."""
    rows = [r for r in directory.read_rows(folder) if r["kind"] == "score"]
    found = {(r["setting"], r["measure"]): r for r in rows}
    assert len(found) == len(rows)
    return found


def values(folder: Path) -> dict[tuple[str, str], tuple[Any, ...]]:
    return {key: (r["value"], r["low"], r["high"], r["n"]) for key, r in scores(folder).items()}


def teacher_config() -> dict[str, Any]:
    """The configuration of the built-in U-Net."""
    return json.loads((detectors.BUILT_IN / "unet" / "config.json").read_text())
