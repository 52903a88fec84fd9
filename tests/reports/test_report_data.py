"""Runs read back for a report: their names, on disk and in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import report_rows

from blockprune.errors import UserError
from blockprune.reports.report_data import report_data
from blockprune.runs.directory import read_rows
from blockprune.runs.memory import MemoryRun


def in_memory(folder: Path) -> MemoryRun:
    """A run that was never written."""
    about = json.loads((folder / "run.json").read_text())
    run = MemoryRun(about.pop("command"), about.pop("asked"), about)
    for row in read_rows(folder):
        run.append(row)
    for file in (folder / "images").iterdir():
        run.write(f"images/{file.name}", file.read_bytes())
    return run


def test_runs_in_memory_are_as_runs_on_disk(tmp_path: Path) -> None:
    folders = report_rows.everything(tmp_path)
    written, kept = report_data(folders), report_data([in_memory(folder) for folder in folders])
    assert list(kept.runs) == ["scan", "search", "search 2", "distill", "distill 2", "small", "tiny", "mid"]
    for a, b in zip(written.runs.values(), kept.runs.values(), strict=True):
        assert vars(a).keys() == vars(b).keys()
        assert a.protocol == b.protocol and a.graph == b.graph and a.images.keys() == b.images.keys()
    assert kept.unread == written.unread == []


def test_runs_are_named_by_their_folder_and_by_more_of_the_path_where_that_is_taken(tmp_path: Path) -> None:
    folders = [report_rows.scan(tmp_path / parent / "scan") for parent in ("a", "b")]
    models = [report_rows.evaluate(tmp_path / name, "mine") for name in ("one", "two")]
    assert list(report_data([*folders, *models]).runs) == ["scan", "b/scan", "mine", "mine (two)"]
    with pytest.raises(UserError, match="given twice"):
        report_data([folders[0], str(folders[0])])
