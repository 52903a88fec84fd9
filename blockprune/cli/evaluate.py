"""`blockprune evaluate`: FID, Inception Score, KID and CLIP score of a model under a named protocol."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockprune.cli import options


def evaluate(
    model: Annotated[
        str | None, typer.Option(help="as for scan, or a folder that export or distill wrote; default: tiny-digits")
    ] = None,
    arch: Annotated[str, typer.Option(help="removed before: a preset, block names, or a JSON file")] = "full",
    protocol: Annotated[str, typer.Option(help="clean, bksdm-coco30k, or a .toml file")] = "clean",
    checkpoints: Annotated[Path | None, typer.Option(help="a distill run: its checkpoints and its student")] = None,
    measures: Annotated[str | None, typer.Option(help="comma-separated: fid, kid, is, clip_score; default: the protocol's")] = None,
    n_images: options.NImages = None,
    steps: Annotated[list[str] | None, typer.Option(help="denoising steps; repeat or separate by commas for several")] = None,
    cfg_scale: Annotated[list[str] | None, typer.Option(help="CFG scale; repeat or separate by commas for several")] = None,
    scheduler: Annotated[list[str] | None, typer.Option(help="ddim, pndm, euler, dpm++, …; default: the model's own")] = None,
    quantize: Annotated[list[str] | None, typer.Option(help="none, int8 (weights) or int8-dynamic; several as above")] = None,
    prompts: options.Prompts = None,
    reference: Annotated[
        str | None, typer.Option(help="real images for fid and kid: a folder laid out as the protocol says, or a stats file")
    ] = None,
    detector: options.Detector = None,
    inception_weights: Annotated[str | None, typer.Option(help="weights file of the inception or pytorch-fid detector")] = None,
    clip: options.Clip = None,
    latency: Annotated[bool, typer.Option("--latency", help="time a U-Net step in turn with the teacher's")] = False,
    components: Annotated[bool, typer.Option("--components", help="parameters, MACs and latency of each part")] = False,
    rounds: Annotated[int, typer.Option(help="measured runs of each, teacher and student in turn")] = 10,
    save_images: Annotated[
        bool, typer.Option(help="keep the image files, without which a drawn image lives in memory only")
    ] = True,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = None,
    resolution: options.Resolution = None,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    label: Annotated[str | None, typer.Option(help="what tables call the model")] = None,
    out: Annotated[
        Path | None, typer.Option(help="run directory; the same command again goes on, several at once share the work")
    ] = None,
) -> None:
    """Score generated images under a protocol, for one setting or for every combination of several."""
    opts: dict[str, Any] = dict(locals())
    for name, kind in {"steps": int, "cfg_scale": float, "scheduler": str, "quantize": str}.items():
        opts[name] = [kind(text.strip()) for given in opts[name] or () for text in given.split(",")]
    opts["quantize"] = ["" if name == "none" else name for name in opts["quantize"]] or [""]
    if latency or components:
        options.at_least("--rounds", rounds, 3)
    from blockprune.cli import evaluating

    evaluating.run(opts)
