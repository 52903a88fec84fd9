"""Options that several commands share, and how their text becomes a value."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockprune.errors import UserError
from blockprune.model.architecture import CONVENTIONS
from blockprune.runs.directory import check_run_folder

if TYPE_CHECKING:
    import torch
    from rich.console import Console

LONGEST = 80
DTYPES = ("float32", "float16", "bfloat16")

Model = Annotated[
    str,
    typer.Option(
        help="tiny-digits, sd-v1-4, sd-v1-5, sd-v2-1-base, sd-v2-1, sdxl, a diffusers folder, a .safetensors file or a hub id."
    ),
]
Resolution = Annotated[str | None, typer.Option(help="Image size in pixels, 512 or HEIGHTxWIDTH; the model's own when left out.")]
Macs = Annotated[str, typer.Option(help=f"Which multiply-adds to show: {', '.join(CONVENTIONS)}.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, with every convention, instead of a table.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; cuda where there is one when left out.")]
Dtype = Annotated[str, typer.Option(help=f"Precision of the weights: {', '.join(DTYPES)}.")]
NImages = Annotated[int | None, typer.Option(help="images per architecture")]
Steps = Annotated[int | None, typer.Option(help="denoising steps")]
CfgScale = Annotated[float | None, typer.Option(help="classifier-free guidance scale; 1 for none")]
Scheduler = Annotated[str, typer.Option(help="ddim, pndm, euler, dpm++, …; default: the model's own")]
EpsSamples = Annotated[int | None, typer.Option(help="noisy samples for eps_mse and guided_mse, timesteps stratified")]
Data = Annotated[str | None, typer.Option(help="folder of images for eps_mse; default: the teacher's own samples")]
Prompts = Annotated[str | None, typer.Option(help="prompts: .txt, .csv or .jsonl")]
Reference = Annotated[str | None, typer.Option(help="real images for fid and kid: a folder or `blockprune stats` file")]
Detector = Annotated[str | None, typer.Option(help="inception, pytorch-fid, a transformers folder or hub id")]
InceptionWeights = Annotated[str | None, typer.Option(help="inception-2015-12-05.pt")]
Clip = Annotated[str | None, typer.Option(help="CLIP model for clip_score: folder or hub id")]
Seed = Annotated[int, typer.Option(help="image i uses seed + i")]
BatchSize = Annotated[int | None, typer.Option(help="images at a time; changes speed and memory only")]


def device_of(text: str | None) -> torch.device:
    """The device to run on; UserError when it is not there."""
    import torch

    try:
        device = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as err:
        raise UserError(
            f"cannot use the device {text!r} ({str(err).splitlines()[0][:100]}): give cpu, or a GPU that torch sees"
        ) from None
    if device.type == "meta":
        raise UserError("cannot use the device 'meta', which computes nothing: give cpu or cuda")
    return device


def dtype_of(text: str) -> torch.dtype:
    """The precision of that name."""
    import torch

    if text not in DTYPES:
        raise UserError(f"unknown dtype {text!r}: choose one of {', '.join(DTYPES)}")
    dtype = getattr(torch, text)
    assert isinstance(dtype, torch.dtype)
    return dtype


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


def at_least(name: str, value: int, least: int) -> int:
    if value < least:
        raise UserError(f"{name} must be at least {least}: got {value}")
    return value


def console() -> Console:
    """Standard output; wide enough for a table when it is not a terminal."""
    from blockprune.cli.console import PlainConsole

    return PlainConsole(width=None if sys.stdout.isatty() else 220, highlight=False, markup=False, emoji=False)


def print_json(data: Mapping[str, Any]) -> None:
    print(json.dumps(data, indent=2))
