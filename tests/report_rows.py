"""Run directories of every kind on a tiny U-Net, without a model behind them: what judges saw and clocks said is made up, the
records are made from that by the functions that the stages use. `reports/test_records.py` holds them against real runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray

from blockprune.cost.latency import Timing
from blockprune.cost.table import components
from blockprune.measures.fid_kid import Stats
from blockprune.measures.images import Judges, failed, judge
from blockprune.measures.measure import measure, names
from blockprune.measures.runner import FULL, error_score, with_ratio
from blockprune.measures.score import Score
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph, Cost
from blockprune.model.trace import trace
from blockprune.runs.directory import Run
from blockprune.runs.parts import keep_picture, strip_png
from blockprune.runs.records import Evaluation, TrainState
from blockprune.stages.evaluate.protocol import Setting
from blockprune.stages.scan.scan import cost_scores, step_scores
from blockprune.stages.search.budget import parse_budget
from blockprune.stages.search.search import Strategy
from blockprune.stages.search.space import Space

HOSTILE = 'a "seven" <script>alert(1)</script> & $\\frac$ </script><b>'
PROMPTS = [HOSTILE, "two", "three"]
TEACHER = "0123456789ab"
MADE = {"python": "3.11", "blockprune": "0.1.0", "torch": "2.9", "diffusers": "0.42", "processor": "a <CPU>, 2 threads"}
STUDENT = ["down_blocks.0.resnets.1", "mid_block"]
PARTS = {"text_encoder": Cost(600, 0, 50, 40, 60), "vae_decoder": Cost(400, 0, 50, 40, 60)}
OUTSIDE = sum(cost.params for cost in PARTS.values())
N = 64


@cache
def graph() -> BlockGraph:
    small: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return trace(UNet2DConditionModel(**small).config, n_tokens=8)


@cache
def judges() -> Judges:
    return Judges(reference=Stats.of(np.random.default_rng(1).normal(size=(200, 3)), keep=True))


def seen(drift: float) -> dict[str, NDArray[Any]]:
    """What judges see of `N` images that are `drift` from the teacher's: features go away from the reference's, and images from
    what their texts say, a little otherwise from one image to the next."""
    draw = np.random.default_rng(0)
    features, angle = 1 + draw.normal(size=(N, 3)), draw.normal(0.8, 0.1, N) + np.arctan(drift)
    if drift:
        other = np.random.default_rng([3, round(1e6 * drift)])
        features, angle = features + other.normal(0, 0.1, (N, 3)), angle + other.normal(0, 0.1, N)
    bright = 1 / (1 + np.exp(-features[:, 0] / (1 + drift)))
    return {
        "features": features + drift * np.array([1.0, 1.1, 0.9]),
        "probs": np.stack([1 - bright, bright], axis=1)[:, None],
        "image": np.stack([np.cos(angle), np.sin(angle)], axis=1),
        "text": np.tile([1.0, 0.0], (N, 1)),
    }


def timings(label: str, ratio: float) -> dict[str, Timing]:
    """Ten rounds of a step of `ratio` times the teacher's, on a machine that slows down."""
    rounds = 0.1 * (1 + 0.1 * np.arange(10))
    return (
        {FULL: Timing(tuple(rounds), 1000), label: Timing(tuple(ratio * rounds), 900)}
        if label != FULL
        else {FULL: Timing(tuple(rounds), 1000)}
    )


def scores(
    of: BlockGraph, arch: Architecture, label: str, drift: float, measures: Sequence[str], error: str = ""
) -> Iterator[Score]:
    """The rows of one architecture whose images are `drift` from the teacher's, or of one whose images failed with `error`."""
    measures = with_ratio(measures)
    yield from (s for s in cost_scores(of, arch, label, 4, 0) if s.measure in measures)
    for m in names("denoising") if label != FULL else ():
        if m in measures:
            errors = np.full(N, np.nan) if error else drift * np.random.default_rng(2).uniform(0.5, 1.5, N)
            yield error_score(m, arch, label, errors, 0)
    ratio = of.cost(arch).params / of.total.params
    yield from (s for s in step_scores(arch, label, timings(label, ratio), 0) if s.measure in measures)
    of_images = [m for m in names("images") if m in measures]
    if error:
        yield from failed(arch.key, label, of_images, N, 0, error)
    elif of_images:
        yield from judge(arch.key, label, of_images, seen(drift), seen(0.0), judges(), 0)


def described(measures: Sequence[str]) -> list[Mapping[str, Any]]:
    return [measure(name).to_json() for name in measures]


