"""Does knowledge distillation rank as in BK-SDM's ablation? Base layout on tiny-digits, equal steps, several seeds.

    python studies/ablation.py --out reports --runs runs/ablation      # 15 runs of 200 updates; about 15 minutes on 2 cores

Variants, as in table 4 of arXiv 2305.15798: random initialisation; the teacher's weights; with output KD; with feature KD as well;
and that with the mid stage removed too. Every run is a `blockprune distill` of its own, so a killed study goes on; scores are those
of its validations, on 128 images of fixed seeds. Writes `ablation.md`, `ablation.json` and `ablation.png` (scores along training,
as the paper's figure 6). `--dry-run` prints the runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from blockprune.measures.score import Score
from blockprune.reports.canvas import axis_title, new_figure, png, tidy, title
from blockprune.runs.directory import read_rows

N_STEPS, BATCH_SIZE, N_IMAGES, EVERY = 200, 8, 128, 100
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "random": ("bk-sdm-base", {"initialise": "random", "output": 0.0, "feature": 0.0}),
    "teacher": ("bk-sdm-base", {"output": 0.0, "feature": 0.0}),
    "teacher, output KD": ("bk-sdm-base", {"feature": 0.0}),
    "teacher, output and feature KD": ("bk-sdm-base", {}),
    "the same, mid removed": ("bk-sdm-small", {}),
}
MEASURES = ("fid", "is", "clip_score")
COLOURS = ("#8a949c", "#d55e00", "#cc79a7", "#0072b2", "#009e73")


def command(name: str, seed: int, runs: Path) -> list[str]:
    """The command of one run; its recipe is written beside it."""
    arch, changes = VARIANTS[name]
    stem = name.replace(", ", "-").replace(" ", "-")
    recipe = runs / f"{stem}.toml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(
        "".join(f"{key} = {json.dumps(value)}\n" for key, value in {"learning_rate": 5e-4, **changes}.items()), encoding="utf-8"
    )
    sizes = ["--train-batch-size", str(BATCH_SIZE), "--max-train-steps", str(N_STEPS), "--checkpointing-steps", str(EVERY)]
    checks = ["--validation-steps", str(EVERY), "--n-images", str(N_IMAGES), "--seed", str(seed)]
    place = ["--recipe", str(recipe), "--out", str(runs / f"{stem}-{seed}")]
    return [sys.executable, "-m", "blockprune", "distill", "--arch", arch, *sizes, *checks, *place]


def scores(folder: Path) -> dict[str, dict[int, Score]]:
    """measure => step => score of the validations of a run."""
    found: dict[str, dict[int, Score]] = {m: {} for m in MEASURES}
    for row in read_rows(folder):
        if row["kind"] == "validation" and row["score"]["measure"] in found:
            found[row["score"]["measure"]][row["step"]] = Score.from_json(row["score"])
    return found


def report(rows: Mapping[str, Sequence[Mapping[str, Mapping[int, Score]]]]) -> str:
    """Scores at the last step: the mean over seeds, their range, and the widest bootstrap interval of one seed."""
    lines = ["| variant | FID | IS | CLIP score |", "| --- | ---: | ---: | ---: |"]
    for name, seeds in rows.items():
        cells = []
        for m in MEASURES:
            last = [run[m][N_STEPS] for run in seeds]
            values = np.array([s.value for s in last], dtype=float)
            half = max((s.high or 0.0) - (s.low or 0.0) for s in last) / 2
            cells.append(f"{values.mean():.3g} ({values.min():.3g} to {values.max():.3g}; ±{half:.2g})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    note = (
        f"{len(next(iter(rows.values())))} seeds, {N_STEPS} updates of {BATCH_SIZE} images, n = {N_IMAGES}. In brackets the range"
    )
    return "\n".join([*lines, "", f"{note} over seeds, and half the widest 95 % interval of one seed."]) + "\n"


def figure(rows: Mapping[str, Sequence[Mapping[str, Mapping[int, Score]]]]) -> Figure:
    """FID and CLIP score along training, the mean over seeds with their range."""
    drawn = new_figure(9.0, 4.2)
    title(drawn, "Recovery by distillation, tiny-digits", "Mean of the seeds; shaded: their range.")
    for i, m in enumerate(("fid", "clip_score")):
        ax = drawn.add_axes((0.09 + 0.5 * i, 0.13, 0.39, 0.68))
        tidy(ax)
        for (name, seeds), colour in zip(rows.items(), COLOURS, strict=True):
            steps = sorted(seeds[0][m])
            y = np.array([[run[m][step].value for step in steps] for run in seeds], dtype=float)
            ax.plot(steps, y.mean(0), color=colour, lw=1.7, marker="o", ms=3, label=name)
            ax.fill_between(steps, y.min(0), y.max(0), color=colour, alpha=0.15, lw=0)
        ax.set_xlabel("updates", fontsize=8.5)
        ax.set_ylabel(axis_title(m), fontsize=8.5)
        if m == "fid":
            ax.set_yscale("log")
            ax.legend(fontsize=6.5, frameon=False, loc="upper right")
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("reports"))
    parser.add_argument("--runs", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dry-run", action="store_true", help="print the runs")
    args = parser.parse_args()
    if args.dry_run:
        print(f"{len(VARIANTS)} variants x {args.seeds} seeds, {N_STEPS} updates of {BATCH_SIZE} images each")
        return
    rows: dict[str, list[dict[str, dict[int, Score]]]] = {}
    for seed in range(args.seeds):
        for name in VARIANTS:
            call = command(name, seed, args.runs)
            subprocess.run(call, check=True)
            rows.setdefault(name, []).append(scores(Path(call[-1])))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "ablation.md").write_text(report(rows), encoding="utf-8")
    (args.out / "ablation.png").write_bytes(png(figure(rows)))
    kept = {n: [{m: {s: v.to_json() for s, v in by.items()} for m, by in run.items()} for run in runs] for n, runs in rows.items()}
    (args.out / "ablation.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
