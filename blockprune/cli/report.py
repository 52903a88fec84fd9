"""`blockprune report`: one page from any mixture of runs."""

from __future__ import annotations

from blockprune.cli.command import command
from blockprune.reports.request import ReportRequest


def run(request: ReportRequest) -> None:
    from blockprune import api

    result = api.report(request=request)
    size = result.page.stat().st_size / 1e6
    print(f"{result.page}: {size:.2f} MB; results also in {', '.join(map(str, result.files))}")
    if n := len(result.missing):
        print(f"{n} {'thing is' if n == 1 else 'things are'} missing: see the page")


report = command(
    ReportRequest,
    run,
    "Write one self-contained page about a teacher and its students.",
    "blockprune report runs/scan-tiny-digits runs/search-tiny-digits --out pages/tiny.html",
    "blockprune report runs/evaluate-* --allow-mismatch",
)
