"""A search's run as one value, and the files made from it. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator

from blockprune.measures.score import TEACHER, Score, timed_in_turn
from blockprune.model.architecture import Architecture
from blockprune.model.graph import BlockGraph
from blockprune.reports import search_text
from blockprune.reports.scans import pictures
from blockprune.reports.search_view import SearchView
from blockprune.reports.table import to_csv
from blockprune.runs import Readable
from blockprune.runs.reading import rows_of
from blockprune.runs.records import Evaluation
from blockprune.stages.search.budget import parse_budgets

KINDS = ("search", "random", "heard", "final", "recovered")


def search_view(run: Readable, unread: list[str] | None = None) -> SearchView:
    """What a search's run says; sentences in `unread` tell of damaged rows and pictures."""
    about, rows = run.about, rows_of(run, unread)
    graph, asked = BlockGraph.from_json(about["graph"]), about["asked"]
    evaluations = {kind: [Evaluation.from_json(row) for row in rows if row["kind"] == kind] for kind in KINDS}
    scores: dict[str, dict[str, Score]] = {}
    for row in rows:
        records = row["scores"] if row["kind"] == "seen" else [row] if row["kind"] == "timing" else []
        for score in timed_in_turn(map(Score.from_json, records)):
            scores.setdefault(score.label, {})[score.measure] = score
    full = scores.get(TEACHER, {}).get("latency")
    scope = (about["outside_params"], full.value if full else None, asked["macs"], asked["scope"])
    limits = {b.text: (b.quantity, b.limit) for text in asked["budget"] for b in parse_budgets(text, graph, *scope)}
    archs = {e.score.label: e.candidate.arch for e in evaluations["final"]}
    prompts = about.get("pictured_prompts", [])
    return SearchView(
        protocol={"model": about["model"], **asked, **about.get("made_with", {})},
        graph=graph,
        outside_params=about["outside_params"],
        limits=limits,
        search=sorted(evaluations["search"], key=lambda e: e.trial),
        random=sorted(evaluations["random"], key=lambda e: e.trial),
        finals=evaluations["final"],
        recovered=evaluations["recovered"],
        heard=evaluations["heard"],
        scores=scores,
        images=pictures(run, {TEACHER: Architecture(), **archs}, len(prompts), unread),
        prompts=prompts,
    )


def report_files(view: SearchView) -> Iterator[tuple[str, bytes]]:
    """(name, contents) of every file of a search's report: finalists.csv, report.md and figures, pareto.json for a front, best.json
    unless there are no budgets to be best within. A search that found nothing raises UserError before the first."""
    from blockprune.reports.canvas import encoded
    from blockprune.reports.search_figures import search_figures

    if view.chosen and not view.is_front:
        yield "best.json", search_text.best_json(view).encode()
    yield "finalists.csv", to_csv(search_text.rows(view)).encode()
    if view.protocol["pareto"]:
        yield "pareto.json", search_text.pareto_json(view).encode()
    drawn: list[str] = []
    for name, figure in search_figures(view):
        drawn.append(name)
        yield name, encoded(figure)
    yield "report.md", search_text.search_markdown(view, drawn).encode()
