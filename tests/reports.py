"""Run directories of every kind, made by hand on a tiny U-Net: what `report` reads, without a model behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import UNet2DConditionModel
from PIL import Image

from blockprune.arch import CONVENTIONS, Architecture, BlockGraph, Cost
from blockprune.records import Candidate, Evaluation, Score
from blockprune.trace import trace

HOSTILE = 'a "seven" <script>alert(1)</script> & $\\frac$ </script><b>'
PROMPTS = [HOSTILE, "two", "three"]
TEACHER = "0123456789ab"
MADE = {"python": "3.11", "blockprune": "0.1.0", "torch": "2.9", "diffusers": "0.42", "processor": "a <CPU>, 2 threads"}
STUDENT = ["down_blocks.0.resnets.1", "mid_block"]
OUTSIDE = 1000
ASKED = {"scope": "pipeline", "macs": "thop", "pareto": None}


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


def write(folder: Path, run: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Path:
    """A run directory with `run` in its run.json and those rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"format": 1, "made_with": MADE, **run}))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def strip(file: Path, seed: int = 0, side: int = 16) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side * len(PROMPTS), 3), dtype=np.uint8)).save(file)


def score(label: str, measure: str, value: float | None, arch: Architecture | None = None, error: str = "") -> Score:
    ends = (None, None) if value is None else (value - 0.1 * abs(value), value + 0.1 * abs(value))
    return Score((arch or Architecture()).key, label, measure, value, 64, 0, *ends, error=error)


def scan(folder: Path, measures: Sequence[str] = ("eps_mse", "fid", "clip_score", "latency_ratio"), teacher: str = TEACHER) -> Path:
    """Every block of the tiny U-Net alone; losses grow along the forward order, the fifth has no FID."""
    archs = {"full": Architecture(), **graph().units("block")}
    rows = []
    for i, (label, arch) in enumerate(archs.items()):
        q = 1e-3 * 1.5**i
        values = {"eps_mse": q, "fid": 10 + q, "clip_score": 0.3 - q / 100, "latency_ratio": 1 - i / 100}
        for m in measures:
            if label != "full" or m not in ("eps_mse", "latency_ratio"):
                failed = i == 5 and m == "fid"
                rows.append(score(label, m, None if failed else values[m], arch, "not <finite>" if failed else "").to_json())
        strip(folder / "images" / f"{arch.key}.png", i)
    run = {
        "command": "scan",
        "asked": {"model": "tiny|<model>", "teacher": teacher, "n_images": 64, "measures": list(measures), "detector": "seer"},
        "archs": {label: list(arch) for label, arch in archs.items()},
        "graph": graph().to_json(),
        "pictured_prompts": PROMPTS,
    }
    return write(folder, run, rows)


def search(folder: Path, finals: bool = True, budget: str = "80%params") -> Path:
    """Every block alone, then two sets, of which the finals choose one."""
    rows: list[Mapping[str, Any]] = []
    sets = {"mine": Architecture(frozenset(STUDENT)), "mid-removed": Architecture(frozenset({"mid_block"}))}
    sources = {"mine": "tpe", "mid-removed": "preset"}
    units = graph().units("block")

    def evaluation(i: int, label: str, arch: Architecture, source: str, value: float) -> Evaluation:
        over = {budget: 0.0 if source == "scan" else -1.0}
        params = {unit: a <= arch for unit, a in units.items()}
        candidate = Candidate(arch, label, source, params, over, {"params": graph().cost(arch).params})
        return Evaluation(i, candidate, (score(label, "eps_mse", value, arch),), 0.0, 1.0)

    singles = [evaluation(i, label, arch, "scan", 1e-3 * 1.5**i) for i, (label, arch) in enumerate(units.items())]
    chosen = [evaluation(100 + i, n, a, sources[n], 0.01 + 0.02 * i) for i, (n, a) in enumerate(sets.items())]
    rows += [{"kind": "search", **e.to_json()} for e in [*singles, *chosen]]
    if finals:
        rows += [{"kind": "final", **e.to_json()} for e in chosen]
        rows += [{"kind": "seen", "label": n, "scores": [score(n, "fid", 20.0).to_json()]} for n in ("full", *sets)]
        rows += [{"kind": "timing", **score("full", "latency", 0.1).to_json()}]
        rows += [{"kind": "timing", **score(n, "latency_ratio", 0.8, a).to_json()} for n, a in sets.items()]
        for i, arch in enumerate([Architecture(), *sets.values()]):
            strip(folder / "images" / f"{arch.key}.png", i)
    run = {
        "command": "search",
        "asked": {"teacher": TEACHER, "objective": "eps_mse", "budget": [budget], **ASKED},
        "graph": graph().to_json(),
        "outside_params": OUTSIDE,
        "pictured_prompts": PROMPTS,
        "model": "tiny|<model>",
    }
    return write(folder, run, rows)


