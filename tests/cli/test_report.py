"""`blockprune report` as a user runs it: files beside the page, and one clear line for bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import report_rows
from common_fixtures import Cli

from blockprune.reports.html import page

OneLine = Callable[..., str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run directories of every kind; tests must not write to them."""
    folder = tmp_path_factory.mktemp("runs")
    report_rows.everything(folder)
    return folder


@pytest.fixture
def scan(made: Path, tmp_path: Path) -> Path:
    """A scan of its own, to be damaged."""
    shutil.copytree(made / "scan", tmp_path / "scan")
    return tmp_path / "scan"


def test_page_and_results_are_written_and_written_again(made: Path, tmp_path: Path, cli: Cli) -> None:
    out = tmp_path / "new" / "digits.html"
    for runs in (["eval-teacher"], ["kd-mid", "eval-teacher"]):
        code, said, err = cli("report", *(made / run for run in runs), "--out", out)
        assert code == 0, err
    assert sorted(p.name for p in out.parent.iterdir()) == [f"digits.{kind}" for kind in ("csv", "html", "json", "tex")]
    assert "digits.html" in said
    assert "things are missing" in said
    first = out.read_bytes()
    cli("report", made / "kd-mid", made / "eval-teacher", "--out", out)
    assert out.read_bytes() == first


def test_no_run_is_bad_usage(cli: Cli) -> None:
    code, _, err = cli("report")
    assert code == 2
    assert "RUN" in err
    assert "Traceback" not in err


def test_what_is_no_run_directory(tmp_path: Path, one_line: OneLine) -> None:
    assert "no such folder" in one_line("report", tmp_path / "none")
    assert "has no run.json" in one_line("report", tmp_path)
    (tmp_path / "file").write_text("")
    assert "not a run directory" in one_line("report", tmp_path / "file")


def test_a_run_is_not_given_twice(made: Path, one_line: OneLine) -> None:
    assert "given twice" in one_line("report", made / "scan", made / "." / "scan")


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "\x00"])
def test_damaged_run_json(scan: Path, text: str, one_line: OneLine) -> None:
    (scan / "run.json").write_text(text)
    line = one_line("report", scan)
    assert "cannot read" in line
    assert "run.json" in line


@pytest.mark.parametrize("entry", ["graph", "archs", "asked"])
def test_run_json_without_what_it_must_have(scan: Path, entry: str, one_line: OneLine) -> None:
    said = json.loads((scan / "run.json").read_text())
    del said[entry]
    (scan / "run.json").write_text(json.dumps(said))
    line = one_line("report", scan)
    assert f"it lacks '{entry}'" in line
    assert str(scan) in line


def test_run_of_another_command_or_format(scan: Path, one_line: OneLine) -> None:
    said = json.loads((scan / "run.json").read_text())
    (scan / "run.json").write_text(json.dumps(said | {"command": "dance"}))
    assert "'dance'" in one_line("report", scan)
    (scan / "run.json").write_text(json.dumps(said | {"format": 2}))
    assert "format 2" in one_line("report", scan)


@pytest.mark.parametrize("row", ["{broken", "7"])
def test_damaged_rows_are_named_by_line(scan: Path, row: str, one_line: OneLine) -> None:
    rows = (scan / "rows.jsonl").read_text().splitlines()
    (scan / "rows.jsonl").write_text("\n".join([rows[0], row, *rows[1:]]) + "\n")
    assert "line 2 of" in one_line("report", scan)


def test_runs_that_do_not_belong_together(made: Path, tmp_path: Path, one_line: OneLine, cli: Cli) -> None:
    other = report_rows.scan(tmp_path / "other", teacher="fedcba987654")
    assert "different teachers" in one_line("report", made / "scan", other)
    few = report_rows.evaluate(tmp_path / "few", "few", protocol={"hash": "b" * 12, "n_images": 32})
    assert "n_images 32 and 64" in one_line("report", made / "eval-small", few)
    code, _, _ = cli("report", made / "eval-small", few, "--allow-mismatch", "--out", tmp_path / "both.html")
    assert code == 0


def test_where_the_page_cannot_go(made: Path, tmp_path: Path, one_line: OneLine, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = made / "scan"
    assert "is a directory" in one_line("report", scan, "--out", tmp_path)
    assert "must end with .html" in one_line("report", scan, "--out", tmp_path / "report.csv")
    (tmp_path / "file").write_text("")
    assert "a file stands where a folder should be" in one_line("report", scan, "--out", tmp_path / "file" / "report.html")
    before = (made / "scan" / "run.json").read_bytes()
    assert "would be replaced" in one_line("report", scan, "--out", made / "scan" / "run.html")
    assert (made / "scan" / "run.json").read_bytes() == before
    monkeypatch.setattr(page, "LIMIT", 1000)
    line = one_line("report", scan, "--out", tmp_path / "report.html")
    assert "leave out one of 'scan'" in line
    assert not (tmp_path / "report.html").exists()


def test_unknown_convention(made: Path, one_line: OneLine) -> None:
    assert "unknown --macs 'flops': choose from thop" in one_line("report", made / "scan", "--macs", "flops")
