"""Does a student still edit images by their captions? Digits of held-out scenes are exchanged by caption, and read.

    python studies/edit_digits.py --out runs/edit --reports reports      # about 10 minutes of one core's time

The scenes are those of `evaluate --task img2img --data digits`: each has the caption of a scene in which one digit is another. The
teacher, bk-sdm-small untrained, and bk-sdm-small after 300 updates of distillation edit the same scenes with the same noise at
three strengths (n = 128). The independent reader of `quality_tiny_digits.py` then says how often the new digit stands in its
place, how often the old one still does, and how many of the other digits are as they were. Every command resumes where an earlier
attempt stopped. Expected: the more strength, the more new digits and the fewer of the others; the distilled student near the
teacher, the untrained one far from both. Measured: `reports/edit-digits.md`, where two of these do not hold.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from quality_tiny_digits import cells, train_reader
from steps import Step

from blockprune.data.digits import EMPTY, DigitScenes, exchanged
from blockprune.measures.intervals import interval, mean_statistic
from blockprune.runs.directory import Stored
from blockprune.runs.parts import slug_of

STRENGTHS = (0.3, 0.5, 0.8)
STUDENT = "bk-sdm-small"
N_UPDATES = 300
N_SHOWN, ZOOM = 6, 3
MEASURES = ("feature_distance", "clip_score", "input_l1")
Row = dict[str, Any]


def models(runs: Path) -> dict[str, list[str]]:
    """Name => how `evaluate` is told of it, the teacher first."""
    with_teacher = ["--teacher", str(folder(runs, "teacher"))]
    return {
        "teacher": [],
        f"{STUDENT}, untrained": ["--arch", STUDENT, *with_teacher],
        f"{STUDENT}, {N_UPDATES} updates": ["--model", str(runs / "distill"), *with_teacher],
    }


def folder(runs: Path, model: str) -> Path:
    return runs / f"edit-{model.replace(', ', '-').replace(' ', '-')}"


def steps(runs: Path, n: int) -> Iterator[Step]:
    distill = ["distill", "--arch", STUDENT, "--max-train-steps", str(N_UPDATES), "--learning-rate", "5e-4", "--ema"]
    yield Step("distill", [*distill, "--out", str(runs / "distill")])
    strengths = ",".join(map(str, STRENGTHS))
    edit = ["evaluate", "--task", "img2img", "--strength", strengths, "--data", "digits", "--n-images", str(n)]
    for model, told in models(runs).items():
        yield Step("edit", [*edit, *told, "--out", str(folder(runs, model))])


def shares(read: np.ndarray, n: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What => (hits, of how many) for each scene, from the digits (n, 4) that were read."""
    before = [labels for _, _, labels in DigitScenes("held-out", 0, n)]
    after, places = zip(*(exchanged(labels, i) for i, labels in enumerate(before)), strict=True)
    old, new = (np.array([labels.digits for labels in row]) for row in (before, after))
    there = np.zeros_like(old, dtype=bool)
    there[np.arange(n), places] = True
    others = (old != EMPTY) & ~there
    return {
        "new digit read": (((read == new) & there).sum(1), there.sum(1)),
        "old digit still read": (((read == old) & there).sum(1), there.sum(1)),
        "other digits as before": (((read == old) & others).sum(1), others.sum(1)),
    }


def read_row(images: np.ndarray, model: str, strength: float | None) -> Row:
    """The shares of images (n, 32, 32, 3) with their intervals over scenes that have what is counted."""
    read = train_reader(4000).predict(cells(images)).reshape(-1, 4)
    row: Row = {"model": model, "strength": strength, "n": len(images)}
    for what, (hits, of) in shares(read, len(images)).items():
        rate = hits[of > 0] / of[of > 0]
        row[what] = (float(rate.mean()), *(interval(mean_statistic(rate), len(rate), seed=0) or (None, None)))
    return row


def edited(run: Stored, n: int) -> Iterator[tuple[float, np.ndarray, dict[str, float]]]:
    """(strength, images (n, 32, 32, 3), scores) of each setting."""
    for setting in run.about["settings"]:
        files = sorted((run.path / "drawn" / slug_of(setting["label"])).glob("*.png"))
        images = np.stack([np.asarray(Image.open(file)) for file in files])
        assert len(images) == n, f"{run.path} is not finished"
        rows = [row for row in run.rows() if row["kind"] == "score" and row["setting"] == setting["label"]]
        yield setting["strength"], images, {row["measure"]: row["value"] for row in rows}


def table(rows: Sequence[Row]) -> str:
    shown = ("new digit read", "old digit still read", "other digits as before")
    lines = ["| model | strength | " + " | ".join((*shown, *MEASURES)) + " |", "| --- |" + " ---: |" * 7]
    for row in rows:
        counts = [f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in (row[what] for what in shown)]
        scores = [f"{row[m]:.3g}" if m in row else "-" for m in MEASURES]
        lines.append(
            "| " + " | ".join([row["model"], "-" if row["strength"] is None else f"{row['strength']}", *counts, *scores]) + " |"
        )
    return "\n".join(lines) + "\n"


def sheet(rows: Sequence[tuple[str, np.ndarray]], captions: Sequence[str]) -> Image.Image:
    """A row of images for each name, a column for each caption."""
    side, left, top = 32 * ZOOM, 190, 48
    canvas = Image.new("RGB", (left + len(captions) * (side + 34), top + len(rows) * (side + 6)), "white")
    draw = ImageDraw.Draw(canvas)
    for c, text in enumerate(captions):
        style, placed = text.split(": ")
        draw.multiline_text(
            (left + c * (side + 34), 2), "\n".join([style, *placed.split(", ")][:5]), fill="black", spacing=0, font_size=8
        )
    for r, (name, images) in enumerate(rows):
        y = top + r * (side + 6)
        draw.text((4, y + side // 2 - 6), name, fill="black", font_size=10)
        for c, image in enumerate(images[: len(captions)]):
            x = left + c * (side + 34)
            canvas.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x, y))
            draw.rectangle((x, y, x + side, y + side), outline="silver")
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run directories")
    parser.add_argument("--reports", type=Path, required=True, help="folder of what is shown")
    parser.add_argument("--n", type=int, default=128)
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    args = parser.parse_args()
    if args.dry_run:
        print(*steps(args.out, args.n), f"{args.n} scenes edited by 3 models at {len(STRENGTHS)} strengths", sep="\n")
        return
    for step in steps(args.out, args.n):
        step.run()
    inputs = np.stack([image for image, _, _ in DigitScenes("held-out", 0, args.n)])
    rows, pictures = [read_row(inputs, "the scenes themselves", None)], [("the scenes", inputs)]
    for model in models(args.out):
        for strength, images, scores in edited(Stored(folder(args.out, model)), args.n):
            rows.append(read_row(images, model, strength) | {m: scores[m] for m in MEASURES})
            pictures.append((f"{model}, {strength}", images))
    captions = Stored(folder(args.out, "teacher")).about["pictured_prompts"][:N_SHOWN]
    args.reports.mkdir(parents=True, exist_ok=True)
    heading = "# Digits exchanged by caption\n\n"
    heading += f"{args.n} scenes of held-out digits, one digit of each exchanged in its caption; 10 steps, CFG 3.\n\n"
    (args.reports / "edit-digits.md").write_text(heading + table(rows), encoding="utf-8")
    (args.reports / "edit-digits.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    sheet(pictures, captions).save(args.reports / "edit-digits.png")
    print(table(rows))


if __name__ == "__main__":
    main()
