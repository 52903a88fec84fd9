"""What the README tells a newcomer to type works as it stands."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from blockprune.cli import app

README = (Path(__file__).parent.parent / "README.md").read_text()
COMMANDS = [
    " ".join(found.group(1).replace("\\\n", " ").split("#")[0].split())
    for found in re.finditer(r"^    (?:\$ )?(blockprune (?:[^\n]*\\\n)*[^\n]*)$", README, re.MULTILINE)
]


def test_there_are_commands() -> None:
    assert {shlex.split(command)[1] for command in COMMANDS} >= {"scan", "graph", "cost"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.split()[1] in ("graph", "cost")])
def test_offline_commands_run(command: str) -> None:
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output
    assert result.output.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_exists(command: str) -> None:
    name, *rest = shlex.split(command)[1:]
    known = CliRunner().invoke(app, [name, "--help"], terminal_width=200).output
    assert all(word in known for word in rest if word.startswith("--")), command


def test_the_case_study_says_what_its_rows_and_its_report_say() -> None:
    folder = Path(__file__).parent.parent / "reports" / "tiny-digits"
    report = json.loads((folder / "report.json").read_text())
    reported = {r["model"]: r for r in report["results"] if r["table"] == "Evaluated models" and r["fid_n"] == 1000}
    lines = re.findall(r"^\| ([a-z-]+)(?:, the teacher)? \| [\d.]+ M \| [\d.]+ M \| (.*) \| (.*) \| (.*) \|$", README, re.MULTILINE)
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


def test_python_example_runs(tmp_path: Path) -> None:
    import tiny

    block = re.search(r"## In Python\n\n((?:    .*\n|\n)+)", README)
    assert block
    code = re.sub(r"^    ", "", block.group(1), flags=re.MULTILINE)
    pipe = tiny.pipeline("sd1", tmp_path)
    names: dict[str, object] = {"pipe": lambda prompt: pipe(prompt, num_inference_steps=1)}
    names["pipe"].unet = pipe.unet  # type: ignore[attr-defined]
    exec(compile(code, "README.md", "exec"), names)
    assert names["student"].num_parameters() < pipe.unet.num_parameters()  # type: ignore[attr-defined]
