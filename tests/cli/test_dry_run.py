"""`--dry-run`: the passes it counts are those of a real run, it writes nothing, and a stated device needs no weights."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from as_user import pictures
from common_fixtures import Cli
from diffusers import UNet2DConditionModel
from torch.nn.modules.module import register_module_forward_pre_hook

from blockprune.cost import estimate
from blockprune.cost.work import Passes, Work
from blockprune.model import pretrained
from blockprune.model.model import load_model
from blockprune.progress import Silent
from blockprune.stages import outline

DRAWN = ["--n-images", "3", "--steps", "2", "--batch-size", "2"]
SCAN = ["scan", "--arch", "mid_block", "--fit", "none,linear", "--eps-samples", "5", *DRAWN]
SEARCH = [
    "search",
    "--unit",
    "stage",
    "--budget",
    "75%params",
    "--trials",
    "11",
    "--finalists",
    "1",
    "--eps-samples",
    "4",
    *DRAWN,
    "--steps",
    "1",
]
DISTILL = ["distill", "--arch", "mid-removed", "--max-train-steps", "3", "--train-batch-size", "2", "--n-images", "3"]
PERSONALISE = ["personalise", "--instance-prompt", "sks top left", "--max-train-steps", "2", "--n-images", "3", "--steps", "2"]
EVALUATE = ["evaluate", "--arch", "bk-sdm-small", "--n-images", "3", "--batch-size", "2", "--steps", "1,2", "--cfg-scale", "1,3"]
COMMANDS: dict[str, list[str]] = {
    "scan": [*SCAN, "--measures", "eps_mse,guided_mse,clip_score,latency"],
    "distill": [*DISTILL, "--gradient-accumulation-steps", "2", "--validation-steps", "2", "--steps", "2"],
    "evaluate": [*EVALUATE, "--measures", "clip_score,feature_distance", "--latency", "--rounds", "3"],
    "personalise": [*PERSONALISE, "--with-prior-preservation", "--class-prompt", "one top left", "--num-class-images", "3"],
}


@pytest.fixture
def subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str | Path]:
    """The folders of a personalisation; the command runs in an empty one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return ["--instance-data-dir", pictures(tmp_path / "subject", 3), "--class-data-dir", tmp_path / "classes"]


@contextmanager
def passes_counted() -> Iterator[list[int]]:
    """The rows of every pass of a U-Net that computes within this context."""
    rows: list[int] = []

    def count(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, UNet2DConditionModel) and module.device.type != "meta":
            rows.append(1)

    handle = register_module_forward_pre_hook(count)
    try:
        yield rows
    finally:
        handle.remove()


def counted(cli: Cli, *args: str | Path) -> int:
    """The passes that a dry run says there will be."""
    code, out, err = cli(*args, "--dry-run", "--assume", "t4 fp16")
    assert code == 0, err
    found = re.search(r"written; (?:at most )?([\d,]+) passes of the U-Net", out)
    assert found, out
    return int(found[1].replace(",", ""))


@pytest.mark.parametrize(
    "command", ["scan", "distill", *(pytest.param(c, marks=pytest.mark.slow) for c in ("evaluate", "personalise"))]
)
def test_the_passes_are_those_of_a_real_run(command: str, cli: Cli, subject: list[str | Path], tmp_path: Path) -> None:
    args = [*COMMANDS[command], *(subject if command == "personalise" else [])]
    said = counted(cli, *args)
    with passes_counted() as passes:
        code, _, err = cli(*args, "--out", tmp_path / "run")
    assert code == 0, err
    assert len(passes) == said


@pytest.mark.slow
def test_a_search_takes_at_most_what_was_said(cli: Cli, subject: list[str | Path], tmp_path: Path) -> None:
    """Who is looked at for captions, and who stops early, shows only as the search goes on."""
    said = counted(cli, *SEARCH)
    with passes_counted() as passes:
        code, _, err = cli(*SEARCH, "--out", tmp_path / "run")
    assert code == 0, err
    assert 0.7 * said <= len(passes) <= said


