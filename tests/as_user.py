"""What a user does and has: commands, here or in a process of their own, and folders of pictures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blockprune.cli import main


def run(*args: str | Path) -> None:
    """A command that must succeed."""
    with pytest.raises(SystemExit) as left:
        main([str(a) for a in args])
    assert not left.value.code


def run_in_own_process(*args: str) -> None:
    result = subprocess.run([sys.executable, "-m", "blockprune", *args], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def pictures(folder: Path, n: int, side: int = 32) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for i in range(n):
        Image.fromarray(draw.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    return folder


def workers_of(parent: int) -> list[int]:
    """The worker processes of a command, by its process id."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            line = stat.with_name("cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == parent and b"spawn_main" in line:
            found.append(int(stat.parent.name))
    return found
