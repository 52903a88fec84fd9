"""Run directories: what was asked, and every record, written and read here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blockprune.runs.directory import Run, Stored
from blockprune.runs.lock import Claims
from blockprune.runs.memory import MemoryRun, Unshared

AnyRun = Run | MemoryRun
Readable = Stored | MemoryRun
AnyClaims = Claims | Unshared


def open_run(out: Path | None, command: str, asked: Mapping[str, Any], note: Mapping[str, Any], shared: bool = False) -> AnyRun:
    """The run directory `out`, new or to be resumed; None for a run in memory."""
    return MemoryRun(command, asked, note) if out is None else Run(out, command, asked, note, shared)
