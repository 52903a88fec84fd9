"""A scan of three removals of a tiny model, of a few images: what it measures, and its rows."""

from __future__ import annotations

from collections.abc import Mapping

import tiny

from blockprune.measures.runner import Plan
from blockprune.measures.score import Score
from blockprune.model.architecture import Architecture
from blockprune.model.model import Model
from blockprune.model.sampling import Protocol
from blockprune.model.trace import trace
from blockprune.progress import Silent
from blockprune.runs.memory import MemoryRun
from blockprune.stages.scan.scan import Scan
from blockprune.stages.scan.share import Share

PLAN = Plan(
    measures=["params", "macs", "eps_mse", "guided_mse", "fid", "is", "clip_score", "feature_distance", "kid"],
    protocol=Protocol(n_images=5, n_steps=2, cfg_scale=3.0, seed=1, latent=(8, 8)),
    prompts=["a cat", "two dogs", "a kite"],
    n_noisy=7,
    batch_size=2,
    n_pictures=3,
)
GRAPH = trace(tiny.config("sd1"), (8, 8), tiny.N_TOKENS)
ARCHS = {label: arch for label, arch in GRAPH.units("stage").items() if label in ("mid_block", "up_blocks.3", "innermost")}


def scanned(model: Model, archs: Mapping[str, Architecture], plan: Plan, run: MemoryRun | None = None) -> list[Score]:
    """The rows of a scan, one that goes on where the run is given."""
    run = MemoryRun("scan", {}, {}) if run is None else run
    Share(Scan(model, archs, plan), run, Silent()).work()
    return [Score.from_json(row) for row in run.rows()]
