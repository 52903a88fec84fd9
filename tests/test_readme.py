"""What the README tells a newcomer to type works as it stands."""

from __future__ import annotations

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
