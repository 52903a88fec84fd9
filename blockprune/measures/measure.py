"""Every measure, whole: what it means, what it needs, how it is computed. Needs no torch, and the maths only to compute.

Adding one is one entry in `MEASURES`; a user's own function becomes one by `of_function`. What a run can measure, shows, ranks by
and may minimise follows from these entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from blockprune.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blockprune.measures.intervals import Statistic

Seen = Mapping[
    str, Any
]  # what judges see of images, arrays with one row per image: features, probs, image, text, input_l1, a user's own
Kind = Literal["denoising", "images", "cost", "timing"]
ARROWS = {"down": "↓", "up": "↑"}
# what a measure may need => how the command line gives it
NEEDS = {
    "detector": "a detector: give --detector",
    "classes": "a detector with classes: choose another --detector",
    "reference": "a reference: give --reference DIR or stats.npz",
    "reference features": "a reference with its features: make one with `blockprune stats`",
    "scorer": "a scorer: give --clip DIR or id",
    "guidance": "guidance: give --cfg-scale above 1",
    "input": "input images: give evaluate --task img2img --data DIR",
    "subject": "a subject's images: give --instance-data-dir",
    "vision": "a vision model: give --dino DIR or id",
    "training": "a training: `blockprune personalise` measures it",
}


@dataclass(frozen=True)
class Measure:
    """One measure: its unit, whether "down" or "up" is better, its title in tables and figures.

    `kind` says what it is measured on: noisy samples, drawn images, the architecture itself, or a clock. `paired` ones compare with
    the teacher sample by sample and are 0 for the teacher; `biased` ones compare at one number of images only.
    `compute(seen, teacher's, judges)` gives a measure of images its statistic; `look(images NCHW uint8, prompts) => (N,)` sees of
    each image what that needs, where the judges do not.
    """

    name: str
    unit: str
    direction: Literal["down", "up"]
    title: str
    kind: Kind
    needs: tuple[str, ...] = ()
    paired: bool = False
    compute: Callable[[Seen, Seen, Any], Statistic] | None = None
    look: Callable[[Any, Any], NDArray[Any]] | None = None
    biased: bool = False

    def __post_init__(self) -> None:
        if self.compute is not None and self.kind != "images":
            raise UserError(f"the measure {self.name!r} has its own compute: its kind is 'images', not {self.kind!r}")

    @property
    def heading(self) -> str:
        """The name with an arrow to where it is better."""
        return f"{self.name} {ARROWS[self.direction]}"

    @property
    def computable(self) -> bool:
        """False for one that a run named, and that this process knows nothing more of."""
        return self.compute is not None or self in _KNOWN

    @property
    def of_quality(self) -> bool:
        return self.kind in ("denoising", "images")

    def loss(self, value: float) -> float:
        """The value with the sign that makes larger worse."""
        return value if self.direction == "down" else -value

    def to_json(self) -> dict[str, Any]:
        fields = ("name", "unit", "direction", "title", "kind", "needs", "paired")
        return {name: getattr(self, name) for name in fields}


def _fid(seen: Seen, teacher: Seen, judges: Any) -> Statistic:
    from blockprune.measures import fid_kid

    return fid_kid.fid_statistic(seen["features"], judges.reference)


def _kid(seen: Seen, teacher: Seen, judges: Any) -> Statistic:
    from blockprune.measures import fid_kid

    return fid_kid.kid_statistic(seen["features"], judges.reference.features)


def _inception_score(seen: Seen, teacher: Seen, judges: Any) -> Statistic:
    from blockprune.measures import fid_kid

    return fid_kid.inception_statistic(seen["probs"], judges.is_splits)


def _clip_score(seen: Seen, teacher: Seen, judges: Any) -> Statistic:
    from blockprune.measures import fid_kid

    return _mean(fid_kid.clip_score(seen["image"], seen["text"]))


def _feature_distance(seen: Seen, teacher: Seen, judges: Any) -> Statistic:
    from blockprune.measures import fid_kid

    return _mean(fid_kid.feature_distance(seen["features"], teacher["features"]))


def _input_l1(seen: Seen, teacher: Seen, judges: Any) -> Statistic:
    return _mean(seen["input_l1"])


def _dino(seen: Seen, teacher: Seen, judges: Any) -> Statistic:
    return _mean(seen["dino"])


def _clip_i(seen: Seen, teacher: Seen, judges: Any) -> Statistic:
    return _mean(seen["clip_i"])


def _clip_t(seen: Seen, teacher: Seen, judges: Any) -> Statistic:
    return _mean(seen["clip_t"])


def _mean(values: Any) -> Statistic:
    from blockprune.measures import intervals

    return intervals.mean_statistic(values)


_KNOWN = (
    Measure("eps_mse", "", "down", "denoising error against the teacher", "denoising", paired=True),
    Measure("guided_mse", "", "down", "guided denoising error against the teacher", "denoising", ("guidance",), paired=True),
    Measure("fid", "", "down", "FID", "images", ("reference", "detector"), compute=_fid, biased=True),
    Measure("kid", "", "down", "KID", "images", ("reference", "reference features", "detector"), compute=_kid),
    Measure(
        "feature_distance", "", "down", "feature distance to the teacher's image", "images", ("detector",), True, _feature_distance
    ),
    Measure("clip_score", "cosine", "up", "CLIP score", "images", ("scorer",), compute=_clip_score),
    Measure("input_l1", "", "down", "L1 distance to the input image", "images", ("input",), compute=_input_l1),
    Measure("is", "", "up", "Inception Score", "images", ("detector", "classes"), compute=_inception_score, biased=True),
    Measure("dino", "cosine", "up", "DINO: cosine to the subject's images", "images", ("subject", "vision"), compute=_dino),
    Measure("clip_i", "cosine", "up", "CLIP-I: cosine to the subject's images", "images", ("subject", "scorer"), compute=_clip_i),
    Measure("clip_t", "cosine", "up", "CLIP-T: cosine to the prompt", "images", ("subject", "scorer"), compute=_clip_t),
    Measure("params", "parameters", "down", "U-Net parameters", "cost"),
    Measure("macs", "MACs", "down", "U-Net step MACs", "cost"),
    Measure("weight_bytes", "bytes", "down", "stored bytes of the U-Net's weights", "cost"),
    Measure("latency", "s", "down", "U-Net step latency", "timing"),
    Measure("latency_ratio", "x teacher", "down", "U-Net step latency relative to the teacher, interleaved", "timing"),
    Measure("memory", "bytes", "down", "peak memory of a U-Net step", "timing"),
    Measure("train_time", "s", "down", "time of all updates of a training", "timing", ("training",)),
    Measure("train_memory", "bytes", "down", "peak memory of an update", "timing", ("training",)),
)
MEASURES: dict[str, Measure] = {measure.name: measure for measure in _KNOWN}  # in the order in which they are shown


def measure(name: str) -> Measure:
    """The measure of that name; UserError lists those there are."""
    if name not in MEASURES:
        raise UserError(f"unknown measure {name!r}: choose from {', '.join(MEASURES)}")
    return MEASURES[name]


def names(*kinds: Kind) -> list[str]:
    """The measures of these kinds, in the order in which they are shown."""
    return [name for name, m in MEASURES.items() if m.kind in kinds]


def quality() -> list[str]:
    """The measures of quality, in the order in which they are shown; the first that a run has is the one it is ranked by."""
    return names("denoising", "images")


def of_drawings() -> list[str]:
    """The measures of quality that need no input images: what a scan or a search can score by."""
    return [name for name in quality() if "input" not in MEASURES[name].needs]


def define(new: Measure) -> Measure:
    """Makes a measure known to this process; one that is known already, by its description, stays as it is.

    UserError for a name that means another measure.
    """
    old = MEASURES.get(new.name)
    if old is None or (old.to_json() == new.to_json() and (new.compute or not old.compute)):
        MEASURES[new.name] = new
    elif old.to_json() != new.to_json():
        raise UserError(f"there is another measure {new.name!r} ({old.title}): rename one of them")
    return MEASURES[new.name]


def of_function(function: Callable[[Any, Any], Any], direction: Literal["down", "up"] = "up") -> Measure:
    """A user's own measure: the mean of `function(images NCHW uint8, prompts) => (N,) numbers`, named like the function.

    The first line of its docstring is the title. A function that has an attribute `direction`, "down" or "up", says itself which
    is better.
    """
    name = function.__name__
    title = (function.__doc__ or name.replace("_", " ")).strip().splitlines()[0].rstrip(".")

    def look(images: Any, prompts: Any) -> NDArray[Any]:
        import numpy as np

        values = np.asarray(function(images, prompts), dtype=np.float64)
        if values.shape != (len(images),):
            raise UserError(f"measure {name!r} must give one number for each of {len(images)} images: got shape {values.shape}")
        return values

    def compute(seen: Seen, teacher: Seen, judges: Any) -> Statistic:
        from blockprune.measures import intervals

        return intervals.mean_statistic(seen[name])

    way: Any = getattr(function, "direction", direction)
    return Measure(name, "", way, title, "images", compute=compute, look=look)


def chosen(wanted: Iterable[str | Measure | Callable[..., Any]]) -> list[str]:
    """The names of the measures that a user wants: by name, as a `Measure`, or as a function of images and prompts."""
    return [measure(w).name if isinstance(w, str) else define(w if isinstance(w, Measure) else of_function(w)).name for w in wanted]
