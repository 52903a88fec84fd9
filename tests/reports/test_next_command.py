"""What to run next is a command of one line for a shell: whatever is in names and prompts, it names the model and its folder."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path

import report_rows

from blockprune.reports.next_command import next_command
from blockprune.reports.recommendation import recommendations
from blockprune.reports.report_data import ReportData, report_data


def evaluated(folder: Path, removed: list[str], model: str) -> ReportData:
    """A search, the teacher, and a student of that model."""
    settings = [s.to_json() | {"scheduler": "ddim"} for s in report_rows.SETTINGS]
    teacher = report_rows.evaluate(folder / "teacher", "tiny")
    student = report_rows.evaluate(folder / "student", "mine", removed, model=model, settings=settings)
    return report_data([report_rows.search(folder / "search"), teacher, student])


def test_a_trained_student_draws_by_its_shortest_prompt(tmp_path: Path) -> None:
    folder = 'runs/it\'s "mine" $HOME/pipeline'
    data = evaluated(tmp_path, report_rows.STUDENT, folder)
    program, option, code = shlex.split(next_command(data, data.models["mine"], []))
    assert (program, option) == ("python", "-c")
    texts = [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert set(texts) == {folder, "two", "image.png"}


def test_what_is_not_trained_is_distilled(tmp_path: Path) -> None:
    """A design by its name, what a search chose by its file; with the teacher, and data where that has none of its own."""
    data = evaluated(tmp_path, ["mid_block"], "tiny")
    asked = shlex.split(next_command(data, data.models["mine"], ["search"]))
    assert asked[:4] == ["blockprune", "distill", "--arch", "mid-removed"]
    assert asked[-2:] == ["--out", "runs/distill-mid-removed"]
    best = str(tmp_path / "search" / "best.json")
    found = evaluated(tmp_path / "other", report_rows.STUDENT, "tiny")
    for command in (next_command(data, None, ["search"]), next_command(found, found.models["mine"], [])):
        asked = shlex.split(command)
        assert best.rpartition("search")[2] in asked[3]
        assert {"--teacher", "--data", "FOLDER"} <= set(asked)
        assert asked[-1].endswith("distill-search")


def test_without_a_folder_or_an_answer_there_is_no_command(tmp_path: Path) -> None:
    search = report_rows.search(tmp_path / "search", finals=False)
    data = report_data([search, report_rows.evaluate(tmp_path / "teacher", "tiny")])
    (found,) = recommendations(data)
    assert found.take is None
    assert found.command == next_command(data, None, ["search"]) == ""
