"""A synthetic scan of a small U-Net: with a failed removal, and markup in a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import report_rows
from diffusers import UNet2DConditionModel

from blockprune.measures.runner import with_ratio
from blockprune.measures.score import TEACHER
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.model.trace import trace
from blockprune.reports.view import ScanView

HOSTILE = "a $\\frac$ [bold]seven[/bold] | <b>&amp;</b>\n数字 " + "very long " * 12


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
