"""The run directory: resuming, refusing another run, and losing nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockprune.errors import UserError
from blockprune.runs.directory import Run, read_rows, read_run
from blockprune.runs.records import Score

ROW = Score("0" * 12, "full", "eps_mse", 1.5, 4, 0).to_json()
ASKED = {"model": "tiny-digits", "n_images": 64}


def test_same_request_resumes(tmp_path: Path) -> None:
    with Run(tmp_path / "r", "scan", ASKED, {"machine": "a"}) as run:
        run.append(ROW)
    with Run(tmp_path / "r", "scan", ASKED, {"machine": "b"}) as run:
        assert run.rows() == [ROW]
        run.append({"label": "mid_block", "value": None})
    assert [r["label"] for r in read_rows(tmp_path / "r")] == ["full", "mid_block"]
    assert read_run(tmp_path / "r")["asked"] == ASKED


def test_a_run_that_another_process_begins_meanwhile_is_no_strange_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when several hosts are started on one directory at the same moment."""
    listing = Path.iterdir

    def begun_meanwhile(path: Path) -> Iterator[Path]:
        monkeypatch.setattr(Path, "iterdir", listing)
        Run(path, "scan", ASKED, {}, shared=True).close()
        return listing(path)

    monkeypatch.setattr(Path, "iterdir", begun_meanwhile)
    with Run(tmp_path, "scan", ASKED, {}, shared=True) as run:
        assert run.rows() == []


def test_torn_last_row_is_cut(tmp_path: Path) -> None:
    with Run(tmp_path, "scan", ASKED, {}) as run:
        run.append({"label": "full"})
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"label": "mid_bl')
    assert read_rows(tmp_path) == [{"label": "full"}]
    with Run(tmp_path, "scan", ASKED, {}) as run:
        run.append({"label": "mid_block"})
    assert [json.loads(line)["label"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == ["full", "mid_block"]


def test_another_request_is_refused_by_name(tmp_path: Path) -> None:
    Run(tmp_path, "scan", ASKED, {}).close()
    with pytest.raises(UserError, match=r"n_images is 64 there, 128 asked"):
        Run(tmp_path, "scan", {**ASKED, "n_images": 128}, {})
    with pytest.raises(UserError, match="holds a scan run"):
        Run(tmp_path, "search", ASKED, {})


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with Run(tmp_path, "scan", ASKED, {}), pytest.raises(UserError, match="another process"):
        Run(tmp_path, "scan", ASKED, {})


def test_places_that_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        Run(tmp_path / "file", "scan", ASKED, {})
    with pytest.raises(UserError, match="holds no run"):
        Run(tmp_path, "scan", ASKED, {})
    with pytest.raises(UserError, match=r"has no run\.json"):
        read_run(tmp_path)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "run.json").write_text("{")
    with pytest.raises(UserError, match="cannot read"):
        Run(tmp_path / "damaged", "scan", ASKED, {})


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    with Run(tmp_path / "r", "scan", ASKED, {}) as run:
        run.write("a/report.md", "old")
        with pytest.raises(OSError, match="full"), run.writing("a/report.md") as path:
            path.write_text("ne")
            raise OSError("disk full")
        assert (tmp_path / "r/a/report.md").read_text() == "old"
        assert [p.name for p in (tmp_path / "r/a").iterdir()] == ["report.md"]
