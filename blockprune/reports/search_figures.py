"""The figures of a search's report: nothing is shown or written here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from blockprune.measures.measure import MEASURES
from blockprune.model.graph import Cost
from blockprune.reports.canvas import axis_title, is_wide
from blockprune.reports.image_grid import grid_figure, search_rows
from blockprune.reports.plot import Axis, Line, Mark, Plot, Rule, Sheet
from blockprune.reports.search_view import SearchView, history
from blockprune.reports.svg import Svg
from blockprune.reports.table import with_interval
from blockprune.reports.unet import search_svg
from blockprune.runs.records import GIVEN, PRESET, SCAN, Evaluation

NAMES = {"params": "parameters of the {scope}", "macs": "MACs of a U-Net step", "latency": "latency of a U-Net step"}


def search_figures(view: SearchView) -> Iterator[tuple[str, Figure | Svg]]:
    """(file name, figure) of every figure for which the search has data."""
    if not view.is_front:
        yield "unet-best.svg", search_svg(view, view.best, "found")
    if (preset := view.nearest_preset) is not None:
        yield "unet-preset.svg", search_svg(view, preset, "preset")
    yield (
        "history.svg",
        Sheet("Best score so far", "Evaluations are charged from the first single removal on.", [history_plot(view)]).file(),
    )
    note = "Small: scores of the search. Large: finalists on fresh seeds, with 95 % intervals."
    yield "front.svg", Sheet("Quality against size", note, [front_plot(view, width=640, height=420)]).file()
    if view.prompts and view.images:
        sub = "Teacher and finalists, one-shot."
        yield "grid.png", grid_figure("The same prompts and seeds", sub, view.prompts, search_rows(view))


def _best(evaluations: Sequence[Evaluation], measure: str) -> list[tuple[float, float]]:
    """(evaluations, best value so far), from the first that fits on."""
    return [(float(i), MEASURES[measure].loss(v)) for i, v in enumerate(history(evaluations), 1) if math.isfinite(v)]


def history_plot(view: SearchView, name: str = "") -> Plot:
    """Best so far against evaluations: the search's, and random sets' where there are any; presets as lines."""
    ours, random = _best(view.search, view.measure), _best(view.random, view.measure)
    presets = [e for e in view.search if e.fits and e.score.finite is not None and e.candidate.source == PRESET]
    lines: dict[str, list[str]] = {}
    for e in presets:
        lines.setdefault(f"{e.score.value:.2g}", []).append(e.score.label)
    values = [*(y for _, y in (*ours, *random)), *(e.score.finite for e in presets)]
    known = [v for v in values if v is not None]
    keys = {"found dot": "this search"} | ({"untrained dot": "random sets within the budget"} if random else {})
    return Plot(
        f"{name}: best so far" if name else "Best so far",
        Axis.over("evaluations", [0.0, float(len(view.search))]),
        Axis.over(axis_title(view.measure), known, is_wide(known)),
        lines=[Line(points, look, step=True) for points, look in ((ours, "found"), (random, "untrained")) if points],
        rules=[
            *(Rule("y", float(text), ", ".join(labels), look="hand-rule") for text, labels in lines.items()),
            *(Rule("x", at, source, look="rule step-rule") for source, at in _stages(view).items()),
        ],
        keys=keys,
        alt=f"{len(view.search)} evaluations" + (f", down to {ours[-1][1]:.3g}." if ours else "."),
    )


def _stages(view: SearchView) -> dict[str, float]:
    """Source => the evaluation from which on it proposes; without presets, what is given, and what proposes from the first on."""
    first: dict[str, float] = {}
    for i, e in enumerate(view.search, 1):
        first.setdefault(e.candidate.source, i - 0.5)
    return {source: at for source, at in first.items() if source not in (PRESET, GIVEN) and at > 1}


def front_plot(view: SearchView, name: str = "", width: float = 380, height: float = 300) -> Plot:
    """Quality against size: everything scored, presets and what was chosen by name, the budget, and the front of the finalists."""
    quantity, measure = view.quantity, view.measure
    scored = [e for e in view.search if e.score.finite is not None]
    marks = [_scored(view, e) for e in scored] + [_finalist(view, e) for e in view.finals if e.score.finite is not None]
    front = [(100 * view.share(e, quantity), e.score.value or 0.0) for e in view.front(quantity)]
    total = {"params": view.params(view.graph.total), "macs": view.graph.total.macs(view.convention)}
    outside = {"params": view.params(Cost()), "macs": 0}
    budgets = {
        text: 100 * (limit + outside[kind]) / total[kind]
        for text, (kind, limit) in view.limits.items()
        if kind == quantity and kind in total
    }
    ends = [e for m in marks for e in (m.band or (m.y, m.y))]
    return Plot(
        f"{name}: quality against size" if name else "Quality against size",
        Axis.over(
            f"{NAMES[quantity].format(scope=view.scope)}, % of the teacher",
            [*(m.x for m in marks), *budgets.values()],
        ),
        Axis.over(axis_title(measure), ends, is_wide(ends)),
        marks,
        [Line(front, "front found")] if front else [],
        [Rule("x", at, f"budget {text}") for text, at in budgets.items()],
        keys={"found dot": "finalist", "hand diamond": "design by hand", "found small": "scored", "single small": "single removal"},
        alt=f"Presets by name; budget {', '.join(view.limits) or 'none'}.",
        width=width,
        height=height,
    )


def _scored(view: SearchView, e: Evaluation) -> Mark:
    look = "single" if e.candidate.source == SCAN else "found"
    return Mark(100 * view.share(e, view.quantity), e.score.value or 0.0, look, _said(view, e), "small")


def _finalist(view: SearchView, e: Evaluation) -> Mark:
    known = e.candidate.source == PRESET
    named = known or e.candidate.arch in [c.candidate.arch for c in (view.chosen if view.ranked else [])]
    shape, look = ("diamond", "hand") if known else ("dot", "found")
    x = 100 * view.share(e, view.quantity)
    return Mark(x, e.score.value or 0.0, look, _said(view, e), shape, e.score.label if named else "", e.score.interval)


def _said(view: SearchView, e: Evaluation) -> str:
    score = with_interval(e.score.value, *(e.score.interval or (None, None)))
    return f"{e.score.label} ({e.candidate.source})\n{view.measure}: {score}\n{view.share(e, view.quantity):.1%} of the teacher"
