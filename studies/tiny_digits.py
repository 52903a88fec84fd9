"""The whole path on the built-in model: which architecture to take at each of three sizes, and what is left after distillation?

    python studies/tiny_digits.py --out runs/case --reports reports/tiny-digits

runs the commands of this package one after another, as a user would, and each resumes where an earlier attempt stopped: a scan of
every block; a search at the parameters and MACs of each of the three BK-SDM designs, 120 architectures for the first and 80 more
for each of the others, which take its scores over; the same distillation of the three that were found and of the three designs; an
evaluation of all beside the teacher (n = 512); a sweep of the guidance scale for all; steps and 8-bit weights; and one HTML page
from all of that. `--part search --part distill` runs some of it, `--dry-run` prints the commands. About three hours of one CPU
core.
Expected, from `after_training.py`: what was found reads more of the captioned digits at every size, and the designs have the lower
FID at their own best guidance scales. Measured: `reports/tiny-digits/`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from steps import Step, chosen, parser_of

# design => its own parameters, whole pipeline, and its own MACs of a U-Net step, on this model
SIZES = {
    "bk-sdm-base": ("1.7756M", "36.671MMACs"),
    "bk-sdm-small": ("1.5194M", "35.538MMACs"),
    "bk-sdm-tiny": ("1.108M", "33.5302MMACs"),
}
N_IMAGES = 512
N_SWEEP = 256
CFG_SCALES = (1.5, 2, 3, 4.5)
QUANTISED = ("tiny-digits", "bk-sdm-small", "small-found")
N_STEPS = (4, 10)
DISTILL = "--max-train-steps 600 --learning-rate 5e-4 --ema --checkpointing-steps 200 --validation-steps 200 --n-images 128"
PARTS = ("scan", "search", "distill", "evaluate", "sweep", "quantise", "report")
COPIED = ("report.md", "scan.csv", "scan.json", "unet.svg", "sensitivity.svg", "tradeoff.svg", "grid.png", "correlation.svg")


def found(design: str) -> str:
    """The name of what is searched at the size of a design."""
    return f"{design.rpartition('-')[2]}-found"


def students(runs: Path) -> dict[str, str]:
    """Name => what `--arch` gets, the hand design first at every size."""
    archs: dict[str, str] = {}
    for design in SIZES:
        archs |= {design: design, found(design): str(runs / f"search-{found(design)}" / "best.json")}
    return archs


def plan(runs: Path, reports: Path) -> Iterator[Step]:
    """Every command in order."""
    yield Step("scan", ["scan", "--out", str(runs / "scan")])
    for design, (params, macs) in SIZES.items():
        first, begins = runs / "search-base-found", design == "bk-sdm-base"
        known = ["--trials", "120"] if begins else ["--trials", "200", "--from-scan", str(first)]
        asked = ["--budget", params, "--budget", macs, *known]
        yield Step("search", ["search", *asked, "--out", str(runs / f"search-{found(design)}")])
    for name, arch in students(runs).items():
        yield Step("distill", ["distill", "--arch", arch, *DISTILL.split(), "--out", str(runs / f"distill-{name}")])
    models = {"tiny-digits": "tiny-digits"} | {name: str(runs / f"distill-{name}" / "pipeline") for name in students(runs)}
    for name, model in models.items():
        named = ["evaluate", "--model", model, "--label", name, "--protocol", "clean"]
        measured = ["--n-images", str(N_IMAGES), "--latency", "--components", "--out", str(runs / f"evaluate-{name}")]
        yield Step("evaluate", [*named, *measured])
        few = [*named, "--n-images", str(N_SWEEP)]
        yield Step("sweep", [*few, "--cfg-scale", ",".join(map(str, CFG_SCALES)), "--out", str(runs / f"cfg-{name}")])
        if name in QUANTISED:
            grid = ["--steps", ",".join(map(str, N_STEPS)), "--quantize", "none,int8"]
            yield Step("quantise", [*few, *grid, "--latency", "--out", str(runs / f"int8-{name}")])
    kinds = ("scan", "search-*", "distill-*", "evaluate-*", "cfg-*", "int8-*")
    yield Step(
        "report", ["report", *(str(runs / kind) for kind in kinds), "--allow-mismatch", "--out", str(reports / "report.html")]
    )


def main() -> None:
    args = parser_of(__doc__, PARTS).parse_args()
    for step in chosen(plan(args.out, args.reports), args.part):
        print(step, flush=True)
        if not args.dry_run:
            step.run()
    if not args.dry_run and (not args.part or "report" in args.part):
        for name in COPIED:
            shutil.copy(args.out / "scan" / name, args.reports / name)
        for run in sorted(args.out.glob("search-*")):
            shutil.copy(run / "best.json", args.reports / f"{run.name.removeprefix('search-')}.json")
        (args.reports / "rows").mkdir(exist_ok=True)
        for run in sorted(args.out.glob("evaluate-*")):
            shutil.copy(run / "rows.jsonl", args.reports / "rows" / f"{run.name.removeprefix('evaluate-')}.jsonl")


if __name__ == "__main__":
    main()