def distill(folder: Path, removed: Sequence[str] = STUDENT, old: bool = False) -> Path:
    """Six updates with two validations; an `old` run noted no graph, no costs and no prompts."""
    rows: list[Mapping[str, Any]] = []
    arch = Architecture(frozenset(removed))
    for step in range(1, 7):
        losses = {"loss": 3 / step, "task": 1 / step, "output": 1 / step, "feature": 1 / step, "feature/down_blocks.0": 1 / step}
        rows.append({"kind": "train", "step": step, "losses": losses, "n_images": 4, "seconds": 0.1})
        if step % 3 == 0:
            values = {"fid": 60 / step, "is": 2.0, "clip_score": step / 10}
            rows += [{"kind": "validation", "step": step, "score": score("", m, v, arch).to_json()} for m, v in values.items()]
            strip(folder / "images" / f"step-{step:07d}.png", step)
    run: dict[str, Any] = {"command": "distill", "asked": {"teacher": TEACHER, "teacher_model": "tiny"}, "arch": list(arch)}
    if not old:
        run |= {"graph": graph().to_json(), "outside_params": OUTSIDE, "pictured_prompts": PROMPTS}
    return write(folder, run, rows)


SETTINGS = [(10, 1.5, "", None), (10, 3.0, "", None), (20, 3.0, "", None), (10, 3.0, "int8", None)]
CHECKPOINTS = [(10, 3.0, "", 100), (10, 3.0, "", 200)]


def evaluate(
    folder: Path, label: str, removed: Sequence[str] = (), protocol: Mapping[str, Any] | None = None, **changes: Any
) -> Path:
    """One model under several settings, with its components; `changes` replace entries of run.json."""
    arch = Architecture(frozenset(removed))
    rows: list[Mapping[str, Any]] = []
    settings = []
    for i, (steps, cfg, quantize, checkpoint) in enumerate([*SETTINGS, *(CHECKPOINTS if removed else [])]):
        name = f"CFG {cfg:g}, {steps} steps{f', {quantize}' * bool(quantize)}{f', update {checkpoint}' if checkpoint else ''}"
        drawn = {"steps": steps, "cfg_scale": cfg, "scheduler": "ddim", "quantize": quantize, "checkpoint": checkpoint}
        settings.append({"label": name, **drawn})
        for m, v in {"fid": 20.0 + i + len(arch), "is": 5.0 - len(arch), "clip_score": 0.3 + cfg / 100}.items():
            rows.append({"kind": "score", "setting": name, **score(label, m, v, arch).to_json()})
    for who in ("teacher", "student") if removed else ("teacher",):
        unet = graph().cost(arch if who == "student" else Architecture())
        for part, cost in {"U-Net x 1": unet, "whole": Cost(unet.params + OUTSIDE, 0, unet.thop, unet.conv_linear, 1)}.items():
            macs = {c: cost.macs(c) for c in CONVENTIONS}
            rows.append({"kind": "component", "name": part, "who": who, "params": cost.params, "macs": macs, "latency_s": 0.01})
    strip(folder / "images" / "cfg-3-10-steps.png", len(arch))
    run = {
        "command": "evaluate",
        "asked": {},
        "label": label,
        "model": label,
        "teacher": "tiny" if removed else "",
        "teacher_id": TEACHER,
        "arch": list(arch),
        "graph": graph().to_json(),
        "outside_params": OUTSIDE,
        "protocol": {"name": "clean", "hash": "a" * 12, "n_images": 64, "seed": 0, "fid": "clean", **(protocol or {})},
        "settings": settings,
        "pictured_prompts": PROMPTS,
        **changes,
    }
    return write(folder, run, rows)


def everything(folder: Path) -> list[Path]:
    """A scan, two searches, two distillations, a teacher and two students."""
    return [
        scan(folder / "scan"),
        search(folder / "search-80"),
        search(folder / "search-70", budget="70%params"),
        distill(folder / "kd-small"),
        distill(folder / "kd-mid", ["mid_block"]),
        evaluate(folder / "eval-small", "small", STUDENT),
        evaluate(folder / "eval-teacher", "tiny"),
        evaluate(folder / "eval-mid", "mid", ["mid_block"]),
    ]
