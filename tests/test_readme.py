"""What the README and the guide tell a reader to type works as it stands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from blockprune.assets import ASSETS
from blockprune.cli import app

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
GUIDE = (Path(__file__).parent.parent / "reports" / "guide.md").read_text(encoding="utf-8")
COMMANDS = list(
    dict.fromkeys(
        " ".join(found.group(1).replace("\\\n", " ").split("#")[0].split())
        for found in re.finditer(r"^    (?:\$ )?(blockprune (?:[^\n]*\\\n)*[^\n]*)$", README + GUIDE, re.MULTILINE)
    )
)


def test_the_readme_is_short() -> None:
    assert len(README.split()) <= 1200


def test_links_lead_somewhere() -> None:
    root = Path(__file__).parent.parent
    for folder, text in ((root, README), (root / "reports", GUIDE)):
        assert [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not (folder / link).exists()] == []


def test_there_are_commands() -> None:
    assert {shlex.split(command)[1] for command in COMMANDS} >= {"scan", "graph", "cost"}


OFFLINE = [c for c in COMMANDS if c.split()[1] in ("graph", "cost")]
SLOW = [c for c in OFFLINE if "--runtime" in c]  # each runtime is tried in tests/export


@pytest.mark.parametrize("command", [pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in OFFLINE])
def test_offline_commands_run(command: str) -> None:
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    assert result.output.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_exists(command: str) -> None:
    name, *rest = shlex.split(command)[1:]
    known = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
    assert all(word in known for word in rest if word.startswith("--")), command


def test_the_case_study_says_what_its_rows_and_its_report_say() -> None:
    folder = Path(__file__).parent.parent / "reports" / "tiny-digits"
    report = json.loads((folder / "report.json").read_text())
    reported = {r["model"]: r for r in report["results"] if r["table"] == "Evaluated models" and r["fid_n"] == 512}
    row = r"^\| ([a-z-]+)(?:, the teacher)? \| [\d.]+ M \| [\d.]+ M \| (.*) \| (.*) \| (.*) \|$"
    lines = re.findall(row, GUIDE.partition("## A case study")[2], re.MULTILINE)
    assert {name for name, *_ in lines} == reported.keys() == {p.stem for p in (folder / "rows").glob("*.jsonl")}
    for name, *cells in lines:
        rows = [json.loads(line) for line in (folder / "rows" / f"{name}.jsonl").read_text().splitlines()]
        scores = {row["measure"]: row for row in rows if row["kind"] == "score"}
        for measure, cell in zip(("fid", "is", "clip_score"), cells, strict=True):
            said = [float(x) for x in re.findall(r"[\d.]+", cell)]
            places = len(re.findall(r"\.(\d+)", cell)[0])
            found = [scores[measure][key] for key in ("value", "low", "high")]
            assert said == [round(x, places) for x in found], (name, measure)
            assert reported[name][measure] == pytest.approx(found[0])


@pytest.mark.usefixtures("drifting_clock")
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a scan to a student that is loaded again, with no import but blockprune, torch and diffusers."""
    block = re.search(r"## In Python\n.*?```python\n(.*?)```", README, re.DOTALL)
    assert block
    imported = {name.split(".")[0] for name in re.findall(r"^(?:from|import) ([\w.]+)", block.group(1), re.MULTILINE)}
    assert imported <= {"blockprune", "torch", "diffusers"}
    code = block.group(1).replace('"blockprune/assets/models/tiny-digits"', repr(str(ASSETS / "models" / "tiny-digits")))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["student"].unet.num_parameters() < names["pipe"].unet.num_parameters()
    image = names["again"]("one top left", num_inference_steps=1, output_type="np").images
    assert image.shape[-1] == 3
    assert {p.name for p in tmp_path.iterdir()} == {"my-student", *(f"report.{kind}" for kind in ("html", "csv", "json", "tex"))}
