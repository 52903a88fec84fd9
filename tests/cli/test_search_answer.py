"""What a search answers, and what it warns of, from made-up runs: captions first, no best where there is no budget."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import report_rows
from rich.console import Console

from blockprune.cli.console import print_finalists
from blockprune.reports import searches
from blockprune.reports.html.page import report_files
from blockprune.reports.report_data import report_data
from blockprune.reports.search_view import SearchView
from blockprune.runs.directory import Stored

LOST = {"mine": 1.0, "mid-removed": 0.0015}
HEARD = {"mine": 0.0015, "mid-removed": 1.0}


def printed(folder: Path) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        print_finalists(searches.search_view(Stored(folder)), console)
    return capture.get()


def written(folder: Path) -> dict[str, str]:
    """The report files that a search's end writes into its directory."""
    files = searches.report_files(searches.search_view(Stored(folder)))
    return {name: content.decode() for name, content in files if not name.endswith(".png")}


def test_lost_captions_are_the_first_thing_said(tmp_path: Path) -> None:
    folder = report_rows.search(tmp_path / "run", drifts={"mine": 1.0, "mid-removed": 1.5})
    view = searches.search_view(Stored(folder))
    own, teacher = view.caption(view.best), view.caption(None)
    assert own is not None
    assert teacher is not None
    assert own.delta_high is not None
    assert own.delta_high < 0
    values = f"CLIP score {own.value:.2f} against {teacher.value:.2f} (n = 64 images, paired, nothing retrained)"
    said = f"the best architecture follows captions worse than its teacher: {values}"
    files = written(folder)
    assert printed(folder).splitlines()[0] == f"warning: {said}"
    assert files["report.md"].splitlines()[0] == f"**Warning: {said}.**"
    assert json.loads(files["best.json"])["warning"] == f"warning: {said}"
    assert said in report_files(report_data([folder]), "thop")[".html"]


@pytest.mark.parametrize(("measures", "says"), [(("fid", "clip_score"), ""), (("fid",), "was not measured: give --clip")])
def test_nothing_is_warned_of_where_captions_are_heard_or_unknown(tmp_path: Path, measures: tuple[str, ...], says: str) -> None:
    folder = report_rows.search(tmp_path / "run", drifts=HEARD, image_measures=measures)
    files = written(folder)
    assert "warning:" not in printed(folder)
    assert "Warning" not in files["report.md"]
    assert says in printed(folder).splitlines()[0]
    assert files["report.md"].startswith("**Note: whether" if says else "# Search on")


def test_a_rival_that_lost_its_captions_is_no_reason_to_warn(tmp_path: Path) -> None:
    assert "warning:" not in printed(report_rows.search(tmp_path / "run", drifts=HEARD))
    assert "warning:" in printed(
        report_rows.search(tmp_path / "front", drifts={"mine": 1.0, "mid-removed": 0.5}, budget=None, pareto="params")
    )


def test_failed_images_of_the_best_are_said(tmp_path: Path) -> None:
    folder = report_rows.search(tmp_path / "run", drifts=HEARD, broken=("mine",))
    assert printed(folder).splitlines()[0] == "warning: the best architecture draws no images that can be scored: not <finite>"
    assert "draws no images that can be scored: not &lt;finite&gt;" in written(folder)["report.md"].splitlines()[0]


def test_a_front_without_a_budget_has_no_best(tmp_path: Path) -> None:
    folder = report_rows.search(tmp_path / "run", drifts={"mine": 1.0, "mid-removed": 0.0015}, budget=None, pareto="params")
    files = written(folder)
    assert "best.json" not in files
    assert [p["label"] for p in json.loads(files["pareto.json"])["front"]] == ["mine", "mid-removed"]
    rows = list(csv.DictReader(files["finalists.csv"].splitlines()))
    assert [(row["label"], row["on_front"]) for row in rows] == [("mine", "True"), ("mid-removed", "True")]
    said = files["report.md"].splitlines()[0]
    assert said.startswith("**Warning: of the front, each of mine follows captions worse than its teacher")
    students = report_data([folder]).students
    assert list(students.values()) == [["mid-removed"], ["mine"]]
    assert "has the best" not in report_files(report_data([folder]), "thop")[".html"]
    assert "best.json" in written(report_rows.search(tmp_path / "within", drifts=LOST, pareto="params"))


@pytest.mark.parametrize(("losses", "knee"), [((9.0, 2.0, 1.0), 1), ((9.0, 8.0, 1.0), None), ((9.0, 1.0), None)])
def test_the_knee_is_where_the_front_bends_most(losses: tuple[float, ...], knee: int | None) -> None:
    front = [SimpleNamespace(loss=loss, size=float(i)) for i, loss in enumerate(losses)]
    view = SimpleNamespace(quantity="params", front=lambda quantity: front, share=lambda e, quantity: e.size)
    found = SearchView.knee.fget(view)  # type: ignore[attr-defined]
    assert found is (None if knee is None else front[knee])
