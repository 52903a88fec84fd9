"""The scan stage: complete, paired, resumable at any point, and blind to the batch size."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDPMScheduler
from small_scan import ARCHS, GRAPH, PLAN, scanned
from stand_ins import Eye

from blockprune.errors import UserError
from blockprune.measures.denoising import NoisySamples, denoising_errors
from blockprune.measures.fid_kid import Stats
from blockprune.measures.images import Judges
from blockprune.measures.intervals import Statistic, mean_statistic
from blockprune.measures.measure import MEASURES, Measure
from blockprune.measures.runner import Plan
from blockprune.measures.score import Score
from blockprune.model import surgery
from blockprune.model.architecture import Architecture
from blockprune.model.compare import rounding
from blockprune.model.model import Model, of_pipeline
from blockprune.reports import results, text, view
from blockprune.reports.html import page
from blockprune.reports.report_data import ReportData
from blockprune.reports.table import to_csv
from blockprune.runs.memory import MemoryRun
from blockprune.runs.parts import strip_images
from blockprune.stages.plan import possible
from blockprune.stages.scan.scan import Scan, timings


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[[str], Path]) -> Model:
    from blockprune.model.pretrained import load

    return of_pipeline(load(str(tiny_folder("sd1"))))


@pytest.fixture(scope="module")
def plan() -> Plan:
    real = np.random.default_rng(0).uniform(0, 255, (20, 3))
    return replace(PLAN, judges=Judges(Eye(), Stats.of(real, keep=True), Eye()))


def values(rows: list[Score]) -> dict[tuple[str, str], float | None]:
    return {(r.label, r.measure): r.value for r in rows}


class Killed(MemoryRun):
    """A run whose process dies at its `left`-th change."""

    left = 10**6

    def append(self, row: Mapping[str, Any]) -> None:
        self._count()
        super().append(row)

    def write(self, name: str, content: str | bytes) -> None:
        self._count()
        super().write(name, content)

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole_run(model: Model, plan: Plan) -> MemoryRun:
    run = MemoryRun("scan", {}, {})
    scanned(model, ARCHS, plan, run)
    return run


@pytest.fixture(scope="module")
def whole(whole_run: MemoryRun) -> list[Score]:
    return [Score.from_json(row) for row in whole_run.rows()]


def test_every_row_once_and_the_teacher_first(whole: list[Score], plan: Plan) -> None:
    rows = whole
    wanted = {(label, m) for label in ("full", *ARCHS) for m in plan.measures} - {("full", "eps_mse"), ("full", "guided_mse")}
    assert len(rows) == len(wanted) == len(values(whole))
    assert values(whole).keys() == wanted
    assert rows[0].label == "full"
    by_name = values(whole)
    assert by_name["full", "feature_distance"] == 0
    assert by_name["mid_block", "params"] == GRAPH.cost(ARCHS["mid_block"]).params
    assert all(by_name[label, "feature_distance"] > 0 and by_name[label, "eps_mse"] > 0 for label in ARCHS)
    assert {r.n for r in rows if r.measure == "fid"} == {5}
    assert all(r.delta == 0 for r in rows if r.label == "full" and r.measure in ("fid", "clip_score"))


def test_pictures_are_the_first_images(whole_run: MemoryRun) -> None:
    for arch in (Architecture(), *ARCHS.values()):
        strip = whole_run.read(f"images/{arch.key}.png")
        assert strip is not None and strip_images(strip, 3).shape == (3, 16, 16, 3)


@pytest.mark.parametrize("change", [1, 9, 17, 25, 40])
def test_resumes_anywhere_with_the_same_rows(model: Model, plan: Plan, whole_run: MemoryRun, change: int) -> None:
    run = Killed("scan", {}, {})
    run.left = change
    with pytest.raises(KeyboardInterrupt):
        scanned(model, ARCHS, plan, run)
    run.left = 10**6
    scanned(model, ARCHS, plan, run)
    assert run.rows() == whole_run.rows()
    assert run.files.keys() == whole_run.files.keys()
    assert not scanned(model, ARCHS, plan, run)[len(whole_run.rows()) :]


def test_batch_size_changes_nothing(model: Model, plan: Plan, whole: list[Score]) -> None:
    other = values(scanned(model, ARCHS, replace(plan, batch_size=5)))
    for key, value in values(whole).items():
        assert other[key] == pytest.approx(value, rel=2e-2, abs=1e-6), key


def test_replay_equals_the_plain_way(model: Model) -> None:
    """The root of an error is a distance of two outputs of unit size, so it may be off by the rounding of both."""
    condition = {"encoder_hidden_states": torch.randn(3, tiny.N_TOKENS, 8, generator=torch.Generator().manual_seed(0))}
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    samples = NoisySamples(latents, condition, DDPMScheduler.from_config(model.pipe.scheduler.config), 6, 0)
    archs, tolerance = GRAPH.units("block"), 2 * rounding(model.network, torch.float32)
    for index in ([0, 1, 2, 3], [4, 5]):
        ways = [denoising_errors(model.network, GRAPH, archs, samples, index, replay=replay) for replay in (True, False)]
        fast, plain = ways
        assert fast.keys() == plain.keys() == archs.keys()
        for label in archs:
            np.testing.assert_allclose(np.sqrt(fast[label]), np.sqrt(plain[label]), rtol=0, atol=tolerance, err_msg=label)


def test_the_guided_error_is_that_of_the_guided_prediction(model: Model) -> None:
    draw = torch.Generator().manual_seed(0)
    text, blank = (torch.randn(rows, tiny.N_TOKENS, 8, generator=draw) for rows in (3, 1))
    latents, scale = torch.randn(3, 4, 8, 8, generator=draw), 5.0
    schedule, arch = DDPMScheduler.from_config(model.pipe.scheduler.config), Architecture(frozenset({"mid_block"}))

    def errors(condition: torch.Tensor, **guidance: Any) -> NoisySamples:
        return NoisySamples(latents, {"encoder_hidden_states": condition}, schedule, 3, 0, **guidance)

    guided = errors(text, blank={"encoder_hidden_states": blank}, cfg_scale=scale)
    found = denoising_errors(model.network, GRAPH, {"mid": arch}, guided, range(3))

    @torch.inference_mode()
    def plainly() -> torch.Tensor:
        out = []
        for condition in (blank.expand(3, -1, -1), text):
            x, t, c = errors(condition).batch(range(3), model.network)
            out.append(model.network(x, t, **c, return_dict=False)[0])
        return (1 - scale) * out[0] + scale * out[1]

    teacher = plainly()
    with surgery.removed(model.network, arch):
        masked = plainly()
    expected = (masked - teacher).square().mean((1, 2, 3)).sqrt().double().numpy()
    tolerance = 2 * scale * rounding(model.network, torch.float32)  # guidance magnifies the rounding of both answers
    assert tolerance < expected.min() / 10
    np.testing.assert_allclose(np.sqrt(found["mid"]), expected, rtol=0, atol=tolerance)


def test_a_guided_error_without_guidance_is_refused() -> None:
    with pytest.raises(UserError, match="--cfg-scale 1"):
        replace(PLAN, measures=["guided_mse"], protocol=replace(PLAN.protocol, cfg_scale=1.0))


def test_timesteps_are_stratified() -> None:
    samples = NoisySamples(torch.zeros(1, 4, 8, 8), {}, DDPMScheduler(), 50, 3)
    assert sorted((samples.timesteps // 20).tolist()) == list(range(50))
    assert samples.timesteps.tolist() != sorted(samples.timesteps.tolist())


def test_a_mask_that_gives_nan_is_a_failed_row(model: Model, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.break_mid(monkeypatch)
    rows = scanned(model, ARCHS, plan)
    failed = {r.measure for r in rows if r.value is None}
    assert failed == {"eps_mse", "guided_mse", "fid", "is", "clip_score", "feature_distance", "kid"}
    assert all(r.label == "mid_block" and "not finite" in r.error for r in rows if r.value is None)
    assert len(rows) == 4 * 9 - 2


def test_a_broken_teacher_stops_the_scan(tiny_folder: Callable[[str], Path], plan: Plan) -> None:
    from blockprune.model.pretrained import load

    model = of_pipeline(load(str(tiny_folder("sd1"))))
    model.network.conv_out.bias.fill_(torch.nan)
    with pytest.raises(UserError, match="teacher itself fails"):
        scanned(model, ARCHS, plan)


def test_measures_without_a_judge_are_refused(model: Model) -> None:
    with pytest.raises(UserError, match="--reference"):
        Scan(model, ARCHS, PLAN)


def test_clean_data_needs_no_images(model: Model) -> None:
    plan = replace(PLAN, measures=["eps_mse"], clean=(torch.randn(2, 4, 8, 8), ["a cat", ""]))
    run = MemoryRun("scan", {}, {})
    scanned(model, {"mid": Architecture(frozenset({"mid_block"}))}, plan, run)
    assert sorted(run.files) == [f"parts/eps-mse/{i:06d}.safetensors" for i in (0, 2, 4, 6)]
    assert len(run.rows()) == 1


@pytest.mark.parametrize("asked", ["latency", "latency_ratio"])
def test_a_step_is_timed_in_turn_with_the_teacher(model: Model, monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    tiny.drifting_clock(monkeypatch)
    plan = replace(PLAN, measures=[asked])
    rows = {(r.label, r.measure): r for r in scanned(model, ARCHS, plan)}
    assert rows.keys() == {("full", "latency")} | {(label, "latency_ratio") for label in ARCHS}
    assert rows["full", "latency"].value == pytest.approx(GRAPH.total.params / 10**9)
    for label, arch in ARCHS.items():
        assert rows[label, "latency_ratio"].value == pytest.approx(GRAPH.cost(arch).params / GRAPH.total.params)
    assert not list(timings(model, ARCHS, plan, rows.keys()))


def test_a_measure_added_as_the_guide_says_is_computed_ranked_and_shown(
    model: Model, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (Path(__file__).parents[3] / "reports" / "guide.md").read_text(encoding="utf-8")
    assert "- a **measure**: one `Measure` in `measures/measure.py`" in guide
    added = Measure("bright", "", "up", "brightness", "images", ("detector",), compute=lambda seen, *_: mean(seen["features"]))
    with pytest.raises(UserError, match="nothing computes the measure 'bright'"):
        monkeypatch.setitem(MEASURES, "bright", replace(added, compute=None))
        replace(plan, measures=["bright"])
    monkeypatch.setitem(MEASURES, "bright", added)
    assert "bright" in possible(plan.judges, guided=True)
    assert "bright" not in possible(Judges(), guided=True)
    rows = scanned(model, ARCHS, replace(plan, measures=["bright"]))
    assert [r.label for r in rows] == ["full", *ARCHS]
    assert all(r.value is not None and r.low is not None and r.delta is not None for r in rows)
    shown = view.ScanView({"measures": ["bright"]}, GRAPH, {"full": Architecture(), **ARCHS}, rows, {}, [])
    assert view.ranked(shown) == sorted(ARCHS, key=lambda n: -(shown.value(n, "bright") or 0))
    assert "| bright ↑ |" in text.scan_markdown(shown)
    assert "brightness" in text.scan_markdown(shown)
    assert "bright" in to_csv(view.ranking(shown)).splitlines()[0]
    assert json.loads(text.to_json(shown))["measures"]["bright"]["title"] == "brightness"
    data = ReportData(scans={"scan": shown})
    assert results.flat(results.result_tables(data), "thop")[0]["bright"] == shown.value("full", "bright")
    files = page.report_files(data, "thop")
    assert all("brightness" in content for name, content in files.items() if not name.endswith(".csv"))


def mean(features: np.ndarray) -> Statistic:
    return mean_statistic(features.mean(1))


def test_a_measure_with_its_own_compute_is_one_of_images() -> None:
    with pytest.raises(UserError, match="its kind is 'images', not 'timing'"):
        Measure("mine", "", "up", "mine", "timing", compute=lambda seen, *_: mean(seen["features"]))
