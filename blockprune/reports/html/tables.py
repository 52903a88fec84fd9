"""The tables of a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from blockprune.cost.table import Component
from blockprune.measures.measure import MEASURES
from blockprune.measures.score import Score
from blockprune.reports.dossier import ModelView, Setting
from blockprune.reports.html.parts import Cell, Table
from blockprune.reports.model_figures import varied
from blockprune.reports.results import Result, ResultTable, heading, macs_unit, scaled
from blockprune.reports.search_view import SearchView
from blockprune.reports.text import count, number, step_time
from blockprune.reports.view import ScanView, short

EMPTY = Cell("–")
STEP_LATENCY = "step latency, × teacher"
LATER = ("kid", "feature_distance")  # after the costs, so that these stay in sight


def results(table: ResultTable, convention: str, second: str = "setting") -> Table:
    """The paper-style table; the best value of each quality column stands out."""
    settings, notes = any(r.setting for r in table.rows), any(r.note for r in table.rows)
    timed = any(r.step_time != "-" for r in table.rows)
    weighed = any("weight_bytes" in r.scores for r in table.rows)
    prefix, unit = macs_unit(table.rows, convention)
    first, last = ([m for m in table.measures if (m in LATER) == late] for late in (False, True))
    columns = ["model", *[second] * settings, *map(heading, first), "U-Net params", "whole params"]
    columns += [
        f"{prefix}MACs/step ({convention})",
        *[STEP_LATENCY] * timed,
        *["weights, MB"] * weighed,
        *map(heading, last),
        *["note"] * notes,
    ]
    text = {"model", second, "note"}
    best = {m: _best(table.rows, m) for m in table.measures}
    rows = []
    for r in table.rows:
        cells = [Cell(r.model, key=r.model), *[Cell(r.setting, key=r.setting)] * settings]
        cells += [_scored(r, m, best[m]) for m in first]
        cells += [_count(r.cost.params if r.cost else None), _count(r.whole_params)]
        macs = r.cost.macs(convention) if r.cost else None
        cells += [Cell(scaled(macs, unit), key=macs) if macs is not None else EMPTY]
        cells += [_step(r)] * timed
        cells += [_number(r.value("weight_bytes"), 1e6)] * weighed
        cells += [_scored(r, m, best[m]) for m in last] + [Cell(r.note)] * notes
        rows.append(cells)
    said = f"{table.note}. In brackets: 95 % intervals. Shaded: the best student."
    return Table(table.title, columns, [c not in text for c in columns], rows, said)


def _best(rows: Sequence[Result], measure: str) -> float | None:
    values = [v for r in rows if r.arch and (v := r.value(measure)) is not None]
    if len(values) < 2:
        return None
    return min(values) if MEASURES[measure].direction == "down" else max(values)


def _scored(r: Result, measure: str, best: float | None) -> Cell:
    value = r.value(measure)
    if value is None:
        return EMPTY
    return Cell(number(value), _bracket(r.interval(measure)), value, bool(r.arch) and value == best)


def _bracket(interval: tuple[float, float] | None) -> str:
    return f"[{number(interval[0])}, {number(interval[1])}]" if interval else ""


def _count(value: int | None) -> Cell:
    return EMPTY if value is None else Cell(count(value), key=value)


def _step(r: Result) -> Cell:
    """The teacher as 1, with its milliseconds; all else by the ratio that was timed in turn with the teacher."""
    if r.latency_ratio is None:
        return Cell("1", step_time(r.latency_s, None), 1.0) if r.latency_s is not None else EMPTY
    interval = r.interval("latency_ratio")
    return Cell(step_time(None, r.latency_ratio), f"[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "", r.latency_ratio)


def _number(value: float | None, unit: float) -> Cell:
    return EMPTY if value is None else Cell(f"{value / unit:.3g}", key=value)


def ranking(view: ScanView, table: ResultTable, convention: str) -> Table:
    """A scan's removals by what they cost, with what each saves."""
    total, rows = view.graph.total, []
    timed = any(r.step_time != "-" for r in table.rows)
    failed = any(r.note for r in table.rows)
    columns = ["#", "removed", *map(heading, table.measures), "params saved", f"MACs saved ({convention})"]
    columns += [STEP_LATENCY] * timed + ["failed"] * failed
    for i, r in enumerate(table.rows):
        assert r.cost is not None
        saved, macs = total.params - r.cost.params, total.macs(convention) - r.cost.macs(convention)
        label = r.model.removeprefix("without ")
        cells = [Cell(str(i), key=i), Cell(short(label), label if short(label) != label else "", i)]
        cells += [_scored(r, m, None) for m in table.measures]
        cells += [_share(saved, total.params), _share(macs, total.macs(convention))]
        rows.append(cells + [_step(r)] * timed + [Cell(r.note)] * failed)
    numeric = [c not in ("removed", "failed") for c in columns]
    return Table(table.title, columns, numeric, rows, f"{table.note}. In brackets: 95 % intervals.")


