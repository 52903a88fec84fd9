"""What a report is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from blockprune.errors import UserError
from blockprune.model.graph import CONVENTIONS
from blockprune.request import Request, option

OUTPUT = "Output"


@dataclass(frozen=True, kw_only=True)
class ReportRequest(Request):
    """Which runs to show, and where the page goes."""

    runs: tuple[str, ...] = option((), "run directories of scan, search, distill and evaluate", OUTPUT, argument="RUN...")
    out: str = option("report.html", "page to write; results go beside it as .csv, .json, .tex", OUTPUT)
    macs: str = option("thop", "which multiply-adds to show", OUTPUT, choices=CONVENTIONS)
    allow_mismatch: bool = option(False, "a table each for models that were evaluated differently", OUTPUT)

    def check(self) -> None:
        if not self.runs:
            raise UserError("a report is made of runs: give at least one run directory")
        if not self.out.endswith(".html"):
            raise UserError(f"--out must end with .html: got {self.out!r}")
