"""The tables of evaluated models beside the results: what parts cost, and settings side by side."""

from __future__ import annotations

from collections.abc import Mapping

from blockprune.cost.table import Component
from blockprune.reports.model_figures import varied
from blockprune.reports.model_view import ModelView
from blockprune.reports.models import Model
from blockprune.reports.results import heading
from blockprune.reports.table import Cell, Column, Table, prefix_of, share_of, step_latency


def components(models: Mapping[str, ModelView], convention: str) -> Table | None:
    """What each part of each model costs, and its share of the teacher's; None without rows.

    Latencies are held against the teacher's of the same run, which were taken in turn; only the teacher's are in milliseconds.
    """
    teachers = {name: {c.name: c for c in view.components if c.who == "teacher"} for name, view in models.items()}
    teacher = next((parts for parts in teachers.values() if parts), {})
    parts: list[tuple[str, Component, Component | None]] = [("teacher", c, c) for c in teacher.values()]
    parts += [(n, c, teachers[n].get(c.name)) for n, view in models.items() for c in view.components if c.who != "teacher"]
    if not parts:
        return None
    macs = [(c.macs.get(convention), full.macs.get(convention) if full else None) for _, c, full in parts]
    prefix, unit = prefix_of(count for count, _ in macs if count)
    columns = [
        (Column("model", "text"), [Cell(model) for model, _, _ in parts]),
        (Column("part", "text"), [Cell(c.name) for _, c, _ in parts]),
        (Column("params", "count"), [Cell(c.params) for _, c, _ in parts]),
        (Column("params, % of teacher", "share"), [share_of(c.params, full.params if full else None) for _, c, full in parts]),
        (Column(f"{prefix}MACs ({convention})", "size", unit), [Cell(count) for count, _ in macs]),
        (Column("MACs, % of teacher", "share"), [share_of(count, full) for count, full in macs]),
        (
            Column("latency, × teacher", "ratio"),
            [step_latency(c.latency_s, None) if c is full else Cell(c.ratio, c.interval) for _, c, full in parts],
        ),
    ]
    note = "One image; U-Net x N: N steps; whole: text encoder, U-Net steps and VAE decoder. One multiply-add = 1 MAC."
    return Table.of_columns("What each part of the pipeline costs", columns, note)


def finding(models: Mapping[str, Model]) -> str:
    """The shortest step of a student beside its teacher's, in a line."""
    ratios = {name: ratio for name, model in models.items() if model.arch and (ratio := model.latency_ratio) is not None}
    if not ratios:
        return "No step was timed."
    fastest, slowest = min(ratios, key=ratios.__getitem__), max(ratios, key=ratios.__getitem__)
    span = " to ".join(f"{ratios[name]:.0%} (`{name}`)" for name in dict.fromkeys((fastest, slowest)))
    return f"A step of the U-Net takes {span} of the teacher's time."


def steps_and_quantisation(models: Mapping[str, ModelView]) -> Table | None:
    """FID and CLIP score by steps (rows) and quantisation (columns), for settings that differ in these alone; None without any."""
    groups = [(name, view, group) for name, view in models.items() for group in varied(view, "steps", "quantize")]
    if not groups:
        return None
    kinds = list(dict.fromkeys(s.quantize for _, _, group in groups for s in group))
    measures = [m for m in ("fid", "clip_score", "is") if any(v.value(s, m) is not None for _, v, g in groups for s in g)][:2]
    # a row: a model, its CFG scale, a number of steps, and the setting of each quantisation
    rows = [
        (name, view, group[0].cfg_scale, steps, {s.quantize: s for s in group if s.steps == steps})
        for name, view, group in groups
        for steps in sorted({s.steps for s in group})
    ]
    columns = [
        (Column("model", "text"), [Cell(name) for name, *_ in rows]),
        (Column("CFG", "plain"), [Cell(cfg_scale) for _, _, cfg_scale, _, _ in rows]),
        (Column("steps", "plain"), [Cell(steps) for *_, steps, _ in rows]),
    ]
    for m in measures:
        for kind in kinds:
            scores = [view.scores.get(by[kind].label, {}).get(m) if kind in by else None for _, view, _, _, by in rows]
            columns.append((Column(f"{heading(m)}, {kind or 'not quantised'}"), list(map(Cell.of, scores))))
    return Table.of_columns("Steps and quantisation", columns)
