"""`blockprune cache`: encode training pairs once, so that training needs no VAE and no text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockprune.cli import options
from blockprune.cli.command import OUTPUT, command
from blockprune.stages.train.request import CacheRequest

Out = Annotated[Path | None, typer.Option(help="folder of the cache; the same command again goes on", rich_help_panel=OUTPUT)]


def run(request: CacheRequest, out: Out = None) -> None:
    from blockprune.progress import Bars
    from blockprune.stages.train.cache import encode

    folder = out or options.default_out("cache", Path(request.model).name)
    with Bars() as progress:
        record = encode(request, folder, progress)
    n, side, n_skipped = record["asked"]["n"], record["asked"]["resolution"], record["n_skipped"]
    n_bytes = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))
    skipped = f", {n_skipped} unreadable samples replaced by the next" if n_skipped else ""
    print(f"{folder}: {n} pairs at {side} pixels{skipped}, {n_bytes / 2**20:.1f} MiB")


cache = command(
    CacheRequest,
    run,
    "Encode the images and captions of training data, for `distill`; several processes may share the work.",
    "blockprune cache --n-images 1000",
    "blockprune cache --model sd-v1-4 --data 'laion/{00000..00012}.tar' --random-flip",
)
