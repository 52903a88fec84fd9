"""What a user does and has: commands in a process of their own, folders of pictures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def main_in_process(*args: str) -> None:
    result = subprocess.run([sys.executable, "-m", "blockprune", *args], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def pictures(folder: Path, n: int, side: int = 32) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(draw.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return folder
