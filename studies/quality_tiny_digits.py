"""Does tiny-digits draw what its captions say, and as pens do?

Question: of the digits that held-out captions name, how many does an independent reader find in the place named, and
how far are generated scenes from held-out real ones, compared with real ones from each other?

    python studies/quality_tiny_digits.py --out reports

The reader is a support vector machine trained on cells of the training digits; it shares nothing with the shipped
detector. What it reads on held-out real scenes is the ceiling. FID is of the shipped detector's features, against real
scenes of all held-out digits; the two real halves show 250 held-out digits each, none of them in both. About a
minute on two CPU cores. Expected: at least 0.90 of the named digits read, FID at most 3 times that of the halves;
measured: `reports/tiny-digits-quality.md`.
"""

from __future__ import annotations

import argparse
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from sklearn.svm import SVC

from blockprune.data.digits import CELL_PX, EMPTY, SCENE_PX, DigitScenes
from blockprune.measures.detectors import BUILT_IN, HubDetector
from blockprune.measures.fid_kid import Stats, fid_statistic
from blockprune.measures.intervals import interval, mean_statistic

N_SHOWN = 24
Row = dict[str, Any]


def cells(images: np.ndarray) -> np.ndarray:
    """Return ink (4 N, 256) float32 in [0, 1] of the cells, in reading order, of scenes (N, 32, 32, 3) uint8."""
    ink = 1 - images.mean(axis=3, dtype=np.float32) / 255
    grid = ink.reshape(len(ink), 2, CELL_PX, 2, CELL_PX).transpose(0, 1, 3, 2, 4)
    return grid.reshape(-1, CELL_PX * CELL_PX)


@lru_cache(maxsize=2)
def train_reader(n_scenes: int) -> SVC:
    """Return a classifier of cells (0-9, 10 = empty), trained on scenes of the training digits."""
    images, _, labels = zip(*DigitScenes("train", 100, n_scenes), strict=True)
    return SVC(C=10).fit(cells(np.stack(images)), np.array([row.digits for row in labels]).ravel())


def reading_rates(reader: SVC, images: np.ndarray, digits: np.ndarray) -> dict[str, float]:
    """Return the shares of named digits (N, 4) read in their places, of empty cells read as empty, of scenes right."""
    right = reader.predict(cells(images)).reshape(-1, 4) == digits
    empty = digits == EMPTY
    return {
        "digits_read": float(right[~empty].mean()),
        "empty_read": float(right[empty].mean()),
        "scenes_read": float(right.all(axis=1).mean()),
    }


def generate(
    pipeline: StableDiffusionPipeline,
    captions: list[str],
    n_steps: int,
    guidance_scale: float,
    first_seed: int = 0,
    batch_size: int = 64,
) -> np.ndarray:
    """Return images (N, 32, 32, 3) uint8; image i depends on captions[i] and seed first_seed + i only."""
    pipeline.set_progress_bar_config(disable=True)
    batches = []
    for start in range(0, len(captions), batch_size):
        prompts = list(captions[start : start + batch_size])
        seeds = range(first_seed + start, first_seed + start + len(prompts))
        output = pipeline(
            prompts,
            num_inference_steps=n_steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        )
        batches.append(np.round(output.images * 255).astype(np.uint8))
    return np.concatenate(batches)


