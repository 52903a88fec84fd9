"""`blockprune personalise`: teach a model a subject from a few images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockprune.cli import options
from blockprune.cli.command import OUTPUT, command
from blockprune.stages.personalise.request import PersonaliseRequest

Out = Annotated[Path | None, typer.Option(help="run directory; the same command again goes on", rich_help_panel=OUTPUT)]


def run(request: PersonaliseRequest, out: Out = None) -> None:
    from blockprune import api
    from blockprune.reports.personalisations import side_by_side

    folder = out or options.default_out("personalise", f"{Path(request.model).name}-{Path(request.instance_data_dir or '').name}")
    found = api.personalise(request=request, out=folder)
    if found.leads:
        print("\n".join(side_by_side({request.model: found.scores})))
        print(found.save(folder))


personalise = command(
    PersonaliseRequest,
    run,
    "Teach a model a subject from a few images (DreamBooth).",
    "blockprune personalise --model runs/distill-small --instance-data-dir dog/ --instance-prompt 'a photo of sks dog'",
    "blockprune personalise --model sd-v1-4 --instance-data-dir dog/ --instance-prompt 'a photo of sks dog' --rank 16 "
    "--with-prior-preservation --class-data-dir dogs/ --class-prompt 'a photo of a dog'",
)
