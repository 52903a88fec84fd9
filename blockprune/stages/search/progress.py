"""What a search says while it runs: each new best, each finalist, and how far it is."""

from __future__ import annotations

from collections.abc import Callable

from blockprune.progress import Listener
from blockprune.runs.records import Evaluation


class Teller:
    """Turns evaluations into lines: each new best, each finalist, and a line every tenth of the way.

    `n_known` counts the proposals that were known already.
    """

    def __init__(self, progress: Listener, n_trials: int, n_known: Callable[[], int]) -> None:
        self.progress, self.n_trials, self.n_known = progress, n_trials, n_known
        self.n = 0
        self.best: Evaluation | None = None
        progress.plan({"search": n_trials})

    def tell(self, kind: str, e: Evaluation) -> None:
        """One more architecture is scored: "search", "random", "final" on fresh seeds, or "recovered"."""
        if kind in ("final", "recovered"):
            title = "finalist" if kind == "final" else "recovered"
            self.progress.say(f"{title} {e.score.label}: {_scored(e)}, n = {e.score.n}")
        if kind != "search":
            return
        self.n += 1
        self.progress.tick("search", 1)
        if e.score.error:
            self.progress.say(f"[{self.n}/{self.n_trials}] {e.score.label} failed: {e.score.error}", "red")
            return
        is_best = e.candidate.fits and e.score.value is not None and (self.best is None or e.loss < self.best.loss)
        self.best = e if is_best else self.best
        if is_best or self.n % max(1, self.n_trials // 10) == 0:
            best = f"best {self.best.score.label}: {_scored(self.best)}" if self.best else "nothing fits yet"
            self.progress.say(f"[{self.n}/{self.n_trials}] {best}, {self.n_known()} proposals known already")


def _scored(e: Evaluation) -> str:
    spread = f" [{e.score.low:.4g}, {e.score.high:.4g}]" if e.score.low is not None and e.score.high is not None else ""
    return f"{e.score.measure} {e.score.value:.4g}{spread}" if e.score.value is not None else f"{e.score.measure} failed"
