"""A report of any mixture of runs, written: a page, and its results beside it. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from blockprune.decode import Object, read_json
from blockprune.errors import UserError
from blockprune.reports.html.page import report_files
from blockprune.reports.report_data import report_data
from blockprune.reports.request import ReportRequest
from blockprune.reports.results import MADE_BY
from blockprune.runs import Readable
from blockprune.runs.atomic import writing
from blockprune.runs.directory import check_file


def write_report(request: ReportRequest, runs: Sequence[str | Path | Readable]) -> list[str]:
    """What the report lacks, a sentence each. `runs` are those that the request names, as folders or as they are in memory."""
    out = Path(request.out)
    _check_free(out)
    files = report_files(report_data(runs, request.allow_mismatch), request.macs)
    try:
        for suffix, content in files.items():
            with writing(out.with_suffix(suffix)) as temporary:
                temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
    except (PermissionError, NotADirectoryError, FileExistsError) as err:
        raise UserError(f"cannot write {request.out!r} ({err.strerror}): choose another --out") from None
    missing: list[str] = json.loads(files[".json"])["missing"]
    return missing


def _check_free(out: Path) -> None:
    """Raises UserError where a file would be replaced that no report has written."""
    check_file(out)
    beside = [out.with_suffix(suffix) for suffix in (".csv", ".json", ".tex")]
    with suppress(UserError):
        if read_json(out.with_suffix(".json"), Object, "").get("made_by") == MADE_BY:
            return
    if there := [path for path in beside if path.exists()]:
        raise UserError(f"{str(there[0])!r} is no result of an earlier report and would be replaced: choose another --out")
