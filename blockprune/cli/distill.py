"""`blockprune distill`: train a chosen architecture with knowledge distillation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from blockprune.cli import options
from blockprune.errors import UserError

PRECISIONS = ("no", "fp16", "bf16")
TRACKERS = ("tensorboard", "wandb")


def distill(
    arch: Annotated[
        str, typer.Option(help="what is removed: best.json of a search (heed its warning), a preset, block names or a JSON file")
    ],
    teacher: Annotated[list[str] | None, typer.Option(help="model to learn from; repeat for several in succession")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="image folder, img2dataset .tar pattern, `blockprune cache` folder, or digits; default: the model's own"),
    ] = None,
    recipe: Annotated[str, typer.Option(help="bk-sdm, segmind, or a .toml file")] = "bk-sdm",
    train_batch_size: Annotated[int, typer.Option(help="images of one forward pass in one process")] = 16,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="forward passes before an update")] = 1,
    max_train_steps: Annotated[int, typer.Option(help="updates, over all phases of the recipe")] = 1000,
    learning_rate: Annotated[float | None, typer.Option(help="in place of the recipe's")] = None,
    mixed_precision: Annotated[str, typer.Option(help=f"{', '.join(PRECISIONS)}")] = "no",
    gradient_checkpointing: Annotated[bool, typer.Option(help="less memory, more time")] = False,
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile: minutes at the start, then faster updates")] = False,
    ema: Annotated[bool, typer.Option(help="keep a moving average of the weights and export that")] = False,
    checkpointing_steps: Annotated[int, typer.Option(help="updates between checkpoints")] = 500,
    checkpoints_total_limit: Annotated[int, typer.Option(help="how many checkpoints stay")] = 3,
    validation_steps: Annotated[int | None, typer.Option(help="updates between validations; default: at the end only")] = None,
    validation_prompts: Annotated[str | None, typer.Option(help="prompts of validation images: .txt, .csv or .jsonl")] = None,
    report_to: Annotated[str | None, typer.Option(help=f"accelerate tracker: {', '.join(TRACKERS)}")] = None,
    flip: Annotated[bool, typer.Option("--random-flip", help="mirror half of the images")] = False,
    n_images: options.NImages = None,
    steps: options.Steps = None,
    cfg_scale: options.CfgScale = None,
    seed: options.Seed = 0,
    resolution: options.Resolution = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="leave a GPU alone")] = False,
    out: Annotated[Path | None, typer.Option(help="run directory; the same command again goes on")] = None,
) -> None:
    """Train a pruned U-Net against its teacher and save a pipeline."""
    opts = _checked(dict(locals()))
    from blockprune.cli import training

    training.run(opts, out or options.default_out("distill", Path(arch).stem if arch.endswith(".json") else arch))


def _checked(opts: dict[str, Any]) -> dict[str, Any]:
    """The options, where nothing in them is wrong by itself."""
    opts["teacher"] = opts["teacher"] or ["tiny-digits"]
    for name, known in {"mixed_precision": PRECISIONS, "report_to": TRACKERS}.items():
        if opts[name] is not None and opts[name] not in known:
            raise UserError(f"unknown --{name.replace('_', '-')} {opts[name]!r}: choose from {', '.join(known)}")
    return opts
