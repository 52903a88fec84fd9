"""What any training is asked for, what a distillation is, and what a cache of training pairs is."""

from __future__ import annotations

from dataclasses import dataclass

from blockprune.errors import UserError
from blockprune.model.architecture import FITS
from blockprune.model.defaults import MOST_BATCH, MOST_GUIDANCE, MOST_IMAGES, MOST_STEPS
from blockprune.model.schedulers import MAX_SEED, SCHEDULERS
from blockprune.request import Request, option
from blockprune.stages.fields import SCALE, Measuring, OnModel

STUDENT, DATA, TRAINING, CHECKPOINTS, VALIDATION = "Student", "Data", "Training", "Checkpoints", "Validation"
PRECISIONS = ("no", "fp16", "bf16")
TRACKERS = ("tensorboard", "wandb")
MOST_UPDATES = MOST_PAIRS = 10**9
PAIRS = "image folder with metadata.csv or metadata.jsonl, .tar shards as 'x/{000..012}.tar'"


@dataclass(frozen=True, kw_only=True)
class Stepping(Request):
    """How any training is cut into updates, kept and looked at on the way."""

    resolution: str | None = option(
        None, "image size in pixels, 512 or HEIGHTxWIDTH; the model's own when left out", DATA, compared=False
    )
    random_flip: bool = option(False, "mirror half of the images", DATA)
    max_train_steps: int = option(
        1000, "updates, over all phases of the recipe", TRAINING, least=1, most=MOST_UPDATES, compared=False
    )
    train_batch_size: int = option(
        16, "images of one forward pass in one process", TRAINING, least=1, most=MOST_BATCH, compared=False
    )
    gradient_accumulation_steps: int = option(
        1, "forward passes before an update", TRAINING, least=1, most=MOST_BATCH, compared=False
    )
    learning_rate: float | None = option(None, "in place of the recipe's", TRAINING, above=0, most=10, compared=False)
    mixed_precision: str = option("no", "of forward and backward passes", TRAINING, choices=PRECISIONS)
    seed: int = option(0, "of data order, noise and timesteps", TRAINING, least=0, most=MAX_SEED)
    checkpointing_steps: int = option(500, "updates between checkpoints", CHECKPOINTS, least=1, most=MOST_UPDATES, compared=False)
    checkpoints_total_limit: int = option(3, "how many checkpoints stay", CHECKPOINTS, least=1, most=10**6, compared=False)
    report_to: str | None = option(None, "accelerate tracker", CHECKPOINTS, choices=TRACKERS, compared=False)
    validation_steps: int | None = option(
        None, "updates between validations; at the end only when left out", VALIDATION, least=1, most=MOST_UPDATES, compared=False
    )
    validation_prompts: str | None = option(None, "prompts of validation images: .txt, .csv or .jsonl", VALIDATION, compared=False)
    n_images: int | None = option(
        None, "images of a validation", VALIDATION, least=1, most=MOST_IMAGES, from_model=True, compared=False
    )
    denoising_steps: int | None = option(
        None, "denoising steps of those", VALIDATION, name="steps", least=1, most=MOST_STEPS, from_model=True, compared=False
    )
    cfg_scale: float | None = option(
        None, "guidance scale of those; 1 for none", VALIDATION, least=0, most=MOST_GUIDANCE, from_model=True, compared=False
    )
    scheduler: str | None = option(None, "the model's own when left out", VALIDATION, choices=tuple(SCHEDULERS), compared=False)
    gradient_checkpointing: bool = option(False, "less memory, more time", SCALE, compared=False)
    device: str | None = option(
        None, "cpu, cuda, cuda:1 …; cuda where there is one, or accelerate's, when left out", SCALE, compared=False
    )

    def drawing(self) -> Measuring:
        """How validation images are drawn and judged."""
        return Measuring(
            n_images=self.n_images,
            steps=self.denoising_steps,
            cfg_scale=self.cfg_scale,
            scheduler=self.scheduler,
            seed=self.seed,
            prompts=self.validation_prompts,
        )


@dataclass(frozen=True, kw_only=True)
class TrainRequest(Stepping):
    """Which student is trained, against which teachers, on what, how long."""

    # teachers, architecture, recipe and data are compared by what they stand for
    arch: str | None = option(
        None,
        "what is removed: best.json of a search (heed its warning), a preset, block names or a JSON file",
        STUDENT,
        compared=False,
    )
    fit: str | None = option(
        None,
        "a map fitted in place of each removed block, from whose weights training starts; what --arch says when left out",
        STUDENT,
        choices=("none", *FITS),
        compared=False,
    )
    teacher: tuple[str, ...] = option(
        ("tiny-digits",), "model to learn from; repeat for several in succession", STUDENT, compared=False
    )
    data: str | None = option(
        None, f"{PAIRS}, `blockprune cache` folder, or digits; the model's own when left out", DATA, compared=False
    )
    recipe: str = option("bk-sdm", "bk-sdm, segmind, or a .toml file", TRAINING, compared=False)
    ema: bool = option(False, "keep a moving average of the weights and export that", TRAINING)
    compile: bool = option(False, "torch.compile: minutes at the start, then faster updates", SCALE, compared=False)

    def check(self) -> None:
        if self.arch is None:
            raise UserError(
                "no architecture: give --arch best.json of a search, a preset, block names, or full for the whole U-Net"
            )
        if not self.teacher:
            raise UserError("no teacher: give --teacher, or leave it out for the built-in model")


@dataclass(frozen=True, kw_only=True)
class CacheRequest(OnModel):
    """Which training pairs are encoded, by which model."""

    data: str | None = option(None, f"{PAIRS}, or digits; the model's own when left out", DATA)
    n_images: int | None = option(None, "only the first so many pairs", DATA, least=1, most=MOST_PAIRS)
    random_flip: bool = option(False, "hold every image mirrored as well, for training with --random-flip", DATA)
    shard_size: int = option(512, "pairs per file", SCALE, least=1, most=MOST_IMAGES)
    batch_size: int = option(
        1, "images at a time; 1 encodes each as training without a cache does", SCALE, least=1, most=MOST_BATCH
    )
