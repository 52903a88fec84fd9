"""Fixtures: tiny pipelines on disk, made once a session; no test reaches the network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from as_user import pictures, run
from small_search import QUICK

from blockprune.cli import main

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # as in the processes that tests start

Cli = Callable[..., tuple[int, str, str]]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind => a diffusers folder with a tiny pipeline of that kind; tests must not write to it."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            tiny.pipeline(kind, made[kind])
        return made[kind]

    return folder


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    def run(*args: str | Path) -> tuple[int, str, str]:
        try:
            main([str(a) for a in args])
            code: Any = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        return (code, *capfd.readouterr())

    return run


@pytest.fixture
def one_line(cli: Cli) -> Callable[..., str]:
    """Runs a command that must fail with exit code 2 and one line; returns the line."""

    def run(*args: str | Path) -> str:
        code, _, err = cli(*args)
        lines = [line for line in err.splitlines() if line.strip()]
        assert code == 2, err
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


@pytest.fixture
def drifting_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes as long as it has parameters, and is not run for that: timings of finalists take most of a small search."""
    tiny.drifting_clock(monkeypatch)


@pytest.fixture(scope="session")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three images of one thing."""
    return pictures(tmp_path_factory.mktemp("subject"), 3)


@pytest.fixture(scope="session")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small search of the built-in model by a `drifting_clock`, left undisturbed."""
    out = tmp_path_factory.mktemp("search") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny.drifting_clock(patch)
        run("search", *QUICK, "--random", "3", "--out", str(out))
    return out


@pytest.fixture(scope="session")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A distillation of three updates with two checkpoints, averaged weights, and its exported pipeline."""
    out = tmp_path_factory.mktemp("distill") / "run"
    quick = ["--train-batch-size", "2", "--n-images", "4", "--steps", "1", "--max-train-steps", "3", "--checkpointing-steps", "2"]
    run("distill", "--arch", "bk-sdm-small", *quick, "--ema", "--learning-rate", "0.001", "--out", str(out))
    return out
