"""What an evaluation is asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from blockprune.errors import UserError
from blockprune.export.runtimes import RUNTIMES, TORCH
from blockprune.model.defaults import MOST_BATCH, MOST_GUIDANCE, MOST_IMAGES, MOST_STEPS
from blockprune.model.schedulers import MAX_SEED, SCHEDULERS
from blockprune.request import LONGEST_NAME, option
from blockprune.stages.fields import MEASURES, MODEL, REMOVE, SAMPLING, SCALE, Judging, OnModel

QUANTIZED = ("none", "int8", "int8-dynamic")
PER_SETTING = "several with commas between; a protocol may set its own"
TASKS = ("text2img", "img2img")


@dataclass(frozen=True, kw_only=True)
class EvaluateRequest(OnModel, Judging):
    """Which model is scored, under which protocol, for one setting or for every combination of several.

    `model` may also be a folder that was exported, or a distillation's run directory. With `checkpoints` it is the teacher of that
    run, which need not be named.
    """

    arch: str = option("full", "removed before: a preset, block names, or a JSON file", REMOVE)
    checkpoints: str | None = option(None, "a distill run: its checkpoints and its student", MODEL)
    teacher: str | None = option(
        None, "of a student's folder, for feature_distance: a model, or its evaluate run", MODEL, compared=False
    )
    task: str = option("text2img", "what is drawn", SAMPLING, choices=TASKS, compared=False)
    strength: tuple[float, ...] = option(
        (), "img2img: how much of the noise; several with commas between", SAMPLING, above=0, most=1, commas=True, compared=False
    )
    data: str | None = option(None, "img2img: a folder of images, edited by their captions; or digits", SAMPLING, compared=False)
    protocol: str = option("clean", "clean, bksdm-coco30k, or a .toml file", MEASURES)
    measures: tuple[str, ...] = option(
        (), "comma-separated; the protocol's, or those of img2img, when left out", MEASURES, commas=True
    )
    n_images: int | None = option(
        None, "images of each setting; a protocol may set its own", SAMPLING, least=1, most=MOST_IMAGES, from_model=True
    )
    steps: tuple[int, ...] = option(
        (), f"denoising steps; {PER_SETTING}", SAMPLING, least=1, most=MOST_STEPS, from_model=True, commas=True
    )
    cfg_scale: tuple[float, ...] = option(
        (), f"CFG scale, 1 for no guidance; {PER_SETTING}", SAMPLING, least=0, most=MOST_GUIDANCE, from_model=True, commas=True
    )
    scheduler: tuple[str, ...] = option(
        (), f"how noise is taken away; {PER_SETTING}", SAMPLING, choices=tuple(SCHEDULERS), from_model=True, commas=True
    )
    quantize: tuple[str, ...] = option(
        ("none",), "8-bit linear layers; several with commas between", SAMPLING, choices=QUANTIZED, commas=True
    )
    runtime: str = option(
        TORCH, "what computes the U-Net, on the CPU in float32; written for it first", SCALE, choices=RUNTIMES, compared=False
    )
    seed: int = option(0, "image i uses seed + i", SAMPLING, least=0, most=MAX_SEED)
    batch_size: int | None = option(
        None, "images at a time; changes speed and memory only", SCALE, least=1, most=MOST_BATCH, from_model=True, compared=False
    )
    latency: bool = option(False, "time a U-Net step in turn with the teacher's", MEASURES, compared=False)
    components: bool = option(False, "parameters, MACs and latency of each part", MEASURES, compared=False)
    rounds: int = option(10, "measured runs of each, teacher and student in turn", MEASURES, least=3, most=10**5, compared=False)
    save_images: bool = option(True, "keep every image file, not only those of the pictures", SCALE, compared=False)
    label: str | None = option(None, "what tables call the model", MODEL, longest=LONGEST_NAME, compared=False)

    def check(self) -> None:
        if self.checkpoints and self.arch not in ("", "full"):
            raise UserError("--checkpoints says what is removed: leave out --arch")
        if self.runtime != TORCH:
            self._check_runtime()
        self._check_task()

    def _check_task(self) -> None:
        if self.task == "img2img":
            if self.data is None:
                raise UserError("--task img2img edits images: give --data DIR, a folder of them, or --data digits")
            if not self.strength:
                raise UserError("--task img2img needs --strength: give numbers above 0 and up to 1, such as 0.3,0.5,0.8")
        elif self.strength or self.data is not None:
            given = "--strength" if self.strength else "--data"
            raise UserError(f"{given} is for images that are edited: give --task img2img, or leave it out")

    def _check_runtime(self) -> None:
        if self.latency or self.components or self.quantize != ("none",):
            raise UserError(
                "--runtime computes images alone: leave out --latency, --components and --quantize; see `blockprune cost`"
            )
        if self.device not in (None, "cpu") or self.dtype != "float32":
            raise UserError("--runtime computes on the CPU in float32: leave out --device and --dtype")

    @property
    def title(self) -> str:
        """What tables call the model, and what its run directory is named after."""
        folder = Path(os.path.abspath(self.checkpoints or self.model))
        name = (folder.parent if folder.name == "pipeline" else folder).name
        arch = Path(self.arch).stem if self.arch.endswith(".json") else self.arch
        return self.label or (name if arch in ("", "full") else f"{name} without {arch}")
