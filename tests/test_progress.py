"""Progress over stages: each with its own unit and speed, the last ones known from the start."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import blockprune as bp
from blockprune.progress import FILES, Bars, Silent
from blockprune.results import EvaluateResult, PersonaliseResult, ScanResult, SearchResult, TrainResult


class Clock:
    """A clock that is set by hand, in seconds."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bars(clock: Clock) -> Iterator[Bars]:
    """Progress into a file, 40 samples, 2 timings and three times 4 images to come."""
    with Bars(Console(file=io.StringIO(), width=200), clock=clock) as made:
        made.plan({"eps_mse": 40}, "samples")
        made.plan({"latency": 2}, "timings")
        made.plan(dict.fromkeys("abc", 4), "images", "images")
        yield made


def lines(bars: Bars) -> list[str]:
    assert isinstance(bars.console.file, io.StringIO)
    return bars.console.file.getvalue().splitlines()


def test_every_stage_has_its_own_unit_and_speed(bars: Bars, clock: Clock) -> None:
    """What is quick first says nothing of how long the slow rest will take; that has its size until its speed is known."""
    clock.now = 4.0
    bars.tick("eps_mse", 40)
    clock.now = 64.0
    bars.tick("latency", 1)
    clock.now = 124.0
    bars.tick("latency", 1)
    clock.now = 134.0
    bars.tick("a", 4)
    assert lines(bars) == [
        "[1/5] eps_mse: 40 samples, 10 samples/s, 0:00:00 left, then 2 timings, 12 images",
        "[2/5] latency: 2 timings, 0.0167 timings/s, 0:00:00 left, then 12 images",
        "[3/5] a: 4 images, 0.4 images/s, 0:00:20 left",
    ]


def test_a_step_that_was_left_counts_as_ended(bars: Bars, clock: Clock) -> None:
    for step, n in (("a", 1), ("b", 4), ("c", 4)):
        clock.now += 2.0 * n
        bars.tick(step, n)
    assert [line.partition(",")[0] for line in lines(bars)] == ["[2/5] b: 4 images", "[3/5] c: 4 images"]
    assert bars.stages["images"].size == bars.stages["images"].done == 9


def test_what_is_planned_again_has_that_much_left(bars: Bars, clock: Clock) -> None:
    bars.tick("latency", 2)
    bars.plan({"latency": 3}, "timings")
    bars.plan({"c": 8}, "images", "images")
    assert bars.stages["latency"].size == 5
    assert bars.stages["images"].size == 16


def test_what_was_not_announced_is_added(bars: Bars) -> None:
    bars.tick("strips", 3)
    assert lines(bars)[0].startswith("[1/6] strips: 3 images, ")


def test_a_terminal_has_a_bar_for_each_stage_from_the_start(clock: Clock) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None, legacy_windows=False)
    with Bars(console, clock=clock) as bars:
        bars.plan({"search": 20}, "architectures")
        bars.plan({"random": 0}, "architectures")
        bars.plan({"latency": 5}, "timings")
        bars.plan(dict.fromkeys(("one", "two"), 8), "images", "images")
        for _ in range(3):
            clock.now += 10.0
            bars.tick("search", 5)
        assert bars._bars is not None
        bars._bars.refresh()
        shown = {task.description: (task.completed, task.total, task.visible) for task in bars._bars.tasks}
    assert shown == {
        "search": (15, 20, True),
        "random": (0, 1, False),
        "latency": (0, 5, True),
        "images": (0, 16, True),
    }
    assert "15/20 architectures" in out.getvalue()
    assert "0/5 timings" in out.getvalue()
    assert "0/0" not in out.getvalue()
    assert "0.5 architectures/s" in out.getvalue()


def test_files_are_shown_last_and_bars_last_until_they_are_written(clock: Clock) -> None:
    """Announced first, as those of a stage are that has not begun; the stage enters and leaves the same bars."""
    out = io.StringIO()
    with Bars(Console(file=out, force_terminal=True, width=120, color_system=None, legacy_windows=False), clock=clock) as bars:
        bars.plan({FILES: 3}, FILES)
        with bars:
            bars.plan({"search": 20}, "architectures")
            bars.tick("search", 20)
        assert bars._bars is not None and bars._bars.live.is_started
        bars.tick(FILES, 2)
        bars.plan({FILES: 0}, FILES)
        bars._bars.refresh()
        assert [task.description for task in bars._bars.tasks] == [FILES, "search"]
    assert not bars._bars.live.is_started
    shown = out.getvalue()
    assert shown.rindex("20/20 architectures") < shown.rindex("2/2 files")


class Counted(Silent):
    """Holds the work against what was announced."""

    def __init__(self, n_files: int) -> None:
        self.left: dict[str, int] = {FILES: n_files}
        self.ticks: dict[str, int] = {}

    def plan(self, steps: Mapping[str, int], unit: str = "images", stage: str = "") -> None:
        self.left |= steps

    def tick(self, step: str, n: int) -> None:
        self.left[step] -= n
        self.ticks[step] = self.ticks.get(step, 0) + n


SMALL: dict[str, Any] = {"n_images": 4, "steps": 1, "batch_size": 4}
SCAN: dict[str, Any] = {**SMALL, "arch": ["mid_block"], "eps_samples": 8, "measures": ["eps_mse", "clip_score", "latency"]}
SEARCH: dict[str, Any] = {"unit": "stage", "eps_samples": 8, "budget": "75%params", "trials": 4, "objective": "feature_distance"}
EVALUATE: dict[str, Any] = {**SMALL, "cfg_scale": [2, 3], "measures": ["clip_score"], "latency": True, "rounds": 3}
TRAIN: dict[str, Any] = {"steps": 2, "train_batch_size": 2, "n_images": 2, "denoising_steps": 1}
WEIGHTS = {"pipeline", "lora"}  # folders that are announced as one file


@pytest.mark.usefixtures("drifting_clock")
@pytest.mark.parametrize(
    ("run", "result", "asked", "at_most"),
    [
        (bp.scan, ScanResult, SCAN, set()),
        pytest.param(
            bp.search,
            SearchResult,
            {**SMALL, **SEARCH, "finalists": 1, "final_factor": 2},
            {"captions", "finalists", "latency", "images"},
            marks=pytest.mark.slow,
        ),
        (bp.evaluate, EvaluateResult, EVALUATE, set()),
        (bp.distill, TrainResult, {**TRAIN, "arch": "mid-removed", "n_images": 4}, set()),
        pytest.param(
            bp.personalise,
            PersonaliseResult,
            {**TRAIN, "instance_prompt": "bold upright: sks top left", "rank": 2},
            set(),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_all_that_a_run_does_was_announced(
    run: Callable[..., Any], result: Any, asked: dict[str, Any], at_most: set[str], subject: Path, tmp_path: Path
) -> None:
    """From the teacher's first images to the last figure; but for what shows only as a search goes on, and the figures, all of it
    is done."""
    counted = Counted(result.n_files)
    asked = {**asked, "instance_data_dir": subject} if run is bp.personalise else asked
    run(progress=counted, **asked).save(tmp_path, counted)
    assert all(left == 0 or (left > 0 and step in at_most) for step, left in counted.left.items()), counted.left
    assert counted.ticks[FILES] == len([path for path in tmp_path.iterdir() if path.is_file() or path.name in WEIGHTS])
    assert counted.ticks[FILES] <= result.n_files