def sheet(images: np.ndarray, captions: list[str], columns: int = 4, zoom: int = 4) -> Image.Image:
    """Return a picture of the images, each over its caption."""
    side, line_px = SCENE_PX * zoom, 11
    width_px, height_px = 200, side + 4 * line_px + 6
    canvas = Image.new("RGB", (columns * width_px, -(-len(images) // columns) * height_px), "white")
    draw = ImageDraw.Draw(canvas)
    for index, (image, text) in enumerate(zip(images, captions, strict=True)):
        x, y = index % columns * width_px, index // columns * height_px
        canvas.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (x + 36, y))
        draw.rectangle((x + 36, y, x + 36 + side, y + side), outline="silver")
        style, placed = text.split(": ")
        words = placed.split(", ")
        lines = [style + ":", ", ".join(words[:2]), ", ".join(words[2:])]
        draw.multiline_text((x + 4, y + side + 3), "\n".join(lines), fill="black", spacing=1, font_size=9)
    return canvas


def real_scenes(seed: int, n: int, part: tuple[int, int] = (0, 1)) -> tuple[np.ndarray, list[str], np.ndarray]:
    """Return images (n, 32, 32, 3) uint8, captions and digits (n, 4) of scenes of held-out digits."""
    images, captions, labels = zip(*DigitScenes("held-out", seed, n, part), strict=True)
    return np.stack(images), list(captions), np.array([row.digits for row in labels])


def read_rows(reader: SVC, images: np.ndarray, digits: np.ndarray, of: str) -> list[Row]:
    right = reader.predict(cells(images)).reshape(-1, 4) == digits
    empty = digits == EMPTY
    parts = {"digits_read": right[~empty], "empty_read": right[empty], "scenes_read": right.all(axis=1)}
    return [row(f"{name}, {of}", mean_statistic(hits), len(hits)) for name, hits in parts.items()]


def row(measure: str, statistic: Any, n: int) -> Row:
    low, high = interval(statistic, n, seed=0) or (None, None)
    return {"measure": measure, "value": float(statistic(np.arange(n)[None])[0]), "low": low, "high": high, "n": n}


def fid_row(detector: HubDetector, images: np.ndarray, real: np.ndarray, of: str) -> Row:
    features, reference = (detector(torch.from_numpy(x).permute(0, 3, 1, 2)) for x in (images, real))
    return row(f"FID, {of}", fid_statistic(features, Stats.of(reference)), len(features))


def measure(model: Path, n: int, n_steps: int, guidance_scale: float) -> tuple[list[Row], np.ndarray, list[str]]:
    """Return the rows of the report, and the generated images with their captions."""
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    reader, detector = train_reader(4000), HubDetector(model / "detector")
    real, captions, digits = real_scenes(17, n)
    images = generate(pipeline, captions, n_steps, guidance_scale)
    halves = [real_scenes(19 + k, n, (k, 2))[0] for k in range(2)]
    rows = [
        *read_rows(reader, images, digits, "generated"),
        *read_rows(reader, real, digits, "real"),
        fid_row(detector, images, real, "generated against real"),
        fid_row(detector, halves[0], halves[1], "real half against real half"),
    ]
    return rows, images, captions


def table(rows: list[Row], heading: str) -> str:
    lines = [heading, "", "| measure | value | 95 % interval | n |", "| --- | ---: | ---: | ---: |"]
    for r in rows:
        lines.append(f"| {r['measure']} | {r['value']:.3f} | {r['low']:.3f} to {r['high']:.3f} | {r['n']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUILT_IN)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured")
    args = parser.parse_args()
    if args.dry_run:
        print(f"{args.n} scenes drawn in {args.steps} steps at guidance scale {args.guidance_scale:g}, and as many real ones")
        return
    rows, images, captions = measure(args.model, args.n, args.steps, args.guidance_scale)
    ratio = rows[-2]["value"] / rows[-1]["value"]
    heading = (
        f"# Quality of tiny-digits\n\n{args.n} scenes of held-out captions, {args.steps} steps, "
        f"guidance scale {args.guidance_scale}; FID is {ratio:.2f} times that of two real halves."
    )
    text = table(rows, heading)
    print(text)
    asked = {"n": args.n, "steps": args.steps, "guidance_scale": args.guidance_scale}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tiny-digits-quality.md").write_text(text, encoding="utf-8")
    (args.out / "tiny-digits-quality.json").write_text(json.dumps(asked | {"rows": rows}, indent=2) + "\n", encoding="utf-8")
    sheet(images[:N_SHOWN], captions[:N_SHOWN]).save(args.out / "tiny-digits-samples.png")


if __name__ == "__main__":
    main()