def write(
    folder: Path,
    command: str,
    asked: Mapping[str, Any],
    note: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    pictures: Sequence[Architecture | str] = (),
) -> Path:
    """A run directory with those rows, and with images of architectures or under a name, as the commands write one."""
    with Run(folder, command, asked, {"made_with": MADE, **note}) as run:
        for row in rows:
            run.append(row)
        for i, name in enumerate(pictures):
            images = np.random.default_rng(i).integers(0, 255, (len(PROMPTS), 16, 16, 3), dtype=np.uint8)
            if isinstance(name, str):
                run.write(f"images/{name}.png", strip_png(images))
            else:
                keep_picture(run, name, images)
    return folder


def scan(folder: Path, measures: Sequence[str] = ("eps_mse", "fid", "clip_score", "latency"), teacher: str = TEACHER) -> Path:
    """Every block of the tiny U-Net alone; losses grow along the forward order, the images of the fifth failed."""
    archs = {FULL: Architecture(), **graph().units("block")}
    rows = [
        score.to_json()
        for i, (label, arch) in enumerate(archs.items())
        for score in scores(graph(), arch, label, 1e-3 * 1.5**i if i else 0.0, measures)
    ]
    fifth = list(archs)[5]
    for i, row in enumerate(rows):
        if row["label"] == fifth and row["measure"] == "fid":
            (bad,) = failed(archs[fifth].key, fifth, ["fid"], N, 0, "not <finite>")
            rows[i] = bad.to_json()
    asked = {"model": "tiny|<model>", "teacher": teacher, "n_images": N, "measures": with_ratio(measures), "detector": "seer"}
    note = {"archs": {n: list(a) for n, a in archs.items()}, "graph": graph().to_json(), "pictured_prompts": PROMPTS}
    note |= {"measures": described(with_ratio(measures))}
    return write(folder, "scan", asked, note, rows, list(archs.values()))


def searched(
    budgets: Sequence[str], drifts: Mapping[str, float], sets: Mapping[str, tuple[Sequence[str], str]]
) -> dict[str, Evaluation]:
    """Evaluations of `sets` (label => removed blocks and source) as a search under those budgets would make them, by label."""
    limits = [parse_budget(text, graph(), OUTSIDE, None) for text in budgets]
    space = Space(graph(), graph().units("block"), limits)
    strategy = Strategy(space, [space], {})
    found = {}
    for i, (label, (removed, source)) in enumerate(sets.items()):
        candidate = strategy.of(Architecture(frozenset(removed)), source, label)
        tiers = tuple(scores(graph(), candidate.arch, label, drifts[label], ["guided_mse"]))
        found[label] = Evaluation(i, candidate, tiers, 0.0, 1.0)
    return found


def search(
    folder: Path,
    finals: bool = True,
    budget: str | None = "80%params",
    pareto: str | None = None,
    image_measures: Sequence[str] = ("fid", "clip_score"),
    drifts: Mapping[str, float] | None = None,
    broken: Sequence[str] = (),
) -> Path:
    """Every block alone, then two sets, of which the finals choose one; their images are as far from the teacher's as `drifts`, and
    those of `broken` failed."""
    drifts = drifts or {"mine": 0.01, "mid-removed": 0.03}
    sets = {"mine": (STUDENT, "tpe"), "mid-removed": (["mid_block"], "preset")}
    units = graph().units("block")
    singles = {label: (list(arch), "scan") for label, arch in units.items()}
    alone = {label: 1e-3 * 1.5**i for i, label in enumerate(units)}
    budgets = [budget] if budget else []
    evaluations = searched(budgets, {**alone, **drifts}, {**singles, **sets})
    rows: list[Mapping[str, Any]] = [{"kind": "search", **e.to_json()} for e in evaluations.values()]
    archs = {FULL: Architecture(), **{n: evaluations[n].candidate.arch for n in sets}}
    if finals:
        rows += [{"kind": "final", **e.to_json()} for e in searched(budgets, drifts, sets).values()]
        for label, arch in archs.items():
            timed = [s.to_json() for s in scores(graph(), arch, label, 0.0, ["latency"])]
            rows += [{"kind": "timing", **row} for row in timed]
        for label, arch in archs.items():
            drift, error = (0.0 if label == FULL else drifts[label]), ("not <finite>" if label in broken else "")
            judged = [s.to_json() for s in scores(graph(), arch, label, drift, image_measures, error)]
            rows.append({"kind": "seen", "label": label, "scores": judged})
    asked = {"teacher": TEACHER, "objective": "guided_mse", "unit": "block", "keep": None, "budget": budgets}
    asked |= {"scope": "pipeline", "macs": "thop", "pareto": pareto}
    note = {"graph": graph().to_json(), "outside_params": OUTSIDE, "pictured_prompts": PROMPTS, "model": "tiny|<model>"}
    note |= {"request": {"objective": "guided_mse", "unit": "block", "budget": budgets, "pareto": pareto}}
    return write(folder, "search", asked, note, rows, list(archs.values()) if finals else [])


