"""Imports point downward only: read from the source, so that an import inside a function counts as well."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import blockprune

ROOT = Path(blockprune.__file__).parent
# A room may import those before it. A tuple is in import order inside one room; a stage knows no other but those before it.
ROOMS = (
    *("errors", "decode", "request", "progress", "assets", "model", "cost", "measures", "runs", "data"),
    *("export", "stages", "reports", "results", "api", "cli", "__main__"),
)
STAGES = ("train", "personalise", "evaluate", "scan", "search")
# What reports and help may import at their top level without waiting for torch.
NO_TORCH = (
    "blockprune.model.architecture",
    "blockprune.model.graph",
    "blockprune.reports.figures",
    "blockprune.reports.html.page",
    "blockprune.reports.report_data",
    "blockprune.cli.console",
)


def place(path: Path) -> tuple[str, ...]:
    """The parts of a source file's module name under the package; () for the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path) -> Iterator[tuple[str, ...]]:
    """The parts, under the package, of what a file imports of it, anywhere in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides its room"
            if (node.module or "").split(".")[0] == "blockprune":
                yield from ((*str(node.module).split(".")[1:], alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (tuple(a.name.split(".")[1:]) for a in node.names if a.name.startswith("blockprune."))


FILES = sorted(ROOT.rglob("*.py"))


def above(here: tuple[str, ...], there: tuple[str, ...]) -> bool:
    """True when `there` lies in a room, or for stages in a stage, above that of `here`."""
    if not here or here[0] not in ROOMS or there[0] not in ROOMS:
        return bool(here) and there[0] not in ROOMS
    if here[0] == there[0] == "stages" and here[1:] and there[1] in STAGES and here[1] in STAGES:
        return STAGES.index(there[1]) > STAGES.index(here[1])
    return ROOMS.index(there[0]) > ROOMS.index(here[0])


def test_every_file_is_in_a_room() -> None:
    assert {place(p)[0] for p in FILES if place(p)} == {*ROOMS}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    wrong = [".".join(there) for there in imports(path) if there and above(place(path), there)]
    assert not wrong, f"{path.relative_to(ROOT)} may not import {', '.join(wrong)}"


def test_reports_and_the_package_load_without_torch() -> None:
    code = f"import sys, {', '.join(NO_TORCH)}; print(sorted({{'torch', 'diffusers', 'transformers'}} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_rooms_are_told_apart() -> None:
    assert above(("model", "trace"), ("stages", "scan"))
    assert above(("stages", "train", "run"), ("stages", "search", "run"))
    assert above(("measures", "images"), ("common",))
    assert not above(("stages", "scan", "scan"), ("model", "trace"))
