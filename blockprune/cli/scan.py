"""`blockprune scan`: score every removal without retraining."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockprune.cli import options
from blockprune.cli.command import OUTPUT, command
from blockprune.stages.scan.request import ScanRequest

Out = Annotated[Path | None, typer.Option(help="run directory; the same command again resumes it", rich_help_panel=OUTPUT)]


def run(request: ScanRequest, out: Out = None, dry_run: options.DryRun = False, assume: options.Assume = None) -> None:
    if options.only_estimated(request, dry_run, assume):
        return
    from blockprune import api
    from blockprune.cli import console
    from blockprune.results import ScanResult

    folder = out or options.default_out("scan", Path(request.model).name)
    with console.progress(ScanResult.n_files) as bars:
        result = api.scan(request=request, out=folder, progress=bars)
        result.save(folder, bars)
    console.print_ranking(result.view, console.make_console())
    print(f"rows, tables, figures and report.md are in {folder}")


scan = command(
    ScanRequest,
    run,
    "Score the teacher and every single removal, without retraining.",
    "blockprune scan --unit pair",
    "blockprune scan --model sd-v1-5 --measures eps_mse,latency --device cuda",
)
