"""`blockprune cache`: encode training pairs once, so that training needs no VAE and no text encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockprune.cli import options
from blockprune.errors import UserError


def cache(
    data: Annotated[
        str | None, typer.Option(help="folder with metadata.csv or metadata.jsonl, .tar shards as 'x/{000..012}.tar', or digits")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the cache; the same command again goes on")] = None,
    model: options.Model = "tiny-digits",
    n_images: Annotated[int | None, typer.Option(help="only the first so many pairs")] = None,
    resolution: options.Resolution = None,
    flip: Annotated[bool, typer.Option(help="hold every image mirrored as well, for training with --flip")] = False,
    shard_size: Annotated[int, typer.Option(help="pairs per file")] = 512,
    batch_size: Annotated[int, typer.Option(help="images at a time; 1 encodes each as training without a cache does")] = 1,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
) -> None:
    """Encode the images and captions of training data, for `distill`; several processes may share the work."""
    from blockprune.cli import console
    from blockprune.data import encoded as caches
    from blockprune.data import training_data
    from blockprune.model import pretrained
    from blockprune.stages import inputs

    data = inputs.training_data(model, data, "--data")
    config = pretrained.configs(model)
    height, width = (side * config.vae_factor for side in config.latent(resolution))
    if height != width:
        raise UserError(f"a cache needs a square resolution: got {height}x{width}")
    reader = training_data.Reader(training_data.source_of(data, height, n_images))
    pipe = pretrained.load(model, options.device_of(device), options.dtype_of(dtype))
    folder = out or options.default_out("cache", Path(model).name)
    left = caches.unfinished(folder, len(reader), shard_size)
    teacher = pretrained.identity(model)
    with console.WorkProgress(console.make_console(stderr=True), left) as progress:
        said = caches.write_cache(
            pipe, reader, folder, shard_size, teacher=teacher, flip=flip, chunk=batch_size, tick=progress.tick
        )
    n_bytes = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))
    skipped = f", {said['n_skipped']} unreadable samples replaced by the next" if said["n_skipped"] else ""
    print(f"{folder}: {len(reader)} pairs at {height} pixels{skipped}, {n_bytes / 2**20:.1f} MiB")
