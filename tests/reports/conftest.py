"""A synthetic scan of a small U-Net: with a failed removal, and markup in a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_rows
import tiny
from diffusers import UNet2DConditionModel

from blockprune.cli import main
from blockprune.measures.runner import with_ratio
from blockprune.measures.score import TEACHER
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.model.trace import trace
from blockprune.reports.view import ScanView

HOSTILE = "a $\\frac$ [bold]seven[/bold] | <b>&amp;</b>\n数字 " + "very long " * 12

FEW = ["--n-images", "4", "--steps", "2", "--batch-size", "4"]
SCORED = [*FEW, "--eps-samples", "4"]
REMOVALS = ["--arch", "mid_block", "--arch", "down_blocks.0.resnets.1", "--arch", "up_blocks.1.attentions.1"]
QUICK = ["--trials", "12", "--finalists", "1", "--final-factor", "1", "--score-fit", "none", "--allow", "prompt-deaf"]
TRAINED = ["--max-train-steps", "2", "--checkpointing-steps", "1", "--train-batch-size", "2", "--n-images", "4", "--steps", "2"]
JUDGED = ["evaluate", *FEW, "--protocol", "clean"]
PARTS = ["--components", "--rounds", "3"]
# what a user does one after another: each name is a folder that later commands may read
COMMANDS = {
    "scan": ["scan", *SCORED, *REMOVALS, "--measures", "eps_mse,fid,clip_score"],
    "search": ["search", *SCORED, *QUICK, "--unit", "stage", "--budget", "80%params", "--objective", "guided_mse"],
    "distill": ["distill", "--arch", "{runs}/search/best.json", *TRAINED, "--data", "digits"],
    "teacher": [*JUDGED, "--label", "tiny-digits", *PARTS],
    "design": [*JUDGED, "--arch", "mid-removed", "--label", "mid-removed", *PARTS],
    "evaluate": [*JUDGED, "--model", "{runs}/distill/pipeline", "--label", "found", "--cfg-scale", "3,2", *PARTS],
    "checkpoints": [*JUDGED, "--checkpoints", "{runs}/distill", "--label", "found"],
}


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A miniature run of every command on the built-in model, the later ones of what the earlier ones found and made."""
    folder = tmp_path_factory.mktemp("real")
    for name, words in COMMANDS.items():
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            if name == "search":
                tiny.drifting_clock(patch)
            main([*(word.format(runs=folder) for word in words), "--out", str(folder / name)])
        assert not ended.value.code, name
    return {name: folder / name for name in COMMANDS}


@pytest.fixture(scope="module")
def graph() -> BlockGraph:
    """Two stages with attention, one of them two transformer layers deep, and an innermost stage to remove."""
    small: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
        "transformer_layers_per_block": (1, 2, 1),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    return trace(UNet2DConditionModel(**small).config, n_tokens=8)


@pytest.fixture(scope="module")
def make(graph: BlockGraph) -> Callable[..., ScanView]:
    """(unit, measures) => a scan whose quality loss grows along the forward order; the third removal failed."""

    def view(unit: str = "block", measures: tuple[str, ...] = ("eps_mse", "fid", "clip_score", "latency")) -> ScanView:
        archs = {TEACHER: Architecture(), **graph.units(unit)}
        rng = np.random.default_rng(0)
        scores, images = [], {}
        for i, (label, arch) in enumerate(archs.items()):
            drift = 0.0 if label == TEACHER else 3e-3 * 1.26**i
            scores += report_rows.scores(graph, arch, label, drift, measures, "the images are\nnot <finite>" if i == 3 else "")
            images[label] = rng.integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
        protocol = {
            "model": "tiny|model",
            "unit": unit,
            "measures": with_ratio(measures),
            "n_images": 64,
            "machine": {"cpu": "2 cores"},
        }
        return ScanView(protocol, graph, archs, scores, images, [HOSTILE, "two", "three"])

    return view
