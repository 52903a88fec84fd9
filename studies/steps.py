"""A study as a list of this package's commands: printed, or run one after another; shared by the case studies."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """One command, the part of the study that it belongs to, and what it costs in multiply-adds of the U-Net and bytes of disk."""

    part: str
    command: Sequence[str]
    macs: float = 0.0
    disk_bytes: float = 0.0

    def __str__(self) -> str:
        return shlex.join(["blockprune", *self.command])

    def run(self) -> None:
        """Runs the command, which goes on where an earlier attempt stopped; folder patterns become the folders that are there."""
        words: list[str] = []
        for word in self.command:
            path = Path(word)
            words += sorted(str(p) for p in path.parent.glob(path.name)) if "*" in path.name else [word]
        subprocess.run([sys.executable, "-m", "blockprune", *words], check=True)


def parser_of(doc: str | None, parts: Sequence[str]) -> argparse.ArgumentParser:
    """The options that the case studies share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run directories")
    parser.add_argument("--reports", type=Path, required=True, help="folder of what is shown")
    parser.add_argument("--part", action="append", choices=parts, help="only this; repeatable")
    parser.add_argument("--dry-run", action="store_true", help="print the commands")
    return parser


def chosen(steps: Iterable[Step], parts: Sequence[str] | None) -> list[Step]:
    return [step for step in steps if not parts or step.part in parts]