def distill(folder: Path, removed: Sequence[str] = STUDENT, old: bool = False) -> Path:
    """Six updates with two validations; an `old` run noted no graph, no costs and no prompts."""
    rows: list[Mapping[str, Any]] = []
    arch = Architecture(frozenset(removed))
    for step in range(1, 7):
        losses = {"loss": 3 / step, "task": 1 / step, "output": 1 / step, "feature": 1 / step, "feature/down_blocks.0": 1 / step}
        rows.append({"kind": "train", **TrainState(step, losses, 4, 0.1).to_json()})
        if step % 3 == 0:
            judged = judge(arch.key, f"step {step}", ["fid", "is", "clip_score"], seen(1 / step), None, judges(), 0)
            rows += [{"kind": "validation", "step": step, "score": s.to_json()} for s in judged]
    note: dict[str, Any] = {"arch": list(arch)}
    if not old:
        note |= {"graph": graph().to_json(), "outside_params": OUTSIDE, "pictured_prompts": PROMPTS}
        note |= {"recipe_name": "bk-sdm", "data_source": "digits"}
    return write(
        folder, "distill", {"teacher": TEACHER, "teacher_model": "tiny"}, note, rows, [f"step-{step:07d}" for step in (3, 6)]
    )


SETTINGS = [Setting(10, 1.5), Setting(10, 3.0), Setting(20, 3.0), Setting(10, 3.0, quantize="int8")]
CHECKPOINTS = [Setting(10, 3.0, checkpoint=100), Setting(10, 3.0, checkpoint=200)]


def evaluate(
    folder: Path,
    label: str,
    removed: Sequence[str] = (),
    protocol: Mapping[str, Any] | None = None,
    speed: float = 1.0,
    **changes: Any,
) -> Path:
    """One model under several settings, with its components, on a machine `speed` times as slow; `changes` replace entries of
    run.json."""
    arch = Architecture(frozenset(removed))
    rows: list[Mapping[str, Any]] = []
    settings = [*SETTINGS, *(CHECKPOINTS if removed else [])]
    for i, setting in enumerate(settings):
        judged = judge(arch.key, label, ["fid", "is", "clip_score"], seen(0.3 * len(arch) + 0.05 * i), None, judges(), 0)
        rows += [{"kind": "score", "setting": setting.label, **s.to_json()} for s in judged]
    nets = {"teacher": graph().total} | ({"student": graph().cost(arch)} if removed else {})
    for part in components(PARTS, nets, settings[0].steps):
        share = nets[part.who].params / graph().total.params
        paired = {"ratio": share, "ratio_low": 0.9 * share, "ratio_high": 1.1 * share} if part.who == "student" else {}
        timed = replace(part, latency_s=0.01 * speed * share, **paired)
        rows.append({"kind": "component", **timed.to_json()})
    note = {
        "label": label,
        "model": label,
        "teacher": "tiny" if removed else "",
        "teacher_id": TEACHER,
        "arch": list(arch),
        "graph": graph().to_json(),
        "outside_params": OUTSIDE,
        "protocol": {"name": "clean", "hash": "a" * 12, "n_images": N, "seed": 0, "fid": "clean", **(protocol or {})},
        "settings": [setting.to_json() | {"scheduler": "ddim"} for setting in settings],
        "measures": described(["fid", "is", "clip_score"]),
        "pictured_prompts": PROMPTS,
        **changes,
    }
    return write(folder, "evaluate", {}, note, rows, [settings[1].slug])


def everything(folder: Path) -> list[Path]:
    """A scan, two searches, two distillations, a teacher and two students."""
    return [
        scan(folder / "scan"),
        search(folder / "search-80"),
        search(folder / "search-78", budget="78%params"),
        distill(folder / "kd-small"),
        distill(folder / "kd-mid", ["mid_block"]),
        evaluate(folder / "eval-small", "small", STUDENT),
        evaluate(folder / "eval-teacher", "tiny"),
        evaluate(folder / "eval-mid", "mid", ["mid_block"]),
    ]
