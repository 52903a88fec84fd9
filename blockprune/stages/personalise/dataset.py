"""A benchmark of many subjects: how each is named and drawn, and its dataset, laid out as google/dreambooth has it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from blockprune.assets import ASSETS
from blockprune.data.image_files import IMAGE_SUFFIXES
from blockprune.data.subject_images import FEWEST
from blockprune.decode import read_bytes, read_named_toml
from blockprune.errors import UserError
from blockprune.model.schedulers import SCHEDULERS
from blockprune.stages.personalise.request import PersonaliseRequest

BENCHMARKS = ASSETS / "benchmarks"
LIST = "prompts_and_classes.txt"


@dataclass(frozen=True)
class Benchmark:
    """The rules of a benchmark. Prompts of training hold {class}, those of the subject {token} as well."""

    n_subjects: int
    n_prompts: int
    images_per_prompt: int
    instance_prompt: str
    class_prompt: str
    steps: int
    cfg_scale: float
    live: tuple[str, ...] = ()
    scheduler: str = ""
    clip: str = ""
    dino: str = ""

    def __post_init__(self) -> None:
        for name in ("n_subjects", "n_prompts", "images_per_prompt", "steps"):
            if not 1 <= getattr(self, name) <= 10**4:
                raise UserError(f"protocol: {name} must be from 1 to 10,000: got {getattr(self, name)}")
        if self.scheduler and self.scheduler not in SCHEDULERS:
            raise UserError(f"protocol: unknown scheduler {self.scheduler!r}: choose from {', '.join(SCHEDULERS)}")
        if "{class}" not in self.class_prompt or not all(part in self.instance_prompt for part in ("{token}", "{class}")):
            raise UserError("protocol: instance_prompt must hold {token} and {class}, and class_prompt {class}")


@dataclass(frozen=True)
class BenchmarkSubject:
    """A subject with its class, the folder of its images, and the prompts under which it is drawn."""

    name: str
    of_class: str
    folder: Path
    prompts: Sequence[str]


def read_benchmark(text: str) -> Benchmark:
    """The benchmark of that name, or of a TOML file; UserError for a file that is not one, and for keys it may not have."""
    return read_named_toml("protocol", BENCHMARKS, text, Benchmark)


def read_dataset(folder: Path, rules: Benchmark, token: str, wanted: Sequence[str] = ()) -> list[BenchmarkSubject]:
    """The subjects of a dataset, all or those wanted, prompts with the token in them; UserError says everything that is missing."""
    folder = folder / "dataset" if os.path.isfile(folder / "dataset" / LIST) else folder
    if not os.path.isfile(folder / LIST):
        raise UserError(
            f"no {LIST} in {str(folder)!r}: give --dataset, the folder of google/dreambooth (git clone "
            "https://github.com/google/dreambooth)"
        )
    text = read_bytes(folder / LIST, "fetch it again").decode(errors="replace")
    classes, plain, live = _parsed(text, folder / LIST)
    if unknown := sorted({*wanted} - {*classes}):
        raise UserError(f"the dataset knows no subject {unknown[0]!r}: choose from {', '.join(classes)}")
    if not wanted and len(classes) != rules.n_subjects:
        raise UserError(f"{str(folder / LIST)!r} names {len(classes)} subjects, and the protocol has {rules.n_subjects}: mend it")
    for name, prompts in {"Object": plain, "Live Subject": live}.items():
        if len(prompts) != rules.n_prompts:
            found = f"{len(prompts)} under {name} Prompts, and the protocol has {rules.n_prompts}"
            raise UserError(f"{str(folder / LIST)!r} lists {found}: mend it")
    _check_images(folder, list(wanted or classes))
    subjects = []
    for name in wanted or classes:
        of_class = classes[name]
        prompts = [p.replace("{0}", token).replace("{1}", of_class) for p in (live if of_class in rules.live else plain)]
        subjects.append(BenchmarkSubject(name, of_class, folder / name, prompts))
    return subjects


def requests_of(request: PersonaliseRequest) -> list[PersonaliseRequest]:
    """What a benchmark asks for each of its subjects. Errors as those of its protocol and dataset."""
    rules = read_benchmark(request.protocol or "")
    subjects = read_dataset(Path(request.dataset or ""), rules, request.token, request.subjects)
    return [request_of(request, rules, subject) for subject in subjects]


def request_of(request: PersonaliseRequest, rules: Benchmark, subject: BenchmarkSubject) -> PersonaliseRequest:
    """The request for one subject: the protocol's settings where the request leaves them open."""
    words = {"{token}": request.token, "{class}": subject.of_class}
    classes = Path(request.class_data_dir) / subject.of_class.replace(" ", "_") if request.class_data_dir else None
    return replace(
        request,
        protocol=None,
        dataset=None,
        subjects=(),
        instance_data_dir=str(subject.folder),
        instance_prompt=_filled(rules.instance_prompt, words),
        class_prompt=_filled(rules.class_prompt, words),
        class_data_dir=None if classes is None else str(classes),
        n_images=request.n_images or len(subject.prompts) * rules.images_per_prompt,
        denoising_steps=request.denoising_steps or rules.steps,
        cfg_scale=rules.cfg_scale if request.cfg_scale is None else request.cfg_scale,
        scheduler=request.scheduler or rules.scheduler or None,
        clip=request.clip or rules.clip or None,
        dino=request.dino or rules.dino or None,
    )


def _filled(prompt: str, words: dict[str, str]) -> str:
    for name, text in words.items():
        prompt = prompt.replace(name, text)
    return prompt


def _check_images(folder: Path, names: Sequence[str]) -> None:
    """UserError names every subject that has too few images."""
    lacking = [name for name in names if _n_images(folder / name) < FEWEST]
    if lacking:
        raise UserError(
            f"the dataset in {str(folder)!r} lacks images of {len(lacking)} of its {len(names)} subjects, at least {FEWEST} each: "
            f"{', '.join(lacking)}; fetch it whole, or name others with --subjects"
        )


def _n_images(folder: Path) -> int:
    return sum(p.suffix.lower() in IMAGE_SUFFIXES for p in folder.iterdir()) if folder.is_dir() else 0


def _parsed(text: str, path: Path) -> tuple[dict[str, str], list[str], list[str]]:
    """Subject => class, and the prompts of objects and of live subjects, with {0} for the token and {1} for the class."""
    head, _, rest = text.partition("Object Prompts")
    plain, _, live = rest.partition("Live Subject Prompts")
    rows = [line.strip().split(",") for line in head.splitlines() if line.count(",") == 1]
    classes = {name: of_class for name, of_class in rows if (name, of_class) != ("subject_name", "class")}
    quoted = re.compile(r"'([^'\n]*\{0\}[^'\n]*)'\.format")
    if not classes or not quoted.search(plain) or not quoted.search(live):
        raise UserError(f"{str(path)!r} is not laid out as google/dreambooth has it: fetch it again")
    return classes, quoted.findall(plain), quoted.findall(live)
