"""Options that several commands share, and how their text becomes a value."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockprune.errors import UserError
from blockprune.model.graph import CONVENTIONS
from blockprune.runs.directory import check_run_folder

if TYPE_CHECKING:
    from rich.console import Console

    from blockprune.request import Request

LONGEST = 80

Model = Annotated[
    str,
    typer.Option(
        help="tiny-digits, sd-v1-4, sd-v1-5, sd-v2-1-base, sd-v2-1, sdxl, a diffusers folder, a .safetensors file or a hub id",
        rich_help_panel="Model",
    ),
]
Resolution = Annotated[
    str | None,
    typer.Option(help="image size in pixels, 512 or HEIGHTxWIDTH; the model's own when left out", rich_help_panel="Model"),
]
Macs = Annotated[str, typer.Option(help=f"which multiply-adds to show: {', '.join(CONVENTIONS)}", rich_help_panel="Output")]
AsJson = Annotated[
    bool, typer.Option("--json", help="print JSON, with every convention, instead of a table", rich_help_panel="Output")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="run nothing: print the passes, time, memory and disk to come", rich_help_panel="Output")
]
Assume = Annotated[
    str | None,
    typer.Option(
        help="for --dry-run: a device by its stated throughput, such as 'H100 fp16', in place of a measurement of this one",
        rich_help_panel="Output",
    ),
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1 …; cuda where there is one when left out", rich_help_panel="Scale")
]


def only_estimated(request: Request, dry_run: bool, assume: str | None) -> bool:
    """True where a command only says how long it would take, which is printed here; UserError for a device that is not known."""
    if not dry_run:
        if assume is not None:
            raise UserError(f"--assume {assume[:60]} is for an estimate: add --dry-run, or leave it out")
        return False
    from blockprune.cli.console import print_estimate
    from blockprune.progress import make_console
    from blockprune.stages.estimates import estimate

    print_estimate(estimate(request, assume), make_console())
    return True


def convention(text: str) -> str:
    if text not in CONVENTIONS:
        raise UserError(f"unknown MAC convention {text!r}: choose one of {', '.join(CONVENTIONS)}")
    return text


def default_out(command: str, name: str) -> Path:
    """The run directory of a command without --out: named after what it is about. Errors as for --out."""
    plain = re.sub(r"[^\w.+=-]+", "-", name)
    if len(os.fsencode(plain)) > LONGEST:
        plain = f"{plain[: LONGEST // 4]}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:12]}"
    folder = Path("runs") / f"{command}-{plain}"
    check_run_folder(folder)
    return folder


def console() -> Console:
    """Standard output, as wide as the terminal; wide enough for a table where there is none and COLUMNS says nothing."""
    from blockprune.progress import make_console

    return make_console()


def print_json(data: Mapping[str, Any]) -> None:
    print(json.dumps(data, indent=2))
