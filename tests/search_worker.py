"""A worker of a search, in a module of its own so that a new process can import it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from optuna.storages import BaseStorage

from blockprune.measures.score import Score
from blockprune.model.architecture import Architecture
from blockprune.stages.search.storage import open_storage
from blockprune.stages.search.trials import Trials

ASKED = {"objective": "eps_mse", "seed": 0}
NAMES = [f"down_blocks.{i}" for i in range(12)]


def score(name: str, value: float | None = 1.0) -> Score:
    return Score(Architecture(frozenset({name})).key, name, "eps_mse", value, 4, 0, error="" if value is not None else "NaN")


def work(make: Callable[[], BaseStorage], log: Path, pause_s: float) -> None:
    """A worker that takes its time and notes what it scores."""
    study = Trials(make(), "s", "eps_mse", ASKED)
    while study.busy():
        study.recover()
        trial = study.claim()
        if trial is None:
            time.sleep(0.02)
            continue
        with study.beating(trial):
            time.sleep(pause_s)
            name = trial.user_attrs["label"]
        if study.finish(trial, [score(name, float(NAMES.index(name)))]) is not None:
            with log.open("a") as out:
                out.write(f"{name} {os.getpid()}\n")


class Journal:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self) -> BaseStorage:
        return open_storage(None, self.path)
