"""`blockprune export`: a student as a whole pipeline's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from blockprune.errors import UserError


def export(
    student: Annotated[Path, typer.Argument(help="Folder of a saved student, or a run directory with one as student/.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    teacher: Annotated[
        str | None, typer.Option(help="The model that the student was cut from; the run's own when left out.")
    ] = None,
) -> None:
    """Write a student as a diffusers pipeline: its teacher's parts, its own U-Net, and a model card.

    Where a stock configuration can describe the student, any diffusers loads the folder; else `blockprune.load_pipeline` does.

    Examples:

    $ blockprune export runs/distill --out my-student

    $ blockprune export student --teacher sd-v1-5 --out my-student
    """
    from blockprune.export.pipeline import card_entries, check_free, export_pipeline, load_student, read_architecture
    from blockprune.export.stock_config import Stock
    from blockprune.model.identity import identity
    from blockprune.model.pretrained import load

    check_free(out)
    folder = _student_folder(student)
    model = teacher or _teacher_of(student)
    card = _card_of(student)
    arch = read_architecture(folder)
    unet = load_student(folder)
    card = card_entries(model, unet.config, arch) | card
    found = export_pipeline(load(model, dtype=unet.dtype), unet, arch, out, card, (model, identity(model)))
    print(f"{out}: {unet.num_parameters():,} U-Net parameters, the same outputs as the student")
    if isinstance(found, Stock):
        print(f"load it with diffusers: DiffusionPipeline.from_pretrained({str(out)!r})")
    else:
        print(f"no stock configuration: {found}")
        print(f"load it with blockprune.load_pipeline({str(out)!r})")


def _student_folder(given: Path) -> Path:
    """The folder that holds the student itself."""
    from blockprune.export.pipeline import ARCHITECTURE

    for folder in (given, given / "student"):
        if (folder / ARCHITECTURE).is_file():
            return folder
    wanted = f"the folder of a saved student ({ARCHITECTURE}, weights, config.json) or a run with one as student/"
    raise UserError(f"no student in {str(given)!r}: give {wanted}")


def _teacher_of(run: Path) -> str:
    from blockprune.runs.directory import read_run

    asked = read_run(run).get("asked") if (run / "run.json").is_file() else None
    model = asked.get("teacher_model") if isinstance(asked, Mapping) else None
    if not isinstance(model, str):
        raise UserError(f"{str(run)!r} does not say which model its student was cut from: give --teacher")
    return model


def _card_of(run: Path) -> dict[str, Any]:
    """The entries of the run's card.json; none when it has no such file."""
    from blockprune.decode import Object, read_json

    path = run / "card.json"
    return read_json(path, Object, "mend it or delete it") if path.exists() else {}
