"""`blockprune export`: a student as a whole pipeline's folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockprune.errors import UserError

if TYPE_CHECKING:
    from blockprune.model.architecture import Architecture


def export(
    student: Annotated[Path, typer.Argument(help="Folder of a saved student, or a run directory with one as student/.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    teacher: Annotated[
        str | None, typer.Option(help="The model that the student was cut from; the run's own when left out.")
    ] = None,
) -> None:
    """Write a student as a diffusers pipeline: its teacher's parts, its own U-Net, and a model card.

    Where a stock configuration can describe the student, any diffusers loads the folder; else `blockprune.load_pipeline` does.
    """
    from blockprune.export.pipeline import check_free, export_pipeline, load_student, read_architecture
    from blockprune.export.stock_config import Stock
    from blockprune.model.pretrained import identity, load

    check_free(out)
    folder = _student_folder(student)
    model = teacher or _teacher_of(student)
    card = _card_of(student)
    arch = read_architecture(folder)
    unet = load_student(folder)
    card = _named(model) | {"costs": _costs(unet.config, arch)} | card
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


def _named(model: str) -> dict[str, str]:
    """What the card calls the teacher: a hub id also as its base model, a local path by its last part."""
    from blockprune.model.pretrained import ALIASES

    if model in ALIASES:
        return {"teacher": model, "base_model": ALIASES[model].repo}
    if os.path.exists(model):
        return {"teacher": Path(model).resolve().name}
    return {"teacher": model} | ({"base_model": model} if "/" in model else {})


def _costs(config: Mapping[str, Any], arch: Architecture) -> dict[str, Any]:
    from blockprune.model.architecture import Architecture
    from blockprune.model.trace import trace

    graph = trace(config)
    return {"teacher": graph.cost(Architecture()).to_json(), "student": graph.cost(graph.check(arch)).to_json()}
