"""What a search says while it runs: how far it is, the best so far, and the time left, also of a run that goes on."""

from __future__ import annotations

from blockprune.measures.score import Score
from blockprune.model.architecture import Architecture
from blockprune.progress import Silent
from blockprune.runs.records import Candidate, Evaluation
from blockprune.stages.search.progress import SearchProgress


class Heard(Silent):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.n, self.lines = 0, []  # type: tuple[int, list[str]]

    def tick(self, step: str, n: int) -> None:
        self.n += n

    def say(self, text: str, style: str = "") -> None:
        self.lines.append(text)


def evaluation(trial: int, value: float) -> Evaluation:
    candidate = Candidate(Architecture(), f"m{trial}", "tpe", {}, {}, {})
    return Evaluation(trial, candidate, (Score("0" * 12, f"m{trial}", "eps_mse", value, 8, 0),), 0.0, 0.0)


def test_each_new_best_comes_with_the_time_left() -> None:
    now = iter(range(0, 1000, 60))
    heard = Heard()
    progress = SearchProgress(heard, 40, [], lambda: 2, clock=lambda: float(next(now)))
    for trial, value in enumerate([3.0, 4.0, 2.0]):
        progress.scored("search", evaluation(trial, value))
    assert heard.n == 3
    assert heard.lines == [
        "[1/40] best m0: eps_mse 3, 2 proposals known already, 0:39:00 left",
        "[3/40] best m2: eps_mse 2, 2 proposals known already, 0:24:40 left",
    ]


def test_a_run_that_goes_on_counts_from_where_it_was() -> None:
    now = iter(range(0, 1000, 60))
    heard = Heard()
    before = [evaluation(trial, 1.0 + trial) for trial in range(18)]
    progress = SearchProgress(heard, 20, before, lambda: 0, clock=lambda: float(next(now)))
    progress.scored("search", evaluation(18, 2.0))
    progress.scored("search", evaluation(19, 5.0))
    assert heard.n == 2
    assert heard.lines == ["[20/20] best m0: eps_mse 1, 0 proposals known already, 0:00:00 left"]
