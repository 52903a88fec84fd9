"""Values: how a model is evaluated, in a file that a user can copy, and the settings that one run compares. Needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from blockprune.assets import ASSETS
from blockprune.decode import read_named_toml
from blockprune.errors import UserError
from blockprune.measures.measure import MEASURES, measure
from blockprune.runs.parts import slug_of

PROTOCOLS = ASSETS / "protocols"
IMAGES = ("png", "jpeg")
FIDS = {"clean": "inception", "legacy_pytorch": "pytorch-fid"}  # the kind of FID => the detector that computes it
BOUNDS: Mapping[str, tuple[int, int]] = {
    "resize": (0, 2**14),
    "n_reference": (0, 10**8),
    "is_splits": (1, 10**6),
    "n_images": (1, 10**7),
    "steps": (1, 10_000),
    "cfg_scale": (0, 10_000),
}
# what a setting says for itself, and what two runs may differ in all the same
FREE = ("name", "hash", "steps", "cfg_scale", "scheduler", "quantize", "checkpoint")


@dataclass(frozen=True)
class Rules:
    """A protocol: what the image files are, how they are judged, and against what. None and "" leave it to command line and model.

    Images are drawn, written as `image`, and, where `resize` is not 0, read again, resized to that many pixels a side (bicubic,
    aspect not kept) and written again; judges see what the last file holds. Reference images go the same way.
    """

    image: str = "png"
    jpeg_quality: int = 75
    resize: int = 0
    fid: str = "clean"
    is_splits: int = 1
    measures: tuple[str, ...] = ("fid", "kid", "is", "clip_score")
    n_images: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    scheduler: str = ""
    resolution: str = ""
    clip: str = ""
    cycle_prompts: bool = True
    reference_folder: str = ""
    n_reference: int = 0
    prompts_file: str = ""

    def __post_init__(self) -> None:
        for name, known in {"image": IMAGES, "fid": tuple(FIDS)}.items():
            if getattr(self, name) not in known:
                raise UserError(f"protocol: {name} must be {' or '.join(known)}: got {getattr(self, name)!r}")
        for name, (least, most) in BOUNDS.items():
            if (value := getattr(self, name)) is not None and not value >= least:
                raise UserError(f"protocol: {name} must be at least {least}: got {value}")
            if value is not None and not value <= most:
                raise UserError(f"protocol: {name} must be at most {most:,}: got {value}")
        if not 1 <= self.jpeg_quality <= 100:
            raise UserError(f"protocol: jpeg_quality is between 1 and 100: got {self.jpeg_quality}")
        if not self.measures:
            raise UserError(f"protocol: measures is empty: name at least one of {', '.join(MEASURES)}")
        for name in self.measures:
            measure(name)

    @property
    def suffix(self) -> str:
        return ".png" if self.image == "png" else ".jpg"

    @property
    def file(self) -> str:
        """The image files in words, such as "jpeg, quality 75"."""
        return self.image if self.image == "png" else f"{self.image}, quality {self.jpeg_quality}"

    def judged(self) -> dict[str, Any]:
        """What of a protocol changes the numbers beside the images' own settings."""
        return {"image": self.file, "resize": self.resize, "fid": self.fid, "is_splits": self.is_splits}


def read_protocol(text: str) -> Rules:
    """The protocol of that name, or of a TOML file; UserError for a file that is not one, and for keys it may not have."""
    return read_named_toml("protocol", PROTOCOLS, text, Rules)


def protocol_hash(terms: Mapping[str, Any]) -> str:
    """12 digits over everything that must be equal for two runs to be compared; what FREE names may differ."""
    kept = {name: value for name, value in terms.items() if name not in FREE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Setting:
    """One way of drawing the images: denoising steps, CFG scale, scheduler ("" for the model's own), quantisation ("" for none)
    and, of a training run, the optimiser step of the checkpoint (None for the model itself); image to image, the strength."""

    steps: int
    cfg_scale: float
    scheduler: str = ""
    quantize: str = ""
    checkpoint: int | None = None
    strength: float | None = None

    @property
    def label(self) -> str:
        """Such as "CFG 3, 10 steps" or "step 500, strength 0.5, CFG 7.5, 25 steps, ddim, int8"."""
        first = [] if self.checkpoint is None else [f"step {self.checkpoint}"]
        first += [] if self.strength is None else [f"strength {self.strength:.10g}"]
        rest = [text for text in (self.scheduler, self.quantize) if text]
        return ", ".join([*first, f"CFG {self.cfg_scale:.10g}", f"{self.steps} steps", *rest])

    @property
    def slug(self) -> str:
        """The label as a file name."""
        return slug_of(self.label)

    @property
    def of_teacher(self) -> Setting:
        """How the teacher draws the images that those of this setting are paired with."""
        return replace(self, quantize="", checkpoint=None)

    def to_json(self) -> dict[str, Any]:
        known = asdict(self)
        if self.strength is None:  # as runs of earlier versions have it, which go on
            del known["strength"]
        return {"label": self.label, **known}


def grid(
    steps: Iterable[int],
    cfg_scales: Iterable[float],
    schedulers: Iterable[str] = ("",),
    quantize: Iterable[str] = ("",),
    checkpoints: Iterable[int | None] = (None,),
    strengths: Iterable[float | None] = (None,),
) -> Sequence[Setting]:
    """Every combination, each once: checkpoints outermost, then quantisation, scheduler, steps, CFG scale and strength."""
    order = product(checkpoints, quantize, schedulers, steps, cfg_scales, strengths)
    return list(dict.fromkeys(Setting(n, cfg, name, q, step, strength) for step, q, name, n, cfg, strength in order))
