"""What a personalisation is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace

from blockprune.errors import UserError
from blockprune.measures.subject import word
from blockprune.model.defaults import MOST_BATCH, MOST_IMAGES
from blockprune.request import option
from blockprune.stages.fields import MEASURES, MODEL, Measuring
from blockprune.stages.train.request import MOST_UPDATES, TRAINING, Stepping

SUBJECT, CLASS, LORA = "Subject", "Prior preservation", "LoRA"
FULL_RATE, LORA_RATE = 1e-6, 1e-4  # of BK-SDM's published runs
ALPHA, TEXT_ALPHA = 27 / 16, 17 / 16  # for each rank, as published with rank 16


@dataclass(frozen=True, kw_only=True)
class PersonaliseRequest(Stepping):
    """Which model learns which subject, from what, how long. Names of options are those of diffusers' train_dreambooth.py."""

    model: str = option(
        "tiny-digits", "what learns the subject: a model, an exported folder or a distill run", MODEL, compared=False
    )
    instance_data_dir: str | None = option(None, "folder with the subject's images", SUBJECT, compared=False)
    instance_prompt: str | None = option(None, "their prompt, such as 'a photo of sks dog'", SUBJECT, compared=False)
    protocol: str | None = option(None, "dreambooth or a .toml file: many subjects, each learnt anew", SUBJECT)
    dataset: str | None = option(None, "its folder, laid out as google/dreambooth has it", SUBJECT, compared=False)
    subjects: tuple[str, ...] = option((), "only these of it, with commas between", SUBJECT, commas=True, compared=False)
    token: str = option("sks", "the word of the prompts that names the subject", SUBJECT)
    with_prior_preservation: bool = option(False, "train on images of the subject's class as well", CLASS)
    prior_loss_weight: float = option(1.0, "weight of their loss", CLASS, least=0, most=1000)
    class_data_dir: str | None = option(None, "their folder; those that it lacks are drawn", CLASS, compared=False)
    class_prompt: str | None = option(
        None, "their prompt, such as 'a photo of a dog', or a .txt file of several in turn", CLASS, compared=False
    )
    num_class_images: int = option(200, "how many there must be", CLASS, least=1, most=MOST_IMAGES)
    teacher: str | None = option(None, "model that draws them; --model itself when left out", CLASS, compared=False)
    sample_batch_size: int = option(4, "how many are drawn at a time", CLASS, least=1, most=MOST_BATCH, compared=False)
    train_text_encoder: bool = option(False, "train the text encoder, too", TRAINING)
    rank: int | None = option(None, "train a LoRA of this rank in place of all weights", LORA, least=1, most=4096)
    lora_alpha: float | None = option(None, "its scale times its rank; 27/16 of the rank when left out", LORA, above=0, most=10**5)
    lora_text_encoder_alpha: float | None = option(
        None, "the same for the text encoder; 17/16 when left out", LORA, above=0, most=10**5
    )
    max_train_steps: int = option(800, "updates", TRAINING, least=1, most=MOST_UPDATES)
    train_batch_size: int = option(
        1, "the subject's images of one forward pass in one process", TRAINING, least=1, most=MOST_BATCH, compared=False
    )
    learning_rate: float | None = option(None, "1e-6 for all weights, 1e-4 for a LoRA when left out", TRAINING, above=0, most=10)
    clip: str | None = option(None, "CLIP model for clip_i and clip_t: folder or hub id", MEASURES)
    dino: str | None = option(None, "vision model for dino, such as facebook/dino-vits16: folder or hub id", MEASURES)

    def check(self) -> None:
        for name, given in {"rank": self.lora_alpha, "train_text_encoder": self.lora_text_encoder_alpha}.items():
            if given is not None and (self.rank is None or not getattr(self, name)):
                raise UserError(f"a scale of a LoRA goes with --rank and, of a text encoder, --train-text-encoder: got {given}")
        if self.protocol:
            self._check_benchmark()
            return
        if self.dataset or self.subjects:
            raise UserError("--dataset and --subjects are a protocol's: give --protocol dreambooth, or leave them out")
        if not self.instance_data_dir:
            raise UserError("no subject: give --instance-data-dir, a folder with 3 to 5 images of it")
        if not self.instance_prompt:
            raise UserError(f"no prompt of the subject: give --instance-prompt, such as 'a photo of {self.token} dog'")
        if not word(self.token).search(self.instance_prompt):
            raise UserError(
                f"--instance-prompt {self.instance_prompt!r} does not name the subject by its token {self.token!r}: "
                "write it in, or give another --token"
            )
        if self.with_prior_preservation and not (self.class_data_dir and self.class_prompt):
            raise UserError("--with-prior-preservation needs images of the class: give --class-data-dir and --class-prompt")

    def _check_benchmark(self) -> None:
        if not self.dataset:
            raise UserError(
                f"--protocol {self.protocol} needs its dataset: give --dataset, the folder of google/dreambooth (git clone "
                "https://github.com/google/dreambooth)"
            )
        for name in ("instance_data_dir", "instance_prompt", "class_prompt", "validation_prompts"):
            if getattr(self, name):
                raise UserError(f"--protocol {self.protocol} says what is learnt and drawn: leave out --{name.replace('_', '-')}")
        if self.with_prior_preservation and not self.class_data_dir:
            raise UserError("--with-prior-preservation needs a folder for images of the classes: give --class-data-dir")

    @property
    def rate(self) -> float:
        """The learning rate."""
        return self.learning_rate or (FULL_RATE if self.rank is None else LORA_RATE)

    def drawing(self) -> Measuring:
        judged = {"clip": self.clip, "dino": self.dino, "instance_data_dir": self.instance_data_dir, "token": self.token}
        return replace(super().drawing(), **judged)
