"""Scenes of real handwritten digits on a 2x2 grid, with captions that say what is where.

The 1,797 digits of scikit-learn are split by source image, so that no pen stroke of a held-out scene was ever seen in
training. A scene is 32x32 pixels, dark ink on white paper; its caption names the stroke weight and slant shared by the
whole scene and the digit of every cell that is not empty, in reading order:

    bold leaning left: three top left, seven bottom right
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

CELL_PX = 16
SCENE_PX = 2 * CELL_PX
N_HELD_OUT = 500
EMPTY = 10
DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CELL_WORDS = ("top left", "top right", "bottom left", "bottom right")
SLANT_WORDS = ("leaning left", "upright", "leaning right")
WEIGHT_WORDS = ("thin", "regular", "bold")
VOCABULARY = tuple(dict.fromkeys(" ".join((*WEIGHT_WORDS, *SLANT_WORDS, ":", *DIGIT_WORDS, *CELL_WORDS, ",")).split()))
_SPLIT_SEED = 1797
_SHEARS = (0.35, 0.0, -0.35)
_INK_THRESHOLDS = (0.66, 0.48, 0.32)
_INK_SOFTNESS = 0.4
_SIZES_PX = (11.0, 14.0)
_SUPERSAMPLE = 4
_N_DIGITS_PROBABILITIES = (0.15, 0.25, 0.3, 0.3)


@dataclass(frozen=True)
class Labels:
    """What a scene shows: digits of the four cells in reading order (10 = empty), slant 0-2, weight 0-2."""

    digits: tuple[int, int, int, int]
    slant: int
    weight: int

    def __post_init__(self) -> None:
        if len(self.digits) != 4 or not all(0 <= digit <= EMPTY for digit in self.digits):
            raise ValueError(f"digits must be four of 0..{EMPTY} ({EMPTY} = empty), got {self.digits}")
        if all(digit == EMPTY for digit in self.digits):
            raise ValueError("a scene shows at least one digit, got four empty cells")
        if self.slant not in (0, 1, 2) or self.weight not in (0, 1, 2):
            raise ValueError(f"slant and weight must be 0, 1 or 2, got {self.slant} and {self.weight}")


def caption(labels: Labels) -> str:
    """Return the caption of a scene."""
    cells = [f"{DIGIT_WORDS[digit]} {where}" for digit, where in zip(labels.digits, CELL_WORDS, strict=True) if digit != EMPTY]
    return f"{WEIGHT_WORDS[labels.weight]} {SLANT_WORDS[labels.slant]}: {', '.join(cells)}"


def exchanged(labels: Labels, seed: int) -> tuple[Labels, int]:
    """Return the labels with another digit in one cell that has one, and that cell's number."""
    rng = np.random.default_rng(seed)
    cell = int(rng.choice([cell for cell, digit in enumerate(labels.digits) if digit != EMPTY]))
    digits = list(labels.digits)
    digits[cell] = int(rng.choice([digit for digit in range(10) if digit != digits[cell]]))
    return Labels(tuple(digits), labels.slant, labels.weight), cell  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def source_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the source: ink (1797, 8, 8) float32 in [0, 1], digit (1797,) and whether held out (1797,) bool."""
    from sklearn.datasets import load_digits  # imported here, for it imports pandas where that is installed

    data = load_digits()
    held_out = np.zeros(len(data.target), dtype=bool)
    held_out[np.random.default_rng(_SPLIT_SEED).permutation(len(held_out))[:N_HELD_OUT]] = True
    return (data.images / 16).astype(np.float32), data.target, held_out


def render_digit(ink: np.ndarray, slant: int, weight: int, size_px: float, offset_px: tuple[float, float]) -> np.ndarray:
    """Return one cell (16, 16) float32 of ink in [0, 1].

    The 8x8 `ink` is enlarged to `size_px`, thickened or thinned by moving the threshold of its edge, sheared about its
    middle and put `offset_px` (x, y) away from the middle of the cell.
    """
    big = Image.fromarray(ink).resize((48, 48), Image.Resampling.BICUBIC)
    edge = (np.asarray(big) - _INK_THRESHOLDS[weight]) / _INK_SOFTNESS + 0.5
    side = CELL_PX * _SUPERSAMPLE
    scale = 48 / (size_px * _SUPERSAMPLE)
    shear = -_SHEARS[slant] * scale
    x0, y0 = (side / 2 + offset * _SUPERSAMPLE for offset in offset_px)
    affine = (scale, shear, 24 - scale * x0 - shear * y0, 0, scale, 24 - scale * y0)
    cell = Image.fromarray(np.clip(edge, 0, 1)).transform((side, side), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    return np.asarray(cell.reduce(_SUPERSAMPLE))


@dataclass(frozen=True)
class DigitScenes:
    """A sized source of (image (32, 32, 3) uint8, caption, Labels); item i is a pure function of (split, seed, i).

    `split` is "train" (1,297 source digits) or "held-out" (500). `part` = (k, n) keeps every n-th source digit of the
    split, starting at the k-th, so that two sources may be made to share no digit.
    """

    split: str
    seed: int
    size: int
    part: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if self.split not in ("train", "held-out"):
            raise ValueError(f'split must be "train" or "held-out", got {self.split!r}')
        if not 0 <= self.part[0] < self.part[1]:
            raise ValueError(f"part must be (k, n) with 0 <= k < n, got {self.part}")

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[tuple[np.ndarray, str, Labels]]:
        return (self[index] for index in range(self.size))

    def __getitem__(self, index: int) -> tuple[np.ndarray, str, Labels]:
        if not 0 <= index < self.size:
            raise IndexError(f"scene {index} of {self.size}")
        rng = np.random.default_rng((self.split == "held-out", self.seed, index))
        labels = _draw_labels(rng)
        ink, _, _ = source_digits()
        pools = self.pools()
        paper = np.zeros((SCENE_PX, SCENE_PX), dtype=np.float32)
        for cell, digit in enumerate(labels.digits):
            if digit == EMPTY:
                continue
            size_px = rng.uniform(*_SIZES_PX)
            room_px = (CELL_PX - size_px) / 2
            offset_px = tuple(rng.uniform(-room_px, room_px, size=2))
            y, x = CELL_PX * (cell // 2), CELL_PX * (cell % 2)
            paper[y : y + CELL_PX, x : x + CELL_PX] = render_digit(
                ink[rng.choice(pools[digit])], labels.slant, labels.weight, size_px, offset_px
            )
        grey = np.round(255 * (1 - paper)).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2), caption(labels), labels

    def pools(self) -> tuple[np.ndarray, ...]:
        """Return, per digit 0-9, the indices of the source digits that scenes of this source may show."""
        return _pools(self.split, self.part)


@lru_cache(maxsize=16)
def _pools(split: str, part: tuple[int, int]) -> tuple[np.ndarray, ...]:
    _, target, held_out = source_digits()
    of_split = held_out == (split == "held-out")
    return tuple(np.flatnonzero(of_split & (target == digit))[part[0] :: part[1]] for digit in range(10))


def _draw_labels(rng: np.random.Generator) -> Labels:
    n_digits = 1 + rng.choice(4, p=_N_DIGITS_PROBABILITIES)
    digits = np.full(4, EMPTY)
    digits[rng.permutation(4)[:n_digits]] = rng.integers(10, size=n_digits)
    slant, weight = rng.integers(3, size=2)
    return Labels(tuple(int(digit) for digit in digits), int(slant), int(weight))  # type: ignore[arg-type]
