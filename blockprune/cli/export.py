"""`blockprune export`: a student as a whole pipeline's folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from blockprune.cli import options
from blockprune.errors import UserError
from blockprune.export.runtimes import FORMAT_PRECISIONS, PRECISIONS, check_precision

FORMATS = ("folder", "ldm", *FORMAT_PRECISIONS)
COMPONENTS = ("unet", "all")


Student = Annotated[
    Path,
    typer.Argument(
        help="Folder of a saved student, or a run directory with one as student/; for a runtime any model or exported folder."
    ),
]
Format = Annotated[
    str,
    typer.Option(
        help="folder: a diffusers pipeline; ldm: the U-Net alone as one .safetensors file, in the original names; for a runtime: "
        f"{', '.join(FORMAT_PRECISIONS)}."
    ),
]


def export(
    student: Student,
    out: Annotated[Path, typer.Option(help="The folder to write; with ldm the file.")],
    teacher: Annotated[
        str | None, typer.Option(help="The model that the student was cut from; the run's own when left out.")
    ] = None,
    format: Format = "folder",
    precision: Annotated[str, typer.Option(help="Of a runtime's weights: float32, float16, or int8 (onnx).")] = "float32",
    components: Annotated[str, typer.Option(help="For a runtime: unet, or all (text encoders and VAE as well).")] = "unet",
    resolution: options.Resolution = None,
) -> None:
    """Write a student as a diffusers pipeline: its teacher's parts, its own U-Net, and a model card; as one file; or for a runtime.

    Where a stock configuration can describe the student, any diffusers loads the folder; else `blockprune.load_pipeline` does. The
    file of `--format ldm` is for loaders of a U-Net alone that follow its names; its metadata says what the network lacks. What is
    written for a runtime is loaded there and compared with PyTorch, and must agree; it takes any batch and image size.

    Examples:

    $ blockprune export runs/distill --out my-student

    $ blockprune export student --teacher sd-v1-5 --out my-student

    $ blockprune export runs/distill --format ldm --out my-student.safetensors

    $ blockprune export runs/distill --format onnx --components all --out my-student-onnx
    """
    asked = (("format", format, FORMATS), ("precision", precision, PRECISIONS), ("components", components, COMPONENTS))
    for flag, value, known in asked:
        if value not in known:
            raise UserError(f"unknown --{flag} {value!r}: choose from {', '.join(known)}")
    if format in FORMAT_PRECISIONS:
        check_precision(format, precision)
        _for_runtime(str(student), out, format, precision, components == "all", resolution)
    elif (precision, components, resolution) != ("float32", "unet", None):
        flags = "--precision, --components and --resolution"
        raise UserError(f"{flags} are for a runtime's --format, {', '.join(FORMAT_PRECISIONS)}: leave them out, or give one")
    elif format == "ldm":
        _single_file(_student_folder(student), out)
    else:
        _folder(student, teacher, out)


def _folder(student: Path, teacher: str | None, out: Path) -> None:
    from blockprune.export.pipeline import card_entries, check_free, export_pipeline, load_student, read_architecture
    from blockprune.export.stock_config import Stock
    from blockprune.model.identity import identity
    from blockprune.model.pretrained import configs_of, load

    check_free(out)
    folder = _student_folder(student)
    model = teacher or _teacher_of(student)
    card = _card_of(student)
    arch = read_architecture(folder)
    unet = load_student(folder)
    pipe = load(model, dtype=unet.dtype)
    card = card_entries(model, configs_of(pipe), arch) | card
    found = export_pipeline(pipe, unet, arch, out, card, (model, identity(model)))
    print(f"{out}: {unet.num_parameters():,} U-Net parameters, the same outputs as the student")
    if isinstance(found, Stock):
        print(f"load it with diffusers: DiffusionPipeline.from_pretrained({str(out)!r})")
    else:
        print(f"no stock configuration: {found}")
        print(f"load it with blockprune.load_pipeline({str(out)!r})")


def _for_runtime(name: str, out: Path, format: str, precision: str, every: bool, resolution: str | None) -> None:
    from blockprune.export.pipeline import check_free, load_pipeline
    from blockprune.export.runtimes.deploy import ALLOWED, deploy
    from blockprune.export.runtimes.formats import format_of
    from blockprune.model.model import of_pipeline
    from blockprune.progress import Bars

    check_free(out)
    format_of(format, precision)
    run = Path(name, "pipeline")
    model = of_pipeline(load_pipeline(run if run.is_dir() else name), resolution)
    with Bars() as progress:
        for e in deploy(model, format, out, precision, every, progress):
            far = f"{e.real:.1e} of the output's size from PyTorch on what the model draws, {e.random:.1e} on random inputs"
            print(f"{out / e.file}: {e.n_bytes / 2**20:.1f} MiB; {far} ({ALLOWED[precision]:g} allowed)", flush=True)


def _single_file(folder: Path, out: Path) -> None:
    from blockprune.export.pipeline import load_student, read_architecture
    from blockprune.export.single_file import write_single_file
    from blockprune.export.stock_config import Stock

    found = write_single_file(load_student(folder), read_architecture(folder), out)
    print(f"{out}: the U-Net alone, under the names of the original checkpoints; its architecture is in the file's metadata")
    if isinstance(found, Stock):
        print(
            "load it with diffusers: UNet2DConditionModel.from_single_file(file, config=FOLDER, subfolder='unet'), FOLDER an export"
        )
    else:
        print(
            f"its blocks keep their places, with gaps, since there is no stock configuration ({found}): no other tool reads it yet"
        )


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
