"""Processes that share a scan: every row once, by whomever, also when some are killed; and images go where ranks are open."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_scan import ARCHS, PLAN, scanned

from blockprune.errors import UserError
from blockprune.measures.images import Judges
from blockprune.measures.intervals import mean_statistic, paired_interval
from blockprune.measures.measure import MEASURES, Measure
from blockprune.measures.runner import Plan
from blockprune.measures.score import Score
from blockprune.model.model import Model, of_pipeline
from blockprune.progress import Silent
from blockprune.runs.directory import Run, read_rows
from blockprune.runs.memory import MemoryRun
from blockprune.stages import workers
from blockprune.stages.scan.racing import Race, rounds_of
from blockprune.stages.scan.request import ScanRequest
from blockprune.stages.scan.run import scan
from blockprune.stages.scan.scan import Scan
from blockprune.stages.scan.share import Share

LOOK = {"compute": lambda seen, *_: mean_statistic(seen["mine"]), "look": lambda images, prompts: bright(images)}
MINE = Measure("mine", "", "up", "mine", "images", **LOOK)
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")  # these processes have no other threads at work


def bright(images: Any) -> np.ndarray:
    return np.asarray(images.double().mean((1, 2, 3)))


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], Path]) -> Model:
    from blockprune.model.pretrained import load

    return of_pipeline(load(str(tiny_folder("sd1"))))


@pytest.fixture(autouse=True)
def plan(monkeypatch: pytest.MonkeyPatch) -> Plan:
    """What is measured here: a measure of each kind, one of them of this module's own."""
    monkeypatch.setitem(MEASURES, "mine", MINE)
    return replace(PLAN, measures=["params", "eps_mse", "mine"], judges=Judges(own=(MINE,)))


class Noting(Run):
    """A run that notes beside it every part that is kept."""

    def write(self, name: str, content: str | bytes) -> Path:
        path = super().write(name, content)
        if name.startswith("parts/"):
            with (self.path.parent / "parts.log").open("a", encoding="utf-8") as log:
                log.write(f"{name}\n")
        return path


class Dying(Noting):
    """One whose process is killed just before it keeps its second part, while it holds a claim."""

    n_parts = 0

    def write(self, name: str, content: str | bytes) -> Path:
        self.n_parts += name.startswith("parts/")
        if self.n_parts == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().write(name, content)


def process(kind: type[Run], model: Model, plan: Plan, folder: Path) -> int:
    """A process that takes part in a scan; its id."""
    if pid := os.fork():
        return pid
    try:
        with kind(folder, "scan", {}, {}, shared=True) as run:
            Share(Scan(model, ARCHS, plan), run, Silent()).work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def numbers(rows: list[Score]) -> dict[tuple[str, str], tuple[float, ...]]:
    """What each row says; every row is there once."""
    found = {(r.label, r.measure): (r.value or 0.0, r.low or 0.0, r.high or 0.0, r.delta or 0.0, float(r.n)) for r in rows}
    assert len(found) == len(rows)
    return found


