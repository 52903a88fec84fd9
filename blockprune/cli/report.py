"""`blockprune report`: one page from any mixture of runs."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from blockprune.cli import options
from blockprune.decode import Object, read_json
from blockprune.errors import UserError


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run directories of scan, search, distill and evaluate")],
    out: Annotated[Path, typer.Option(help="page to write; results go beside it as .csv, .json, .tex")] = Path("report.html"),
    macs: options.Macs = "thop",
    allow_mismatch: Annotated[
        bool, typer.Option("--allow-mismatch", help="a table each for models that were evaluated differently")
    ] = False,
) -> None:
    """Write one self-contained page about a teacher and its students.

    Examples:

    $ blockprune report runs/scan-tiny-digits runs/search-tiny-digits --out pages/tiny.html

    $ blockprune report runs/evaluate-* --allow-mismatch
    """
    convention = options.convention(macs)
    others = _free(out)
    from blockprune.reports.dossiers import dossier_of
    from blockprune.reports.html.page import report_files
    from blockprune.runs.atomic import writing

    dossier = dossier_of(runs, allow_mismatch)
    files = report_files(dossier, convention)
    try:
        for suffix, content in files.items():
            with writing(out.with_suffix(suffix)) as temporary:
                temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
    except (PermissionError, NotADirectoryError, FileExistsError) as err:
        raise UserError(f"cannot write {str(out)!r} ({err.strerror}): choose another --out") from None
    print(f"{out}: {len(files['.html'].encode()) / 1e6:.2f} MB; results also in {', '.join(str(path) for path in others)}")
    if n := len(json.loads(files[".json"])["missing"]):
        print(f"{n} {'thing is' if n == 1 else 'things are'} missing: see the page")


def _free(out: Path) -> list[Path]:
    """The files beside the page. Raises UserError where these would replace what no report has written."""
    from blockprune.reports.results import MADE_BY

    if out.is_dir():
        raise UserError(f"--out must be a file: {str(out)!r} is a directory; say {str(out / 'report.html')!r}")
    if out.suffix != ".html":
        raise UserError(f"--out must end with .html: got {str(out)!r}")
    others = [out.with_suffix(suffix) for suffix in (".csv", ".json", ".tex")]
    there = [path for path in others if path.exists()]
    with suppress(UserError):
        if there and read_json(others[1], Object, "").get("made_by") == MADE_BY:
            return others
    if there:
        raise UserError(f"{str(there[0])!r} is no result of an earlier report and would be replaced: choose another --out")
    return others
