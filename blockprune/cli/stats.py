"""`blockprune stats`: the statistics of a folder of real images, as a reference for FID and KID."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from blockprune.cli import options


def stats(
    folder: Annotated[Path, typer.Argument(help="Folder of images.")],
    out: Annotated[Path, typer.Argument(help="The .npz file to write.")],
    detector: Annotated[str, typer.Option(help="inception, tiny-digits, a transformers folder or hub id.")] = "inception",
    inception_weights: Annotated[Path | None, typer.Option(help="inception-2015-12-05.pt")] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 32,
    device: options.Device = None,
) -> None:
    """Write what `--reference` takes: mean, covariance and features of the images of a folder.

    Examples:

    $ blockprune stats photos photos.npz

    $ blockprune stats val2014 coco.npz --detector inception --device cuda
    """
    from blockprune.data.image_folder import ImageFolder, stats_of_folder, write_stats
    from blockprune.measures.detectors import load_detector
    from blockprune.model.device import device_of

    images = ImageFolder(folder)
    judge = load_detector(detector, str(device_of(device)), inception_weights)
    found = stats_of_folder(images, judge, batch_size)
    write_stats(out, found, judge.name)
    skipped = f", {len(images.skipped)} unreadable images skipped" if images.skipped else ""
    print(f"{out}: {found.n} images{skipped}, {judge.n_features} features by {judge.name}")
