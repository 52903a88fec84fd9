"""The whole path on the built-in model: which blocks can go, at three sizes, and what is left after distillation?

    python studies/tiny_digits.py --out runs/case --reports reports/tiny-digits

runs the commands of this package one after another, as a user would, and each resumes where an earlier attempt stopped: a scan of
every block; searches at the parameters of the three BK-SDM designs, and again at their parameters and MACs, with the two attentions
kept through which captions are heard; one distillation of the six that were found and of the three designs; an evaluation of all
beside the teacher (n = 1,000); a sweep of the guidance scale; steps and 8-bit weights; and one HTML page from all of that. `--part
search --part distill` runs some of it, `--dry-run` prints the commands. About two hours on two CPU cores.
Expected: what was found beats the hand design in CLIP score at every size, and at CFG 3 in FID at the two smaller ones; in FID
bk-sdm-base wins. Measured: `reports/tiny-digits/`.
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
# where the scan shows that captions are heard: without them the CLIP score falls, while the denoising error hardly rises
KEEP = "mid_block.attentions.0,down_blocks.2.attentions.0"
N_IMAGES = 1000
N_SWEEP = 256
CFG_SCALES = (1, 1.5, 2, 3, 4.5, 6, 7.5)
SWEPT = ("tiny-digits", "bk-sdm-small", "small-params")
N_STEPS = (4, 6, 10, 20)
DISTILL = "--max-train-steps 1000 --learning-rate 3e-4 --ema --checkpointing-steps 250 --validation-steps 250 --n-images 128"
PARTS = ("scan", "search", "distill", "evaluate", "sweep", "quantise", "report")
COPIED = ("report.md", "scan.csv", "scan.json", "unet.svg", "sensitivity.png", "tradeoff.png", "grid.png", "correlation.png")


def found(design: str) -> tuple[str, str]:
    """The names of what is searched at the size of a design: by its parameters, and by its parameters and MACs."""
    size = design.rpartition("-")[2]
    return f"{size}-params", f"{size}-both"


def students(runs: Path) -> dict[str, str]:
    """Name => what `--arch` gets, the hand design first at every size."""
    archs: dict[str, str] = {}
    for design in SIZES:
        archs |= {design: design} | {name: str(runs / f"search-{name}" / "best.json") for name in found(design)}
    return archs


def plan(runs: Path, reports: Path) -> Iterator[Step]:
    """Every command in order."""
    yield Step("scan", ["scan", "--out", str(runs / "scan")])
    for design, (params, macs) in SIZES.items():
        by_params, by_both = found(design)
        search = ["search", "--objective", "guided_mse", "--trials", "200", "--keep", KEEP, "--budget", params]
        yield Step("search", [*search, "--out", str(runs / f"search-{by_params}")])
        yield Step("search", [*search, "--budget", macs, "--out", str(runs / f"search-{by_both}")])
    for name, arch in students(runs).items():
        yield Step("distill", ["distill", "--arch", arch, *DISTILL.split(), "--out", str(runs / f"distill-{name}")])
    models = {"tiny-digits": "tiny-digits"} | {name: str(runs / f"distill-{name}" / "pipeline") for name in students(runs)}
    for name, model in models.items():
        named = ["evaluate", "--model", model, "--label", name, "--protocol", "clean"]
        measured = ["--n-images", str(N_IMAGES), "--latency", "--components", "--out", str(runs / f"evaluate-{name}")]
        yield Step("evaluate", [*named, *measured])
    for name in SWEPT:
        named = ["evaluate", "--model", models[name], "--label", name, "--protocol", "clean", "--n-images", str(N_SWEEP)]
        scales = [word for scale in CFG_SCALES for word in ("--cfg-scale", str(scale))]
        yield Step("sweep", [*named, *scales, "--out", str(runs / f"cfg-{name}")])
        steps = [word for n in N_STEPS for word in ("--steps", str(n))]
        grid = [*steps, "--quantize", "none", "--quantize", "int8"]
        yield Step("quantise", [*named, *grid, "--latency", "--out", str(runs / f"int8-{name}")])
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
