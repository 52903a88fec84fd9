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
# A group's modules may import every group above it. Within a group, a tuple is in import order; the members of a set are strangers.
VALUES = ("errors", "named", "arch", "records", "presets", "budgets", "recipe", "protocol")
MATHS = {"metrics", "losses"}
LAYERS: list[tuple[str, ...] | set[str]] = [
    VALUES,
    MATHS,
    {"surgery", "families", "data", "digits", "features", "imaging", "costs", "latency", "crosscheck", "store", "checkpoints"}
    | {"snapshots", "taps", "imagefiles", "quantize", "compare"},
    {"stock", "card"},
    {"trace", "replay", "sampling", "pairs", "space", "export", "adapters", "pricing", "ledger"},
    {"proposals", "ip_adapter"},
    {"denoising", "workbench", "cache"},
    {"scoring"},
    {"scan", "search", "distill", "evaluate", "report"},
    {"cli"},
    {"__main__"},
]
# What reports and help may import at their top level without waiting for torch.
NO_TORCH = (
    "blockprune.arch",
    "blockprune.report.figures",
    "blockprune.report.html.page",
    "blockprune.cli.dossiers",
    "blockprune.cli.console",
)
MATHS_MAY = {"torch", "numpy", "scipy"}


def module_of(path: Path) -> str:
    """The module or sub-package that a source file belongs to, by its name under the package; "" for the package itself."""
    first = path.relative_to(ROOT).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Absolute names of what a file imports, anywhere in it; relative imports are spelled out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import hides its layer"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inner_imports(path: Path) -> set[str]:
    """The modules of this package that a file imports; a name from the package itself is a module."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("blockprune.")} - {module_of(path)}


FILES = sorted(p for p in ROOT.rglob("*.py"))
NAMES = {name for layer in LAYERS for name in layer}


def allowed(module: str) -> set[str]:
    """What a module may import of this package."""
    below: set[str] = set()
    for layer in LAYERS:
        if module in layer:
            return below | set(layer[: layer.index(module)] if isinstance(layer, tuple) else ())
        below |= set(layer)
    raise AssertionError(f"{module!r} is in no layer: add it to LAYERS")


def test_the_package_has_files() -> None:
    assert {"arch", "report", "surgery", "trace"} <= {module_of(p) for p in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    module = module_of(path)
    may = NAMES if module == "" else allowed(module)
    above = inner_imports(path) - may
    assert not above, f"{module} may not import {', '.join(sorted(above))}"


@pytest.mark.parametrize("path", [p for p in FILES if module_of(p) in {*VALUES, *MATHS}], ids=lambda p: p.stem)
def test_values_and_maths_import_little(path: Path) -> None:
    outside = {name.split(".")[0] for name in imports(path)} - {"blockprune"} - sys.stdlib_module_names
    assert outside <= (MATHS_MAY if module_of(path) in MATHS else set())


def test_reports_and_the_package_load_without_torch() -> None:
    code = f"import sys, {', '.join(NO_TORCH)}; print(sorted({{'torch', 'diffusers', 'transformers'}} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_a_module_without_a_layer_is_an_error() -> None:
    with pytest.raises(AssertionError, match="in no layer"):
        allowed("utils")


def test_layers_are_told_apart() -> None:
    assert "trace" in allowed("scan")
    assert "scan" not in allowed("trace")
    assert "families" not in allowed("surgery")
    assert "arch" in allowed("presets")
    assert "presets" not in allowed("arch")
