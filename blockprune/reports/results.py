"""The results of a report: which rows, in which order, and as tables, flat rows and JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blockprune.export.model_card import in_words
from blockprune.measures.measure import ARROWS, MEASURES, quality
from blockprune.measures.score import TEACHER, Score, flat_score
from blockprune.model.architecture import Architecture
from blockprune.model.graph import Cost
from blockprune.reports.curves import validated
from blockprune.reports.model_view import ModelView, TrainingView
from blockprune.reports.recommendation import Recommendation
from blockprune.reports.report_data import ReportData
from blockprune.reports.search_view import SearchView
from blockprune.reports.table import STEP_LATENCY, Cell, Column, Table, prefix_of, step_latency
from blockprune.reports.table import to_latex as latex_table
from blockprune.reports.view import ScanView, ranking

EVALUATED, DISTILLED = "Evaluated models", "Distilled students"  # titles of tables
PAPER = ("fid", "is", "clip_score", "kid")
NAMES = {
    "is": "IS",
    "clip_score": "CLIP",
    "eps_mse": "eps-MSE",
    "guided_mse": "guided MSE",
    "feature_distance": "feature distance",
    "input_l1": "input L1",
}
LATER = ("kid", "feature_distance", "input_l1")  # after the costs, so that these stay in sight


@dataclass(frozen=True)
class Result:
    """One line: a model under a setting, its scores by measure and what it costs; None for what is not known.

    `whole_params` count text encoders, U-Net and VAE decoder; `cost` is a U-Net step's. `latency_s` is of the teacher alone;
    what lacks blocks has `latency_ratio`, to a teacher that was timed in turn with it.
    """

    model: str
    setting: str
    arch: Architecture
    scores: Mapping[str, Score]
    cost: Cost | None
    whole_params: int | None
    latency_s: float | None = None
    latency_ratio: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.arch and self.latency_s is not None:
            raise ValueError(f"{self.model}: a student's step has a ratio to its teacher's, not seconds of its own")

    def value(self, measure: str) -> float | None:
        """The number; None when it was not measured, failed, or is not finite."""
        score = self.scores.get(measure)
        return score.finite if score else None


@dataclass(frozen=True)
class ResultTable:
    """Lines that may be compared with each other. `run` names where they come from, `title` and `note` say what they are."""

    run: str
    title: str
    note: str
    rows: Sequence[Result]
    searched: bool = False

    @property
    def measures(self) -> list[str]:
        """The quality measures that a row has, in the order of the papers."""
        return [m for m in in_paper_order() if any(m in row.scores for row in self.rows)]


def result_tables(data: ReportData) -> list[ResultTable]:
    """Evaluated models first, then what searches, distillations and scans scored on their own terms."""
    tables = [_evaluated(group) for group in data.groups.values()]
    tables += [_searched(name, view) for name, view in data.searches.items() if view.finals]
    tables += list(_trained(data))
    tables += [_scanned(name, view, data.outside_params) for name, view in data.scans.items()]
    return [table for table in tables if table.rows]


def _evaluated(group: Mapping[str, ModelView]) -> ResultTable:
    rows = [
        Result(
            name,
            setting.label,
            view.arch,
            view.scores.get(setting.label, {}),
            view.cost,
            view.whole_params,
            *view.step_times(setting),
        )
        for name, view in group.items()
        for setting in view.settings
    ]
    protocol = next(iter(group.values())).protocol
    known = {"n_images": "images", "n_reference": "reference images"}
    counts = [f"{protocol[k]:,} {title}" for k, title in known.items() if isinstance(protocol.get(k), int)]
    parts = [f"Protocol {protocol.get('name', 'not named')}", *counts, f"seed {protocol.get('seed', 'not recorded')}"]
    return ResultTable(", ".join(group), EVALUATED, "; ".join(parts), rows)


def _searched(name: str, view: SearchView) -> ResultTable:
    total, outside = view.graph.total, view.outside_params
    teacher = view.scores.get(TEACHER, {})
    full = teacher["latency"].value if "latency" in teacher else None
    rows = [Result("teacher", "", Architecture(), teacher, total, total.params + outside, full)]
    for e in sorted(view.finals, key=lambda e: (-view.cost(e).params, e.score.label)):
        scores = {**view.scores.get(e.score.label, {}), view.measure: e.score}
        cost, ratio = view.cost(e), view.latency_ratio(e)
        over = "" if view.holds(e) else "over budget"
        rows.append(
            Result(e.score.label, e.candidate.source, e.candidate.arch, scores, cost, cost.params + outside, None, ratio, over)
        )
    note = f"One-shot, nothing retrained; fresh seeds; budget {', '.join(view.limits) or 'none'}"
    return ResultTable(name, f"Finalists of {name}", note, rows, searched=True)


def _trained(data: ReportData) -> Iterator[ResultTable]:
    """The last validation of every distillation; the largest student first."""
    rows = [_last(name, view, data) for name, view in data.trainings.items() if validated(view.rows)]
    if rows:
        rows.sort(key=lambda row: (-(row.cost.params if row.cost else 0), row.model))
        note = "The validation that ended each run: few images, for following a run rather than for comparing models"
        yield ResultTable(", ".join(data.trainings), DISTILLED, note, rows)


def _last(name: str, view: TrainingView, data: ReportData) -> Result:
    scores = validated(view.rows)
    last = max(step for step, _ in scores)
    graph, outside = view.graph or data.graph, view.outside_params if view.outside_params is not None else data.outside_params
    cost = graph.cost(view.arch) if graph else None
    whole = cost.params + outside if cost and outside is not None else None
    return Result(name, f"after {last:,} updates", view.arch, {s.measure: s for step, s in scores if step == last}, cost, whole)


def _scanned(name: str, view: ScanView, outside: int | None) -> ResultTable:
    rows = []
    for row in ranking(view):
        label = row["label"]
        scores = {m: s for m in (*quality(), "latency_ratio") if (s := view.score(label, m)) is not None}
        cost = view.graph.cost(view.archs[label])
        whole = cost.params + outside if outside is not None else None
        shown = "teacher" if label == TEACHER else f"without {label}" if label in view.graph else label
        timing = view.value(label, "latency"), view.value(label, "latency_ratio")
        rows.append(Result(shown, "", view.archs[label], scores, cost, whole, *timing, note=row["error"]))
    note = "One-shot, nothing retrained; the teacher, then from the least to the most quality lost"
    return ResultTable(name, f"Removals of {name}", note, rows)


def in_paper_order() -> list[str]:
    """The measures of quality, those of the papers first."""
    return sorted(quality(), key=lambda m: PAPER.index(m) if m in PAPER else len(PAPER))


def heading(measure: str) -> str:
    """ "FID ↓" and the like, as the papers write it."""
    return f"{NAMES.get(measure, MEASURES[measure].title)} {ARROWS[MEASURES[measure].direction]}"


def flat(tables: Sequence[ResultTable], convention: str) -> list[dict[str, Any]]:
    """One flat row per result, of all tables, with the same columns; None for what is not known."""
    measures = [m for m in in_paper_order() if any(m in table.measures for table in tables)]
    rows = []
    for table in tables:
        for r in table.rows:
            row: dict[str, Any] = {
                "table": table.title,
                "run": table.run,
                "model": r.model,
                "setting": r.setting,
                "arch": r.arch.key,
            }
            for m in measures:
                row |= flat_score(m, r.scores.get(m))
            row |= {"unet_params": r.cost.params if r.cost else None, "pipeline_params": r.whole_params}
            row |= {f"macs_{convention}": r.cost.macs(convention) if r.cost else None}
            row |= {"latency_s": r.latency_s, "latency_ratio": r.latency_ratio, "removed": r.arch.terms, "note": r.note}
            rows.append(row)
    return rows


MADE_BY = "blockprune report"


def to_json(
    data: ReportData,
    tables: Sequence[ResultTable],
    taken: Sequence[Recommendation],
    convention: str,
    notes: Mapping[str, Sequence[str]],
) -> str:
    """What to take at each size, results, components, every run's protocol, what each measure means, and the notes (caveats and
    the like)."""
    rows = flat(tables, convention)
    students = {" = ".join(names): {**arch.to_json(), "in_words": in_words(arch)} for arch, names in data.students.items()}
    content = {
        "format": 1,
        "made_by": MADE_BY,
        "teacher": {"name": data.teacher, "identity": data.teacher_id, "cost": data.graph.total.to_json() if data.graph else None},
        "macs_convention": convention,
        "recommendations": [r.to_json() for r in taken],
        "measures": {m: MEASURES[m].to_json() for m in in_paper_order() if rows and m in rows[0]},
        "results": rows,
        "components": [{"model": name, **vars(c)} for name, m in data.models.items() for c in m.priced.components],
        "students": students,
        "runs": {name: {"protocol": dict(view.protocol)} for name, view in data.runs.items()},
        **notes,
    }
    return json.dumps(content, indent=2, default=str, ensure_ascii=False) + "\n"


def results_table(table: ResultTable, convention: str) -> Table:
    """The paper-style table; the best value of each quality column among students stands out."""
    rows, second = table.rows, "source" if table.searched else "setting"
    prefix, unit = prefix_of([r.cost.macs(convention) for r in rows if r.cost])
    size, params = prefix_of([r.cost.params for r in rows if r.cost])
    first, last = ([m for m in table.measures if (m in LATER) == late] for late in (False, True))
    best = {m: _best(rows, m) for m in table.measures}

    def scores(measures: Sequence[str]) -> list[tuple[Column, list[Cell]]]:
        stands_out = {m: [bool(r.arch) and best[m] is not None and r.value(m) == best[m] for r in rows] for m in measures}
        return [
            (Column(heading(m)), [Cell.of(r.scores.get(m), b) for r, b in zip(rows, stands_out[m], strict=True)]) for m in measures
        ]

    columns: list[tuple[Column, list[Cell]]] = [
        (Column("model", "text"), [Cell(r.model) for r in rows]),
        (Column(second, "text"), [Cell(r.setting or None) for r in rows]),
        *scores(first),
        (Column(f"U-Net params, {size}", "size", params), [Cell(r.cost and r.cost.params) for r in rows]),
        (Column(f"whole params, {size}", "size", params), [Cell(r.whole_params) for r in rows]),
        (Column(f"{prefix}MACs/step ({convention})", "size", unit), [Cell(r.cost and r.cost.macs(convention)) for r in rows]),
        (
            STEP_LATENCY,
            [
                step_latency(r.latency_s, r.latency_ratio, s.interval if (s := r.scores.get("latency_ratio")) else None)
                for r in rows
            ],
        ),
        (Column("weights, MB", unit=1e6), [Cell(r.value("weight_bytes")) for r in rows]),
        *scores(last),
        (Column("note", "note"), [Cell(r.note or None) for r in rows]),
    ]
    return Table.of_columns(table.title, columns, f"{table.note}.")


def _best(rows: Sequence[Result], measure: str) -> float | None:
    values = [v for r in rows if r.arch and (v := r.value(measure)) is not None]
    if len(values) < 2:
        return None
    return min(values) if MEASURES[measure].direction == "down" else max(values)


def to_latex(tables: Sequence[Table]) -> str:
    """A booktabs table for each table."""
    lines = ["% needs \\usepackage{booktabs} and an engine or encoding that knows UTF-8"]
    return "\n\n".join([*lines, *(latex_table(table, f"tab:blockprune-{i}") for i, table in enumerate(tables, 1))]) + "\n"
