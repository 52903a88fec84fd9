"""The first screen of a page: what to take at each size, one picture of quality against cost, and the models that it is between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from blockprune.measures.measure import MEASURES
from blockprune.reports.canvas import axis_title, is_wide
from blockprune.reports.models import Model, Reading, readings_of
from blockprune.reports.next_command import next_command
from blockprune.reports.plot import Axis, Mark, Plot, Rule
from blockprune.reports.recommendation import Recommendation, judges, shares_of
from blockprune.reports.report_data import ReportData
from blockprune.reports.results import heading, in_paper_order
from blockprune.reports.table import Cell, Column, Table, with_interval

LAYOUTS = {"wide": (620.0, 380.0), "narrow": (360.0, 300.0)}  # pixels of the picture on a desk and on a phone
COSTS = {
    "params": "parameters, % of the teacher",
    "macs": "MACs, % of the teacher",
    "latency": "latency, % of the teacher",
}
KEYS = {"teacher star": "teacher", "hand diamond": "design by hand", "found dot": "found", "taken ring dot": "recommended"}
SHAPES = {"teacher": "star", "hand": "diamond", "found": "dot"}
SHOWN = 8  # models in the table


@dataclass(frozen=True)
class Overview:
    """The first screen; without evaluated models it has no pictures. `views` are the geometries that the page's script may show,
    `command` is what to run next where nothing is recommended."""

    recommendations: Sequence[Recommendation]
    command: str
    svgs: dict[str, Markup]
    tables: Sequence[Table]
    views: dict[str, Any]


def overview(data: ReportData, taken: Sequence[Recommendation], convention: str) -> Overview:
    """The first screen of the data."""
    readings, models = readings_of(data.models), list(data.models.values())
    shares = {m.name: shares_of(m, data, convention) for m in models}
    shown, command = _Shown(models, taken, shares), "" if taken else next_command(data, None, list(data.searches))
    views = {f"{i}/{m}/{c}": shown.plots(r, m, c) for i, r in enumerate(readings) for m in shown.measures(r) for c in shown.costs}
    if not views:
        return Overview(taken, command, {}, [], {})
    first, labels = views[next(iter(views))], [reading.label for reading in readings]
    return Overview(
        taken,
        command,
        {layout: Markup(plot.page_svg()) for layout, plot in first.items()},
        [shown.table(reading) for reading in readings],
        {
            "readings": [r.label if labels.count(r.label) == 1 else f"{r.label}, protocol {r.protocol}" for r in readings],
            "measures": {m: MEASURES[m].title for key in views for m in [key.split("/")[1]]},
            "costs": {cost: COSTS[cost].partition(",")[0] for cost in shown.costs},
            "texts": [{m.name: shown.text(m, reading) for m in models} for reading in readings],
            "views": {key: {layout: geometry(plot) for layout, plot in of.items()} for key, of in views.items()},
        },
    )


@dataclass(frozen=True)
class _Shown:
    """Models with their shares of the teacher's costs, and which of them are recommended where."""

    models: Sequence[Model]
    taken: Sequence[Recommendation]
    shares: dict[str, dict[str, float]]

    @property
    def costs(self) -> list[str]:
        """Costs that more than one model has."""
        return [cost for cost in COSTS if sum(cost in of for of in self.shares.values()) > 1]

    def measures(self, reading: Reading) -> list[str]:
        """The measures of quality that a reading has, the one first that hears captions."""
        measured = [m for m in in_paper_order() if any(model.score(reading, m) for model in self.models)]
        first = judges(self.models, reading)[:1]
        return [*first, *(m for m in measured if m not in first)]

    def at(self, model: Model) -> str:
        """Where a model is recommended, in words."""
        sizes = [
            f"{100 * next(iter(r.size.limits.values())):.0f}\u00a0%" for r in self.taken if r.take and r.take.name == model.name
        ]
        return f"take at {', '.join(sizes)}" if sizes else ""

    def plots(self, reading: Reading, measure: str, cost: str) -> dict[str, Plot]:
        """Quality against a cost, for each layout."""
        marks = [self._mark(m, reading, measure, cost) for m in self.models]
        known = [m for m in marks if m.shown]
        ends = [end for m in known for end in (m.band or (m.y, m.y))]
        budgets = dict(self._budgets(cost))
        axes = Axis.over(COSTS[cost], [*(m.x for m in known), *budgets.values()]), Axis.over("", ends, is_wide(m.y for m in known))
        looks = {key: text for key, text in KEYS.items() if any(key.split()[0] in m.look.split() for m in marks)}
        alt = "; ".join(f"{m.name} {m.y:.3g} at {m.x:.0f} %" for m in known)
        rules = [Rule("x", at, text) for text, at in budgets.items()]
        return {
            layout: Plot(axis_title(measure), *axes, marks, rules=rules, keys=looks, alt=alt, width=width, height=height)
            for layout, (width, height) in LAYOUTS.items()
        }

    def _mark(self, model: Model, reading: Reading, measure: str, cost: str) -> Mark:
        score, share = model.score(reading, measure), self.shares[model.name].get(cost)
        look = f"{model.kind} taken" if self.at(model) else model.kind
        place = (100 * share, score.value or 0.0) if score and share else (100.0, 0.0)
        shown, band = bool(score and share), score.interval if score else None
        return Mark(*place, look, self.text(model, reading), SHAPES[model.kind], model.name, band, name=model.name, shown=shown)

    def _budgets(self, cost: str) -> Iterator[tuple[str, float]]:
        """(text, per cent of the teacher) of each budget that bounds a cost."""
        for size in (r.size for r in self.taken if r.size.searches):
            if cost in size.limits:
                yield f"{100 * size.limits[cost]:.3g} %: budget {size.texts[cost]}", 100 * size.limits[cost]

    def text(self, model: Model, reading: Reading) -> str:
        """What is known of a model, a line each."""
        kind = {"teacher": "the teacher", "hand": f"{model.design}, by hand", "found": ""}[model.kind]
        scores = [(MEASURES[m].title, s) for m in self.measures(reading) if (s := model.score(reading, m))]
        costs = [f"{100 * share:.1f} % of the {COSTS[cost].partition(',')[0]}" for cost, share in self.shares[model.name].items()]
        trained = (
            [f"trained {model.updates:,} updates" if model.updates else "not trained"]
            if model.arch and model.updates is not None
            else []
        )
        lines = [f"{title}: {with_interval(s.value, *(s.interval or (None, None)))} (n = {s.n:,})" for title, s in scores]
        return "\n".join([", ".join(filter(None, (model.name, kind, self.at(model)))), *lines, *costs, *trained])

    def table(self, reading: Reading) -> Table:
        """The teacher, what is recommended and its rivals, all of them where they are few; by the measures that decide."""
        named = {m.name for r in self.taken for m in (r.take, r.rival) if m}
        rows = (
            [m for m in self.models if not m.arch or m.name in named] if named and len(self.models) > SHOWN else list(self.models)
        )
        rows = [m for m in rows if any(m.score(reading, measure) for measure in self.measures(reading))][: 2 * SHOWN]
        shares = [self.shares[m.name] for m in rows]
        columns = [
            (Column("model", "text"), [Cell(m.name, remark=self.at(m)) for m in rows]),
            *((Column(heading(m)), [Cell.of(model.score(reading, m)) for model in rows]) for m in judges(self.models, reading)),
            (Column("params", "percent"), [Cell(s.get("params")) for s in shares]),
            (Column("MACs", "percent"), [Cell(s.get("macs")) for s in shares]),
            (Column("latency", "percent"), [Cell(s.get("latency")) for s in shares]),
            (Column("updates", "plain"), [Cell(m.updates or None) for m in rows]),
        ]
        undecided = any(c.theirs and not c.told for r in self.taken for c in r.comparisons)
        return Table.of_columns(f"Models at {reading.label}", columns, "Undecided: 95 % intervals overlap." * undecided)


def geometry(plot: Plot) -> dict[str, Any]:
    """Where everything of a chart lies, in pixels: the script moves marks there, and writes axes anew."""
    x0, y0, x1, y1 = plot.box
    labels, marks = plot.labels(), {}
    for i, m in ((i, m) for i, m in enumerate(plot.marks) if m.shown):
        x, y = plot.place(m.x, m.y)
        low, high = (plot.place(m.x, end)[1] for end in m.band or (m.y, m.y))
        marks[m.name] = [x, y, low, high, *labels[i]]
    return {
        "titles": [plot.title, plot.x.title],
        "box": [x0, y0, x1, y1],
        "x": [[round(x0 + share * (x1 - x0), 1), text] for share, text in plot.x.ticks()],
        "y": [[round(y1 - share * (y1 - y0), 1), text] for share, text in plot.y.ticks()],
        "rules": [[plot.place(r.at, 0.0)[0], r.label, *over] for r, over in zip(plot.rules, plot.over(), strict=True)],
        "marks": marks,
    }