def _share(saved: int, total: int) -> Cell:
    return Cell(f"{saved / total:.1%}", count(saved), saved) if saved else EMPTY


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
    most = max(c.macs.get(convention, 0) for _, c, _ in parts)
    prefix, unit = ("G", 1e9) if most >= 1e9 else ("M", 1e6)
    timed = any(c.latency_s is not None for _, c, _ in parts)
    columns = [
        "model",
        "part",
        "params",
        "% of teacher",
        f"{prefix}MACs ({convention})",
        "% of teacher",
        *["latency, × teacher"] * timed,
    ]
    rows = []
    for who, c, full in parts:
        macs = c.macs.get(convention)
        cells = [Cell(who, key=who), Cell(c.name, key=c.name), _count(c.params), _percent(c.params, full.params if full else None)]
        cells += [Cell(scaled(macs, unit), key=macs) if macs is not None else EMPTY]
        cells += [_percent(macs, full.macs.get(convention) if full else None)]
        ratio = c.over(full) if full else None
        small = step_time(c.latency_s, None) if c is full and ratio else ""
        cells += [Cell("1" if c is full else step_time(None, ratio), small, ratio) if ratio else EMPTY] * timed
        rows.append(cells)
    said = "One image; U-Net x N: N steps; whole: text encoder, U-Net steps and VAE decoder. One multiply-add = 1 MAC."
    return Table("What each part of the pipeline costs", columns, [c not in ("model", "part") for c in columns], rows, said)


def _percent(value: float | None, of: float | None) -> Cell:
    return Cell(f"{value / of:.1%}", key=value / of) if value is not None and of else EMPTY


def steps_and_quantisation(models: Mapping[str, ModelView]) -> Table | None:
    """FID and CLIP score by steps (rows) and quantisation (columns), for settings that differ in these alone; None without any."""
    groups = [(name, view, group) for name, view in models.items() for group in varied(view, "steps", "quantize")]
    if not groups:
        return None
    kinds = list(dict.fromkeys(s.quantize for _, _, group in groups for s in group))
    measures = [m for m in ("fid", "clip_score", "is") if any(v.value(s, m) is not None for _, v, g in groups for s in g)][:2]
    columns = ["model", "CFG", "steps", *(f"{heading(m)}, {kind or 'not quantised'}" for m in measures for kind in kinds)]
    rows = [row for name, view, group in groups for row in _steps(name, view, group, kinds, measures)]
    numeric = [c != "model" for c in columns]
    return Table("Steps and quantisation", columns, numeric, rows, "In brackets: 95 % intervals.")


def _steps(
    name: str, view: ModelView, group: Sequence[Setting], kinds: Sequence[str], measures: Sequence[str]
) -> Iterator[list[Cell]]:
    for steps in sorted({s.steps for s in group}):
        at = {s.quantize: s for s in group if s.steps == steps}
        cells = [Cell(name, key=name), Cell(f"{group[0].cfg_scale:g}", key=group[0].cfg_scale), Cell(str(steps), key=steps)]
        for m in measures:
            cells += [_of(view.scores.get(at[kind].label, {}).get(m)) if kind in at else EMPTY for kind in kinds]
        yield cells


def _of(score: Score | None) -> Cell:
    value = score.finite if score else None
    return Cell(number(value), _bracket(score.interval), value) if score and value is not None else EMPTY


def removal_frequency(view: SearchView) -> Table | None:
    """How often each unit is removed among the best tenth of a search; None when none is."""
    shares = sorted(view.frequency().items(), key=lambda item: -item[1])
    names = [Cell(short(label), label if short(label) != label else "", i) for i, (label, _) in enumerate(shares)]
    rows = [[name, Cell(f"{share:.0%}", key=share)] for name, (_, share) in zip(names, shares, strict=True) if share]
    said = f"Of {len(shares)} units, the {len(shares) - len(rows)} that are not listed never are."
    title = "How often a unit is removed among the best tenth"
    return Table(title, ["unit", "removed in"], [False, True], rows, said) if rows else None


def facts(caption: str, rows: Mapping[str, str]) -> Table:
    """Names and what they are."""
    return Table(caption, ["", ""], [False, False], [[Cell(k), Cell(v)] for k, v in rows.items()])
