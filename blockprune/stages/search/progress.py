"""What a search says while it runs: each new best, each finalist, how far it is and how long it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from blockprune.progress import Listener, duration
from blockprune.runs.records import Evaluation

STEPS = {"search": "search", "random": "random", "final": "finalists", "recovered": "recovered"}  # kind of trial => step


class SearchProgress:
    """Turns evaluations into progress and lines: each new best, each finalist, and a line every tenth of the way.

    `before` was scored before this run began or taken over from another. `n_known` counts the proposals that were known already.
    `clock` is in seconds.
    """

    def __init__(
        self,
        listener: Listener,
        n_trials: int,
        before: Sequence[Evaluation],
        n_known: Callable[[], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.listener, self.n_trials, self.n_known, self.clock = listener, n_trials, n_known, clock
        self.n = self.n_before = len(before)
        self.best = min((e for e in before if _in_question(e)), key=lambda e: e.loss, default=None)
        self.start = clock()

    def announce(
        self, n_before: Mapping[str, int], n_random: int, n_finals: int, n_recovered: int, n_captions: int, n_images: int
    ) -> None:
        """Says what is to come, at most, from the search to its last pictures: architectures, of which some steps have `n_before`
        scored; images for captions; timings; and so many images of the teacher and of each finalist."""
        sizes = {"search": self.n_trials, "random": n_random, "finalists": n_finals, "recovered": n_recovered}
        for step, size in sizes.items():
            if left := max(size - n_before.get(step, 0), 0):
                self.listener.plan({step: left}, "architectures")
            if step == "random" and n_captions > 0:
                self.listener.plan({"captions": n_captions})
        self.listener.plan({"latency": 1 + n_finals}, "timings")
        self.listener.plan({"images": (1 + n_finals) * n_images})

    def scored(self, kind: str, e: Evaluation) -> None:
        """One more architecture is scored: "search", "random", "final" on fresh seeds, or "recovered"."""
        if (step := STEPS.get(kind)) is not None:
            self.listener.tick(step, 1)
        if kind in ("final", "recovered"):
            title = "finalist" if kind == "final" else "recovered"
            self.listener.say(f"{title} {e.score.label}: {_text(e)}, n = {e.score.n}")
        if kind != "search":
            return
        self.n += 1
        if e.score.error:
            self.listener.say(f"[{self.n}/{self.n_trials}] {e.score.label} failed: {e.score.error}", "red")
            return
        is_best = _in_question(e) and (self.best is None or e.loss < self.best.loss)
        self.best = e if is_best else self.best
        if is_best or self.n % max(1, self.n_trials // 10) == 0:
            best = f"best {self.best.score.label}: {_text(self.best)}" if self.best else "nothing fits yet"
            self.listener.say(f"[{self.n}/{self.n_trials}] {best}, {self.n_known()} proposals known already, {self._left()} left")

    def _left(self) -> str:
        each = (self.clock() - self.start) / (self.n - self.n_before)
        return duration(max(self.n_trials - self.n, 0) * each)


def _in_question(e: Evaluation) -> bool:
    return e.fits and e.score.value is not None


def _text(e: Evaluation) -> str:
    spread = f" [{e.score.low:.4g}, {e.score.high:.4g}]" if e.score.low is not None and e.score.high is not None else ""
    return f"{e.score.measure} {e.score.value:.4g}{spread}" if e.score.value is not None else f"{e.score.measure} failed"
