"""The result tables of a report: which rows, in which order, and as CSV, JSON and LaTeX. Every string from outside is escaped."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blockprune.export.model_card import in_words
from blockprune.measures.measure import MEASURES, quality
from blockprune.measures.score import TEACHER, Score
from blockprune.model.architecture import Architecture, BlockGraph, Cost
from blockprune.reports.curves import validated
from blockprune.reports.dossier import Dossier, ModelView, TrainingView
from blockprune.reports.search_view import SearchView
from blockprune.reports.text import number, step_time
from blockprune.reports.view import ScanView, ranking

PAPER = ("fid", "is", "clip_score", "kid")
NAMES = {"is": "IS", "clip_score": "CLIP", "eps_mse": "eps-MSE", "guided_mse": "guided MSE", "feature_distance": "feature distance"}
ARROWS = {"down": "↓", "up": "↑"}


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

    @property
    def step_time(self) -> str:
        return step_time(self.latency_s, self.latency_ratio, self.interval("latency_ratio"))

    def value(self, measure: str) -> float | None:
        """The number; None when it was not measured, failed, or is not finite."""
        score = self.scores.get(measure)
        return score.finite if score else None

    def interval(self, measure: str) -> tuple[float, float] | None:
        """(low, high) of the 95 % interval; None when there is none."""
        score = self.scores.get(measure)
        return score.interval if score else None


@dataclass(frozen=True)
class ResultTable:
    """Lines that may be compared with each other. `run` names where they come from, `title` and `note` say what they are."""

    run: str
    title: str
    note: str
    rows: Sequence[Result]

    @property
    def measures(self) -> list[str]:
        """The quality measures that a row has, in the order of the papers."""
        return [m for m in in_paper_order() if any(m in row.scores for row in self.rows)]


def result_tables(dossier: Dossier) -> list[ResultTable]:
    """Evaluated models first, then what searches, distillations and scans scored on their own terms."""
    tables = [_evaluated(group) for group in dossier.groups.values()]
    tables += [_searched(name, view) for name, view in dossier.searches.items() if view.finals]
    tables += list(_trained(dossier))
    tables += [_scanned(name, view, dossier.outside_params) for name, view in dossier.scans.items()]
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
    said = [f"Protocol {protocol.get('name', 'not named')}", *counts, f"seed {protocol.get('seed', 'not recorded')}"]
    return ResultTable(", ".join(group), "Evaluated models", "; ".join(said), rows)


def _searched(name: str, view: SearchView) -> ResultTable:
    total, outside = view.graph.total, view.outside_params
    own = view.scores.get(TEACHER, {})
    full = own["latency"].value if "latency" in own else None
    rows = [Result("teacher", "", Architecture(), own, total, total.params + outside, full)]
    for e in sorted(view.finals, key=lambda e: (-view.cost(e).params, e.score.label)):
        scores = {**view.scores.get(e.score.label, {}), view.measure: e.score}
        cost, ratio = view.cost(e), view.latency_ratio(e)
        note = "" if view.holds(e) else "over budget"
        rows.append(
            Result(e.score.label, e.candidate.source, e.candidate.arch, scores, cost, cost.params + outside, None, ratio, note)
        )
    said = f"One-shot, nothing retrained; fresh seeds; budget {', '.join(view.limits) or 'none'}"
    return ResultTable(name, f"Finalists of {name}", said, rows)


def _trained(dossier: Dossier) -> Iterator[ResultTable]:
    """The last validation of every distillation; the largest student first."""
    rows = [_last(name, view, dossier) for name, view in dossier.trainings.items() if validated(view.rows)]
    if rows:
        rows.sort(key=lambda row: (-(row.cost.params if row.cost else 0), row.model))
        said = "The validation that ended each run: few images, for following a run rather than for comparing models"
        yield ResultTable(", ".join(dossier.trainings), "Distilled students", said, rows)


def _last(name: str, view: TrainingView, dossier: Dossier) -> Result:
    scores = validated(view.rows)
    last = max(step for step, _ in scores)
    graph, outside = view.graph or dossier.graph, view.outside_params if view.outside_params is not None else dossier.outside_params
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
    said = "One-shot, nothing retrained; the teacher, then from the least to the most quality lost"
    return ResultTable(name, f"Removals of {name}", said, rows)


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
                s = r.scores.get(m)
                low, high = r.interval(m) or (None, None)
                row |= {m: r.value(m), f"{m}_low": low, f"{m}_high": high, f"{m}_n": s.n if s else None}
            row |= {"unet_params": r.cost.params if r.cost else None, "pipeline_params": r.whole_params}
            row |= {f"macs_{convention}": r.cost.macs(convention) if r.cost else None}
            row |= {"latency_s": r.latency_s, "latency_ratio": r.latency_ratio, "removed": r.arch.terms, "note": r.note}
            rows.append(row)
    return rows


def to_csv(tables: Sequence[ResultTable], convention: str) -> str:
    """Every result, a line each; removed blocks separated by spaces, what is missing left empty."""
    rows = flat(tables, convention)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]) if rows else ["table"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {"removed": " ".join(row["removed"])} for row in rows)
    return out.getvalue()


MADE_BY = "blockprune report"


def to_json(dossier: Dossier, tables: Sequence[ResultTable], convention: str, notes: Mapping[str, Sequence[str]]) -> str:
    """The results, the components, the protocol of every run, what each measure means, and the notes (caveats and the like)."""
    rows = flat(tables, convention)
    students = {" = ".join(names): {**arch.to_json(), "in_words": in_words(arch)} for arch, names in dossier.students.items()}
    data = {
        "format": 1,
        "made_by": MADE_BY,
        "teacher": {"name": dossier.teacher, "identity": dossier.teacher_id, "cost": _cost(dossier.graph)},
        "macs_convention": convention,
        "measures": {m: MEASURES[m].to_json() for m in in_paper_order() if rows and m in rows[0]},
        "results": rows,
        "components": [{"model": name, **vars(c)} for name, view in dossier.models.items() for c in view.components],
        "students": students,
        "runs": {name: {"protocol": dict(view.protocol)} for name, view in dossier.runs.items()},
        **notes,
    }
    return json.dumps(data, indent=2, default=str, ensure_ascii=False) + "\n"


def _cost(graph: BlockGraph | None) -> dict[str, Any] | None:
    return graph.total.to_json() if graph else None


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "×": r"$\times$",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


def latex(text: object) -> str:
    """`text` on one line, with everything that LaTeX would interpret made harmless."""
    return "".join(LATEX.get(c, c) for c in " ".join(str(text).split()))


def to_latex(tables: Sequence[ResultTable], convention: str) -> str:
    """A booktabs table for each table of results."""
    lines = ["% needs \\usepackage{booktabs} and an engine or encoding that knows UTF-8"]
    for i, table in enumerate(tables, 1):
        lines += ["", *_latex_table(table, convention, i)]
    return "\n".join(lines) + "\n"


def _latex_table(table: ResultTable, convention: str, i: int) -> Iterator[str]:
    settings = any(row.setting for row in table.rows)
    timed = any(row.step_time != "-" for row in table.rows)
    prefix, unit = macs_unit(table.rows, convention)
    head = ["Model", *["Setting"] * settings, *map(heading, table.measures), "U-Net (M)", "Whole (M)"]
    head += [f"{prefix}MACs ({convention})", *["Step latency (× teacher)"] * timed]
    yield from (r"\begin{table}[t]", r"  \centering", f"  \\caption{{{latex(table.title)}. {latex(table.note)}.}}")
    yield f"  \\label{{tab:blockprune-{i}}}"
    yield f"  \\begin{{tabular}}{{{'l' * (1 + settings)}{'r' * (len(head) - 1 - settings)}}}"
    yield from (r"    \toprule", f"    {' & '.join(map(latex, head))} \\\\", r"    \midrule")
    for row in table.rows:
        cells = [row.model, *[row.setting] * settings]
        cells += [number(row.value(m)) for m in table.measures]
        cells += [scaled(row.cost.params if row.cost else None, 1e6), scaled(row.whole_params, 1e6)]
        cells += [scaled(row.cost.macs(convention) if row.cost else None, unit)]
        cells += [step_time(row.latency_s, row.latency_ratio)] * timed
        yield f"    {' & '.join(map(latex, cells))} \\\\"
    yield from (r"    \bottomrule", r"  \end{tabular}", r"\end{table}")


def macs_unit(rows: Sequence[Result], convention: str) -> tuple[str, float]:
    """The prefix and size in which the multiply-adds of a table read best."""
    return ("M", 1e6) if max((r.cost.macs(convention) for r in rows if r.cost), default=0) < 1e9 else ("G", 1e9)


def scaled(value: float | None, unit: float) -> str:
    """A value in a unit, to four significant digits and without an exponent; "-" for None."""
    if value is None:
        return "-"
    size = value / unit
    return f"{size:,.0f}" if abs(size) >= 1000 else f"{size:#.4g}".rstrip(".")