def test_nothing_is_written_and_this_device_is_measured(cli: Cli, subject: list[str | Path], tmp_path: Path) -> None:
    for command, args in COMMANDS.items():
        given = [*args, *(subject if command == "personalise" else []), "--dry-run", "--out", tmp_path / "run"]
        code, out, err = cli(*given, *(["--assume", "T4 fp16"] if command != "distill" else []))
        assert code == 0, err
        assert ("measured on this device (cpu, float32)" in out) == (command == "distill")
        assert "memory about" in out
        assert "disk about" in out
    assert {p.name for p in tmp_path.iterdir()} == {"here", "subject"}
    assert not list((tmp_path / "here").iterdir())


def test_a_published_model_needs_no_weights(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "load", lambda *args: pytest.fail("weights were loaded"))
    args = ["scan", "--model", "sd-v1-4", "--unit", "stage", "--measures", "eps_mse", "--eps-samples", "8"]
    code, out, _ = cli(*args, "--dry-run", "--assume", "A100 fp16")
    assert code == 0
    assert "assumed, not measured: A100 fp16 (312 TFLOP/s, 32% of it used" in out


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--dry-run", "--assume", "H10 fp16"], "unknown --assume 'H10 fp16': did you mean H100 fp16? choose from H100 fp16, A100"),
        (["--assume", "H100 fp16"], "--assume H100 fp16 is for an estimate: add --dry-run, or leave it out"),
        (["--dry-run", "--arch", "mid_blok"], "no block 'mid_blok' in this U-Net"),
        (["--dry-run", "--model", "nowhere"], "no model 'nowhere'"),
    ],
)
def test_mistakes_are_one_line(args: list[str], says: str, one_line: Callable[..., str]) -> None:
    assert says in one_line("scan", "--measures", "params", *args)


def test_time_is_multiply_adds_over_what_is_used_of_the_stated_throughput() -> None:
    configs = pretrained.configs("sd-v1-4")
    graph = outline.outline_of("sd-v1-4").graph
    work = Work([Passes("images", 25, 2), Passes("updates", 10, 4, 0.5, learns=True)])
    found = estimate.assumed(work, configs, graph, "A100 fp16")
    macs = 401_636_720_640  # of a pass with attention, see the papers' table
    assert found.seconds == pytest.approx({"images": 50 * macs / (156e12 * 0.32), "updates": 60 * macs / (156e12 * 0.32)})


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str, style: str = "") -> None:
        self.lines.append(text)


def test_long_runs_say_so_as_they_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is surely short is not even measured; what is measured and short says nothing."""
    model, heard = load_model("tiny-digits"), Heard()
    calls: list[int] = []

    def measured(work: Work, *args: object) -> estimate.Estimate:
        calls.append(work.n_passes)
        return estimate.Estimate(work, {"images": float(work.n_passes)}, 0.0, "measured on this device")

    monkeypatch.setattr(outline, "measured", measured)
    for n in (10, 10**5):
        outline.say_how_long(Work([Passes("images", n, 10)]), model, heard)
        monkeypatch.setattr(outline, "LONG_S", 200_000 if n == 10 else 600)
    outline.say_how_long(Work([Passes("images", 10**5, 10)]), model, heard)
    assert calls == [10**5, 10**5]
    assert len(heard.lines) == 1
    assert heard.lines[0].startswith("from its beginning this run takes 100,000 passes of the U-Net")


@pytest.mark.parametrize(("load", "says"), [(1.5, ""), (7.5, " while it was busy: load 7.5 on 2 cores")])
def test_a_measurement_on_a_busy_machine_says_so(load: float, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert estimate._busy(torch.device("cpu")) == says
    assert estimate._busy(torch.device("cuda")) == ""


def test_a_system_that_does_not_tell_its_load_is_not_called_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> tuple[float, float, float]:
        raise OSError("Load averages are unobtainable")

    monkeypatch.setattr(os, "getloadavg", unknown)
    assert estimate._busy(torch.device("cpu")) == ""
