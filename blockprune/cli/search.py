"""`blockprune search`: the best removal set under a budget."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockprune.cli import options
from blockprune.cli.command import OUTPUT, command
from blockprune.stages.search.request import SEARCH, SearchRequest

if TYPE_CHECKING:
    from blockprune.reports.search_view import SearchView

Out = Annotated[
    Path | None,
    typer.Option(
        help="run directory; the same command again goes on; --solve-only writes only where it is given", rich_help_panel=OUTPUT
    ),
]
SolveOnly = Annotated[
    bool, typer.Option("--solve-only", help="no forward pass: solve exactly on the scores of --from-scan", rich_help_panel=SEARCH)
]


def run(
    request: SearchRequest,
    solve_only: SolveOnly = False,
    out: Out = None,
    dry_run: options.DryRun = False,
    assume: options.Assume = None,
) -> None:
    if options.only_estimated(request, dry_run, assume):
        return
    if solve_only:
        _solve(request, out)
        return
    from blockprune import api
    from blockprune.cli import console
    from blockprune.results import SearchResult

    folder = out or options.default_out("search", Path(request.model).name)
    with console.progress(SearchResult.n_files) as bars:
        result = api.search(request=request, out=folder, progress=bars)
        result.save(folder, bars)
    console.print_finalists(result.view, console.make_console())
    for line in _loading(request.model, result.view):
        print(line)
    answer = "pareto.json" if result.view.is_front else "best.json"
    print(f"{answer}, finalists.csv, report.md and figures are in {folder}")


def _loading(model: str, view: SearchView) -> Iterator[str]:
    """What loads each student that the search answers with, a line each."""
    from blockprune.export.stock_config import expressible, who_loads
    from blockprune.model.pretrained import configs

    config = configs(model).unet
    return (f"{e.score.label}: {who_loads(expressible(config, e.candidate.arch))}" for e in view.chosen)


def _solve(request: SearchRequest, out: Path | None) -> None:
    from blockprune.cli import console
    from blockprune.stages.search.solve import solve

    solutions = solve(request)
    if out:
        solutions.save(out)
    if solutions.unscored:
        print(f"left out, for want of {solutions.request.measure} in {request.from_scan}: {', '.join(solutions.unscored)}")
    console.print_solutions(solutions.candidates, solutions.request.measure, solutions.graph.total, console.make_console())
    if out:
        print(f"best.json, the next ones as solution-2.json and so on, and solutions.json are in {out}")


search = command(
    SearchRequest,
    run,
    "Find the removal set that loses least within a budget, and write it to best.json; or a front, to pareto.json.",
    "blockprune search --budget 65%params",
    "blockprune search --model sd-v1-5 --budget 0.66B --device cuda",
)
