"""`blockprune distill`: train a chosen architecture with knowledge distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockprune.cli import options
from blockprune.cli.command import OUTPUT, command
from blockprune.stages.train.request import TrainRequest

Out = Annotated[Path | None, typer.Option(help="run directory; the same command again goes on", rich_help_panel=OUTPUT)]


def run(request: TrainRequest, out: Out = None, dry_run: options.DryRun = False, assume: options.Assume = None) -> None:
    if options.only_estimated(request, dry_run, assume):
        return
    from blockprune import api
    from blockprune.cli import console
    from blockprune.results import TrainResult
    from blockprune.stages.train.launch import helps

    arch = request.arch or ""
    folder = out or options.default_out("distill", Path(arch).stem if arch.endswith(".json") else arch)
    with console.progress(TrainResult.n_files, silent=helps()) as bars:
        trained = api.distill(request=request, out=folder, progress=bars)
        saved = trained.save(folder, bars) if trained.leads else ""
    if saved:
        print(saved)


distill = command(
    TrainRequest,
    run,
    "Train a pruned U-Net against its teacher and save a pipeline.",
    "blockprune distill --arch runs/search/best.json --ema",
    "blockprune distill --arch bk-sdm-small --teacher sd-v1-4 --data laion/ --mixed-precision bf16 --max-train-steps 50000",
)
