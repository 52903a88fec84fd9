"""`blockprune evaluate`: FID, Inception Score, KID and CLIP score of a model under a named protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockprune.cli import options
from blockprune.cli.command import OUTPUT, command
from blockprune.stages.evaluate.request import EvaluateRequest

Out = Annotated[
    Path | None,
    typer.Option(help="run directory; the same command again goes on, several at once share the work", rich_help_panel=OUTPUT),
]


def run(request: EvaluateRequest, out: Out = None, dry_run: options.DryRun = False, assume: options.Assume = None) -> None:
    if options.only_estimated(request, dry_run, assume):
        return
    from blockprune import api
    from blockprune.cli import console
    from blockprune.results import EvaluateResult

    folder = out or options.default_out("evaluate", request.title)
    with console.progress(EvaluateResult.n_files) as bars:
        result = api.evaluate(request=request, out=folder, progress=bars)
        result.save(folder, bars)
    console.print_evaluation(result.view, console.make_console())
    print(f"evaluate.csv, evaluate.json, rows and images are in {folder}")


evaluate = command(
    EvaluateRequest,
    run,
    "Score generated images under a protocol, for one setting or for every combination of several.",
    "blockprune evaluate --arch bk-sdm-small --steps 5,10 --cfg-scale 3,5",
    "blockprune evaluate --model runs/distill --protocol bksdm-coco30k --reference coco --device cuda",
)
