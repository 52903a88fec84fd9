"""`blockprune personalise`: teach a model a subject from a few images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockprune.cli import options
from blockprune.cli.command import OUTPUT, command
from blockprune.stages.personalise.request import PersonaliseRequest

Out = Annotated[Path | None, typer.Option(help="run directory; the same command again goes on", rich_help_panel=OUTPUT)]


Beside = Annotated[
    list[Path] | None,
    typer.Option(help="earlier run, such as the teacher's, shown in the same table; repeatable", rich_help_panel=OUTPUT),
]


def run(
    request: PersonaliseRequest,
    out: Out = None,
    beside: Beside = None,
    dry_run: options.DryRun = False,
    assume: options.Assume = None,
) -> None:
    if request.instance_data_dir:
        from blockprune.data.subject_images import subject_pixels

        subject_pixels(Path(request.instance_data_dir))
    if options.only_estimated(request, dry_run, assume):
        return
    from blockprune import api
    from blockprune.cli import console
    from blockprune.reports.personalisations import last_scores, side_by_side
    from blockprune.results import PersonaliseResult
    from blockprune.runs.directory import Stored
    from blockprune.stages.train.launch import helps

    earlier = {str(path): Stored(path, "personalise") for path in beside or ()}
    rows = {name: last_scores(stored) for name, stored in earlier.items()}
    what = Path(request.instance_data_dir or request.dataset or "").name
    folder = out or options.default_out("personalise", f"{Path(request.model).name}-{what}")
    with console.progress(PersonaliseResult.n_files, silent=helps()) as bars:
        found = api.personalise(request=request, out=folder, progress=bars)
        saved = found.save(folder, bars) if found.leads else ""
    if found.leads:
        print("\n".join(side_by_side({**rows, **found.subjects, str(folder): found.scores})))
        print(saved)


personalise = command(
    PersonaliseRequest,
    run,
    "Teach a model a subject from a few images (DreamBooth).",
    "blockprune personalise --model runs/distill-small --instance-data-dir dog/ --instance-prompt 'a photo of sks dog'",
    "blockprune personalise --model sd-v1-4 --instance-data-dir dog/ --instance-prompt 'a photo of sks dog' --rank 16 "
    "--with-prior-preservation --class-data-dir dogs/ --class-prompt 'a photo of a dog'",
)