@pytest.mark.parametrize("killed", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_processes_share_a_scan_and_take_over_from_the_dead(model: Model, plan: Plan, tmp_path: Path, killed: int) -> None:
    """No batch is done twice, and the rows are those of a single process: the same arithmetic, so within rounding."""
    alone = numbers(scanned(model, ARCHS, plan))
    doomed = [process(Dying, model, plan, tmp_path / "run") for _ in range(killed)]
    assert [exit_code(pid) for pid in doomed] == [-signal.SIGKILL] * killed
    others = [process(Noting, model, plan, tmp_path / "run") for _ in range(2)]
    assert [exit_code(pid) for pid in others] == [0, 0]
    kept = (tmp_path / "parts.log").read_text(encoding="utf-8").split()
    assert sorted(kept) == sorted(str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").glob("parts/*/*.safetensors"))
    together = numbers([Score.from_json(row) for row in read_rows(tmp_path / "run", "scan")])
    assert together.keys() == alone.keys()
    for key, values in alone.items():
        assert together[key] == pytest.approx(values, rel=1e-5, abs=1e-9), key


def race(of: Mapping[str, np.ndarray], n: int) -> Race:
    """A race over values that are known beforehand."""
    found = Race(of, rounds_of(n), 0)
    while found.open:
        found.end_round({label: mean_statistic(values[: found.wanted[label]]) for label, values in of.items()})
    return found


def test_a_race_gives_images_to_those_that_are_not_told_apart() -> None:
    noise = np.random.default_rng(0).normal(size=(8, 64))
    of = {f"mask {i}": 10 * i + noise[i] for i in range(8)}
    of["mask 1"] = of["mask 0"] + np.resize([1.0, -1.0], 64)  # on average just as good
    wanted = race(of, 64).wanted
    assert {label for label, n in wanted.items() if n == 64} == {"mask 0", "mask 1"}
    assert {n for label, n in wanted.items() if label > "mask 1"} == {8}
    assert 2 * sum(wanted.values()) <= 8 * 64


@pytest.mark.parametrize("n", [8, 20, 64])
@pytest.mark.parametrize("spread", [0, 0.3, 2])
def test_only_what_is_clear_of_its_neighbours_is_stopped(spread: float, n: int) -> None:
    """Whoever got no more images was then beyond the paired intervals to both of its neighbours in the ranking."""
    draw = np.random.default_rng(n)
    of = {str(i): spread * i + draw.normal(size=n) for i in range(6)}
    found = Race(of, rounds_of(n), 0)
    while found.open:
        wanted, running = dict(found.wanted), set(found.open)
        found.end_round({label: mean_statistic(values[: wanted[label]]) for label, values in of.items()})
        order = sorted(of, key=lambda label: of[label][: wanted[label]].mean())
        for pair in pairwise(order):
            stopped = {label for label in pair if label in running and found.wanted[label] == wanted[label] < n}
            one, other = (mean_statistic(of[label]) for label in pair)
            low, high = paired_interval(one, other, min(wanted[label] for label in pair), 0) or (0.0, 0.0)
            assert not stopped or not low <= 0 <= high


def test_a_raced_scan_draws_and_scores_what_the_race_says(model: Model, plan: Plan) -> None:
    plan = replace(plan, measures=["mine"], protocol=replace(PLAN.protocol, n_images=16), batch_size=4)
    run, uniform = MemoryRun("scan", {}, {}), MemoryRun("scan", {}, {})
    share = Share(Scan(model, ARCHS, plan), run, Silent(), racing="mine")
    share.work()
    rows = {row["label"]: Score.from_json(row) for row in run.rows()}
    assert len(rows) == len(run.rows()) == 1 + len(ARCHS)
    alone = Share(Scan(model, ARCHS, plan), uniform, Silent())
    alone.work()
    of = {label: alone.images_of(label).seen()["mine"] for label in ARCHS}
    wanted = race(of, 16).wanted
    assert {label: rows[label].n for label in ARCHS} == wanted
    assert len(share.images_of("full").seen()["mine"]) == 16
    for label in ARCHS:
        assert len(share.images_of(label).seen()["mine"]) == wanted[label]
        assert rows[label].value == pytest.approx(of[label][: wanted[label]].mean(), rel=1e-5)
    again = list(run.rows())
    Share(Scan(model, ARCHS, plan), run, Silent(), racing="mine").work()
    assert run.rows() == again


def test_each_worker_takes_a_gpu_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "device_of", str)
    monkeypatch.setattr(workers, "load_model", lambda name, resolution, device, dtype: device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    on = {device: [workers.own_model(ScanRequest(workers=3, device=device), i) for i in range(3)] for device in ("cuda", "cuda:1")}
    assert on == {"cuda": ["cuda:0", "cuda:1", "cuda:0"], "cuda:1": ["cuda:1"] * 3}


def test_workers_need_a_place_to_meet_and_measures_that_they_know(model: Model, tmp_path: Path) -> None:
    request = ScanRequest(workers=2, measures=("eps_mse",), n_images=2, steps=1)
    with pytest.raises(UserError, match="--workers needs a run directory where they meet"):
        scan(model, request, None, Silent())
    with pytest.raises(UserError, match="--workers does not know the measure 'mine'"):
        scan(model, replace(request, measures=("mine",)), tmp_path / "run", Silent())
    assert not (tmp_path / "run").exists()
