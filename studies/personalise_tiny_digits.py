"""Does a pruned student learn a new subject as well as its teacher, and does it keep what it knew?

    python studies/personalise_tiny_digits.py --out runs/personalise --reports reports/personalise

The subject is a glyph that is no digit, an arrow, in five drawings, under the word "sks", which tiny-digits has never read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from quality_tiny_digits import cells
from sklearn.svm import SVC

from blockprune.data.digits import CELL_PX, SCENE_PX, DigitScenes, render_digit

N_DRAWINGS = 5
SUBJECT = 11  # the class of the reader for the subject; 0-9 are digits, 10 is an empty cell
INK_PX = 64


def drawing(seed: int) -> np.ndarray:
    """Return ink (8, 8) float32 in [0, 1] of one arrow that points up, drawn by a hand that is never quite the same."""
    draw = np.random.default_rng((seed, 7))
    picture = Image.new("L", (INK_PX, INK_PX))
    pen = ImageDraw.Draw(picture)
    top, foot = np.array([32, 8]) + draw.uniform(-3, 3, 2), np.array([32, 56]) + draw.uniform(-3, 3, 2)
    wings = [top + np.array([side * draw.uniform(16, 21), draw.uniform(16, 22)]) for side in (-1, 1)]
    for end in (foot, *wings):
        pen.line([tuple(top), tuple(end)], fill=255, width=int(draw.integers(9, 12)))
    return np.asarray(picture.reduce(INK_PX // 8), dtype=np.float32) / 255


def cell(seed: int, slant: int, weight: int) -> np.ndarray:
    """Return one cell (16, 16) float32 of ink with an arrow, as digits are set into cells."""
    draw = np.random.default_rng((seed, 8))
    size_px = draw.uniform(11.0, 14.0)
    room_px = (CELL_PX - size_px) / 2
    return render_digit(drawing(seed), slant, weight, size_px, tuple(draw.uniform(-room_px, room_px, 2)))


def write_subject(folder: Path) -> Path:
    """Writes the drawings, each in the top left of a scene that is empty otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(N_DRAWINGS):
        paper = np.zeros((SCENE_PX, SCENE_PX), dtype=np.float32)
        paper[:CELL_PX, :CELL_PX] = cell(i, 1, 1)
        Image.fromarray(np.round(255 * (1 - paper)).astype(np.uint8)).convert("RGB").save(folder / f"{i}.png")
    return folder


def train_reader(n_scenes: int) -> SVC:
    """Return a classifier of cells (0-9, 10 = empty, 11 = the subject), trained on digits and on other drawings of the subject."""
    images, _, labels = zip(*DigitScenes("train", 100, n_scenes), strict=True)
    ink, names = cells(np.stack(images)), np.array([row.digits for row in labels]).ravel()
    n_arrows = n_scenes // 8
    arrows = np.stack([cell(1000 + i, i % 3, i // 3 % 3).ravel() for i in range(n_arrows)])
    return SVC(C=10).fit(np.concatenate([ink, arrows]), np.concatenate([names, np.full(n_arrows, SUBJECT)]))
